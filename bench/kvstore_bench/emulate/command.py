"""The command `kvbench emulate`: what is run, and in which order."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TextIO

from kvstore.errors import KVStoreError
from kvstore_bench.emulate.cluster import running
from kvstore_bench.emulate.options import (
    DESCRIPTION,
    EPILOG,
    Options,
    add_options,
    make_options,
)
from kvstore_bench.emulate.picture import draw
from kvstore_bench.emulate.play import Player, play
from kvstore_bench.emulate.records import ORACLE, Arrivals, Played, Record
from kvstore_bench.emulate.results import Result, summarize
from kvstore_bench.emulate.search import Found, RateSearch
from kvstore_bench.emulate.shape import Needs
from kvstore_bench.emulate.tables import as_json, describe, headline, search_table, table, voids
from kvstore_bench.outputs import check_output, write_output
from kvstore_bench.replay.picture import check_picture
from kvstore_bench.shaped import ShapedNetwork, ShapingUnavailable
from kvstore_bench.shaped.nodes import NodeFailed
from kvstore_client.selector import Policy

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3
_PROGRESS_INTERVAL_S = 0.2
# In less the first turns, which find nothing stored, and what is learnt of links are most of it.
TELLING_S = 5.0


def add_emulate_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kvbench emulate`."""
    parser = subparsers.add_parser(
        "emulate",
        help="a cluster with rate-limited links, and what policies make of it",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="a picture (.png, .svg, .pdf) of the first trial"
    )
    parser.set_defaults(run=run_emulate)


def run_emulate(args: argparse.Namespace) -> int:
    """`kvbench emulate`; returns the exit status.

    Raises:
        ConfigError: An option, or a trace, cannot be.
        OutputError: The figures could not be written.
    """
    to_stdout = args.json is not None and str(args.json) == "-"
    if args.json is not None and not to_stdout:
        check_output("--json", args.json)
    if args.plot is not None:
        check_picture(args.plot)
    options = make_options(args)
    people = sys.stderr if to_stdout else sys.stdout
    for line in describe(options):
        print(line, file=people, flush=True)
    progress = _ProgressLine(sys.stderr, sum(1 for _ in options.work.turns))
    found: list[Found] = []
    try:
        runs = asyncio.run(_run_all(options, progress, found))
    except ShapingUnavailable as error:
        print(f"kvbench emulate: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    except NodeFailed as error:
        print(f"kvbench emulate: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        progress.clear()
    results = [result for _, result in runs]
    lines = table(results) if options.limit is None else search_table(found)
    for line in (*lines, *voids(results)):
        print(line, file=people)
    if options.limit is None and max(result.jct_s for result in results) < TELLING_S:
        print(
            f"all of it took less than {TELLING_S:g} s, too little to tell policies apart: more"
            " --sessions or --turns, or a slower --storage-nic",
            file=people,
        )
    figures = json.dumps(as_json(options, results, found), indent=2) + "\n"
    if to_stdout:
        sys.stdout.write(figures)
    elif args.json is not None:
        write_output("--json", args.json, figures.encode())
    if args.plot is not None:
        shown = runs if options.limit is not None else runs[: len(options.policies)]
        draw(shown, options.shape, headline(options), args.plot)
    return EXIT_FAILED if any(result.void for result in results) else 0


async def _run_all(
    options: Options, progress: _ProgressLine, found: list[Found]
) -> list[tuple[Played, Result]]:
    runs: list[tuple[Played, Result]] = []
    async with ShapedNetwork(options.shape.plans()) as network:

        async def run(policy: str, arrivals: Arrivals, label: str) -> Result:
            progress.begin(f"{policy}{label}")
            played = await _run_one(options, policy, arrivals, network, progress)
            result = summarize(played, options.links, options.work.block_bytes)
            runs.append((played, result))
            return result

        if options.limit is not None:
            found += await _search(options, run)
            return runs
        for trial in range(options.trials):
            # In the other order every second time: what the machine does besides meets all.
            policies = options.policies if trial % 2 == 0 else options.policies[::-1]
            for policy in policies:
                label = f", trial {trial + 1} of {options.trials}" if options.trials > 1 else ""
                await run(policy, options.arrivals, label)
    return runs


async def _search(
    options: Options, run: Callable[[str, Arrivals, str], Awaitable[Result]]
) -> list[Found]:
    """The highest rate of sessions for each policy; every run is noted by `run`."""
    limit, work, seed = options.limit, options.work, options.arrivals.seed
    assert limit is not None
    limit_s = limit.value
    if limit.relative:
        alone = await run(Policy.DIRECT, Arrivals(seed=seed, idle=True), ", one session at a time")
        limit_s *= alone.ttft_s["p90"]
    direct_Bps = options.shape.storage_Bps("prefill")
    ideal_s = work.hit_bytes / direct_Bps if direct_Bps else 1.0
    found: list[Found] = []
    for policy in options.policies:
        search = RateSearch(len(work.sessions) / max(ideal_s, 1e-3))
        tries: list[tuple[float, float]] = []
        while (rate := search.next) is not None:
            result = await run(policy, Arrivals(rate, seed), f", {rate:.3g} sessions a second")
            tries.append((rate, result.ttft_s["p90"]))
            search.tried(rate, not result.void and result.ttft_s["p90"] <= limit_s)
        found.append(Found(policy, limit_s, search.kept, tries))
    return found


async def _run_one(
    options: Options,
    policy: str,
    arrivals: Arrivals,
    network: ShapedNetwork,
    progress: _ProgressLine,
) -> Played:
    names = [plan.name for plan in options.shape.plans()]
    nodes = (
        [name for name in names if name.startswith("prefill")],
        [name for name in names if name.startswith("decode")],
    )
    work, deadline_s = options.work, options.deadline_s
    if policy == ORACLE:
        player = Player(
            None, work, options.compute, deadline_s, options.groups, nodes, progress.turn
        )
        return await play(player, policy, arrivals, {})
    needs = Needs(len(work.sessions), options.groups, options.check)
    async with running(network.nodes, policy, work, needs) as on:
        player = Player(on, work, options.compute, deadline_s, options.groups, nodes, progress.turn)
        try:
            played = await play(player, policy, arrivals, network.nodes)
            played.plans = await on.plans()
            return played
        except* KVStoreError as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise NodeFailed(f"policy {policy}: {first}") from first


class _ProgressLine:
    """Shows how far a run is, on a terminal."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._total = total
        self._shows = stream.isatty()
        self._label = ""
        self._count = 0
        self._shown_at = 0.0

    def begin(self, label: str) -> None:
        """A run begins."""
        self._label = label
        self._count, self._shown_at = 0, 0.0
        self._show("starts")

    def turn(self, record: Record) -> None:
        """A turn has ended."""
        self._count += 1
        if time.monotonic() - self._shown_at >= _PROGRESS_INTERVAL_S:
            self._show(f"{self._count} of {self._total} turns")

    def clear(self) -> None:
        """Take the line away."""
        if self._shows:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _show(self, text: str) -> None:
        self._shown_at = time.monotonic()
        if self._shows:
            self._stream.write(f"\r\033[K{self._label}: {text}")
            self._stream.flush()


__all__ = ["add_emulate_parser", "run_emulate"]
