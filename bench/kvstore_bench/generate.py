"""Agent sessions with the statistics of a published workload, for those who have no trace.

The DualPath paper (arXiv 2602.21548, section on the workload) describes three sets of 500 agent
trajectories, software repair with a shell, by five means each; see `DATASETS`. The means do not
multiply: 60 turns of 608 + 148 tokens would be 45,360 tokens, and the mean total is 28,639. They
agree if appended and generated tokens are means over trajectories of each trajectory's own mean,
and short trajectories have long turns: for a total T spread over N turns, E[T/N] > E[T]/E[N].
With N lognormal, E[N]·E[1/N] = exp(sigma²), which gives 0.68 to 0.73 for sigma in all three
sets. What the paper does not say is assumed here:

- The total is a beta-distributed share of the longest context, so that most sessions end near it.
- The first prompt (system prompt, tools, task) is the share of the total that brings the mean
  context to its published value: 17 to 20 %.
- Turns vary within a session: appended tokens by a gamma distribution of shape 0.7 (a few long
  tool results), generated ones of shape 2.
- Times: 30 ms a generated token and a pause of 4 s on average for the tool.

The number of turns is drawn by strata, so that a set of ten sessions has the spread of a
thousand. The same arguments give the same bytes. Sessions share nothing, as in the paper.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore_bench.outputs import check_output, writing

# A turn has at least this many tokens on average; it bounds the number of turns.
TURN_TOKENS_MIN = 48
# How closely totals gather around their mean share of the longest context.
TOTAL_CONCENTRATION = 6.0
APPEND_SHAPE = 0.7
GENERATED_SHAPE = 2.0
DECODE_S = 0.03
PAUSE_S = 4.0

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is published of a set of trajectories; tokens but for `turns`.

    Attributes:
        length_max: No context grows longer.
        turns: Mean number of turns.
        append: Mean over trajectories of the tokens that a turn appends to the prompt.
        generated: Mean over trajectories of the tokens that a turn generates.
        total: Mean length at the end.
        context: Mean over trajectories of the prompt of a turn.
    """

    length_max: int
    turns: float
    append: float
    generated: float
    total: float
    context: float


DATASETS = {
    "32k": Dataset(32 * 1024, 60, 608, 148, 28_639, 17_183),
    "48k": Dataset(48 * 1024, 106, 474, 172, 42_607, 25_120),
    "64k": Dataset(64 * 1024, 157, 429, 176, 55_958, 32_721),
}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The turns of one agent: what each appends to the prompt, and what it generates."""

    appended: Counts
    generated: Counts

    @property
    def prompts(self) -> Counts:
        """Tokens in the prompt of each turn: all that came before, and what it appends."""
        prompts: Counts = np.cumsum(self.appended) + np.cumsum(self.generated) - self.generated
        return prompts

    @property
    def total(self) -> int:
        """Tokens at the end."""
        return int(self.appended.sum() + self.generated.sum())


def draw_trajectories(dataset: Dataset, count: int, seed: int) -> Iterator[Trajectory]:
    """Draw `count` trajectories."""
    rng = np.random.default_rng(seed)
    strata = (rng.permutation(count) + rng.random(count)) / count
    normal = NormalDist()
    for stratum in strata:
        turns = _lognormal_turns(dataset, normal.inv_cdf(min(max(stratum, 1e-9), 1 - 1e-9)))
        yield _draw_trajectory(dataset, turns, rng)


def _lognormal_turns(dataset: Dataset, deviate: float) -> float:
    variance = math.log((dataset.append + dataset.generated) * dataset.turns / dataset.total)
    return math.exp(math.log(dataset.turns) - variance / 2 + math.sqrt(variance) * deviate)


def _draw_trajectory(dataset: Dataset, turns: float, rng: np.random.Generator) -> Trajectory:
    share = dataset.total / dataset.length_max
    concentration = TOTAL_CONCENTRATION
    total = int(dataset.length_max * rng.beta(share * concentration, (1 - share) * concentration))
    total = max(total, 4 * TURN_TOKENS_MIN)
    count = min(max(round(turns), 2), total // TURN_TOKENS_MIN)
    generated_total = round(total * dataset.generated / (dataset.append + dataset.generated))
    first = round(total * (2 * dataset.context / dataset.total - 1))
    later = total - generated_total - first
    appended = _spread(later, rng.gamma(APPEND_SHAPE, size=count - 1))
    generated = _spread(generated_total, rng.gamma(GENERATED_SHAPE, size=count))
    return Trajectory(np.concatenate(([first], appended)), generated)


def _spread(total: int, weights: npt.NDArray[np.float64]) -> Counts:
    """Integers in proportion to `weights`, each at least 1, whose sum is `total`."""
    edges = np.cumsum(weights) / weights.sum() * (total - len(weights))
    # The last edge is the whole, but for what floating point leaves.
    edges[-1] = total - len(weights)
    bounds: Counts = np.round(edges).astype(np.int64)
    counts = bounds + 1
    counts[1:] -= bounds[:-1]
    return counts


def session_record(
    name: str, trajectory: Trajectory, block_tokens: int, rng: np.random.Generator
) -> dict[str, Any]:
    """A trajectory in the agentic coding format that `trace.load_traces` reads."""
    pauses = rng.exponential(PAUSE_S, size=len(trajectory.appended))
    ends = np.cumsum(trajectory.generated * DECODE_S + pauses)
    starts = np.concatenate(([0.0], ends[:-1]))
    requests = [
        {
            "t": round(float(start), 2),
            "type": "s",
            "in": int(prompt),
            "out": int(generated),
            # A prompt only grows, so its blocks are numbered as they fill.
            "hash_ids": list(range(1, int(prompt) // block_tokens + 1)),
        }
        for start, prompt, generated in zip(
            starts, trajectory.prompts, trajectory.generated, strict=True
        )
    ]
    return {
        "id": name,
        "models": ["generated"],
        "block_size": block_tokens,
        "hash_id_scope": "local",
        "requests": requests,
    }


def generate(
    path: Path, name: str, sessions: int, seed: int, block_tokens: int = 64
) -> list[Trajectory]:
    """Write `sessions` sessions of dataset `name` to `path`, one a line; packed if it ends so.

    Raises:
        OutputError: The file cannot be written.
    """
    rng = np.random.default_rng((seed, 1))
    trajectories = []
    with ExitStack() as stack:
        file = stack.enter_context(writing("--output", path))
        if path.suffix == ".gz":
            # Without name and time in it, so that equal arguments give equal files.
            packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0)
            file = stack.enter_context(cast(BinaryIO, packed))
        for number, trajectory in enumerate(draw_trajectories(DATASETS[name], sessions, seed), 1):
            session = f"{name}-{seed}-{number:04}"
            record = session_record(session, trajectory, block_tokens, rng)
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            trajectories.append(trajectory)
    return trajectories


def measure(trajectories: Iterable[Trajectory]) -> Dataset:
    """The statistics of a set, as `DATASETS` has them; `length_max` is the longest."""
    rows = np.array(
        [
            (
                len(trajectory.appended),
                trajectory.appended.mean(),
                trajectory.generated.mean(),
                trajectory.total,
                trajectory.prompts.mean(),
            )
            for trajectory in trajectories
        ]
    )
    turns, append, generated, total, context = (float(mean) for mean in rows.mean(axis=0))
    return Dataset(int(rows[:, 3].max()), turns, append, generated, total, context)


# --- command line ------------------------------------------------------------------------------

_DESCRIPTION = """\
Write agent sessions with the statistics of a dataset of the DualPath paper
(arXiv 2602.21548): 32k, 48k or 64k is the longest context in tokens. The file
is in the agentic coding format, one session a line; `kvbench replay` reads it.
"""
_EXAMPLES = """\
examples:
  kvbench generate --dataset 64k --sessions 500 --output agents-64k.json.gz
  kvbench generate --dataset 32k --sessions 20 --seed 7 --output agents.json

exit status: 0 all well; 1 the file could not be written; 2 a wrong option;
130 interrupted.
"""


def add_generate_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kvbench generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="write agent sessions to replay",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", choices=DATASETS, default="64k", help="default: 64k")
    parser.add_argument("--sessions", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default: 1")
    parser.add_argument(
        "--block-tokens", type=int, default=64, metavar="N", help="tokens a block (default: 64)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="packed if it ends in .gz"
    )
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """`kvbench generate`; returns the exit status.

    Raises:
        ConfigError: An option cannot be.
        OutputError: The file could not be written.
    """
    for option in ("sessions", "block_tokens"):
        value = getattr(args, option)
        if value < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", value, "must be at least 1")
    if args.seed < 0:
        raise ConfigError("--seed", args.seed, "must not be negative")
    check_output("--output", args.output)
    trajectories = generate(args.output, args.dataset, args.sessions, args.seed, args.block_tokens)
    published, measured = DATASETS[args.dataset], measure(trajectories)
    print(f"{args.output}: {args.sessions} sessions, dataset {args.dataset}, seed {args.seed}")
    print(f"  {'tokens, means':<14}{'published':>12}{'this file':>12}")
    for field in fields(Dataset):
        ours, theirs = getattr(measured, field.name), getattr(published, field.name)
        print(f"  {field.name:<14}{theirs:>12,.0f}{ours:>12,.0f}")
    return 0


__all__ = [
    "DATASETS",
    "Dataset",
    "Trajectory",
    "add_generate_parser",
    "draw_trajectories",
    "generate",
    "measure",
]
