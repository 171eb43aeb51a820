"""The command `kvbench simulate`: options, what is run, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kvstore.errors import ConfigError
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore_bench.outputs import check_output, write_output
from kvstore_bench.simulate.optimum import run_optimum
from kvstore_bench.simulate.policies import CHOICES, OPTIMUM
from kvstore_bench.simulate.simulation import Tally, run_policy
from kvstore_bench.simulate.workload import Workload, make_workload, next_uses
from kvstore_bench.trace import load_traces

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1
_PROGRESS_INTERVAL_S = 0.1

_DESCRIPTION = """\
Play recorded requests of LLM serving against eviction policies, in caches of
several sizes, and count hits. Nothing is stored and nothing is sent: the policy
of the daemon is called as its store would call it.

TRACE is a file of coding-agent sessions (github.com/callanjfox/kv-cache-tester)
or of Mooncake requests (github.com/kvcache-ai/Mooncake), plain or gzip, or a
pattern in quotes.

Requests come at the times of the trace. Sessions that were recorded one by one
all begin at 0: each starts --stagger seconds after the one before it.
"""
_EPILOG = (
    "policies:\n"
    + "".join(f"  {name:<10}{choice.note}\n" for name, choice in CHOICES.items())
    + """
A prefix hit is a block that is held together with all before it in its prompt:
what an engine can use. A block hit is one that is held, of use or not.

examples:
  kvbench simulate 'traces/*.json.gz'
  kvbench simulate chat.jsonl.gz --capacity 1GiB,4GiB --bytes-per-token 128k
  kvbench simulate agents.json --policies guarded,lru --json hits.json

exit status: 0 all well; 1 the result could not be written; 2 a wrong option or
trace; 130 interrupted.
"""
)


@dataclass(frozen=True, slots=True)
class Capacity:
    """One size of the cache: a share of the distinct blocks' bytes, or bytes."""

    text: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """How one policy did at one capacity."""

    policy: str
    capacity: Capacity
    tally: Tally


def add_simulate_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kvbench simulate`."""
    parser = subparsers.add_parser(
        "simulate",
        help="hit rates of eviction policies over recorded requests",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="file, or pattern in quotes")
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--capacity",
        default="0.1,0.2,0.5",
        metavar="LIST",
        help="up to 1: a share of the bytes of all distinct blocks; else a size, as 2GiB"
        " (default: 0.1,0.2,0.5)",
    )
    cache.add_argument(
        "--policies",
        default=",".join(CHOICES),
        metavar="LIST",
        help="see below (default: all)",
    )
    scale = parser.add_argument_group("requests")
    scale.add_argument("--sessions", type=int, metavar="N", help="only the first N sessions")
    scale.add_argument("--turns", type=int, metavar="N", help="only the first N of each session")
    scale.add_argument(
        "--stagger",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds between the starts of sessions recorded one by one (default: 60)",
    )
    scale.add_argument(
        "--bytes-per-token",
        default="64",
        metavar="SIZE",
        help="KV of a token, all layers; matters for capacities in bytes (default: 64)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    """`kvbench simulate`; returns the exit status.

    Raises:
        ConfigError: An option, or a trace, cannot be.
        OutputError: The figures could not be written.
    """
    policies = parse_policies(args.policies)
    to_stdout = args.json is not None and str(args.json) == "-"
    if args.json is not None and not to_stdout:
        check_output("--json", args.json)
    workload = make_workload(
        load_traces(args.traces),
        bytes_per_token=parse_size_bytes(args.bytes_per_token, "--bytes-per-token"),
        stagger_s=args.stagger,
        session_limit=args.sessions,
        turn_limit=args.turns,
    )
    capacities = parse_capacities(args.capacity, workload)
    # With the figures on standard output, what is for people goes to the other one.
    people = sys.stderr if to_stdout else sys.stdout
    for line in describe(workload, args.stagger):
        print(line, file=people, flush=True)
    progress = _ProgressLine(sys.stderr, len(workload.requests))
    try:
        results = simulate(workload, policies, capacities, progress.show)
    finally:
        progress.clear()
    for title, rate in (("prefix hits", _prefix), ("block hits", _block)):
        print(file=people)
        for text in table(title, results, policies, capacities, rate):
            print(text, file=people)
    figures = json.dumps(as_json(workload, args.stagger, results), indent=2) + "\n"
    if to_stdout:
        sys.stdout.write(figures)
    elif args.json is not None:
        write_output("--json", args.json, figures.encode())
    return 0


def simulate(
    workload: Workload,
    policies: Sequence[str],
    capacities: Sequence[Capacity],
    progress: Callable[[str, int], None],
) -> list[Result]:
    """Run every policy at every capacity.

    Args:
        progress: Told what runs, and the number of each request.
    """
    uses: list[array[int]] = []
    if OPTIMUM in policies:
        uses = next_uses(workload.requests, workload.distinct_count)
    results = []
    for capacity in capacities:
        for name in policies:

            def report(number: int, label: str = f"{name} at {capacity.text}") -> None:
                progress(label, number)

            choice, size_bytes = CHOICES[name], capacity.size_bytes
            if name == OPTIMUM:
                tally = run_optimum(workload, uses, size_bytes, report)
            else:
                policy = choice.policy(size_bytes)
                tally = run_policy(workload, policy, size_bytes, choice.tail_first, report)
            results.append(Result(name, capacity, tally))
    return results


def parse_policies(text: str) -> list[str]:
    """Names of policies out of a list with commas.

    Raises:
        ConfigError: One is unknown, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in CHOICES:
            raise ConfigError("--policies", name, f"is none of {', '.join(CHOICES)}")
    if not names:
        raise ConfigError("--policies", text, f"names none of {', '.join(CHOICES)}")
    return names


def parse_capacities(text: str, workload: Workload) -> list[Capacity]:
    """Sizes of caches out of a list with commas.

    Raises:
        ConfigError: One is no size, or a block would not fit.
    """
    capacities = []
    largest = max(workload.sizes, default=1)
    for word in filter(None, map(str.strip, text.split(","))):
        share = _share(word)
        size_bytes = (
            parse_size_bytes(word, "--capacity")
            if share is None
            else int(share * workload.distinct_bytes)
        )
        if size_bytes < largest:
            raise ConfigError(
                "--capacity", word, f"makes {size_bytes} bytes, a block has {largest}"
            )
        capacities.append(Capacity(word, size_bytes))
    if not capacities:
        raise ConfigError("--capacity", text, "names at least one size, as in 0.1,0.5")
    return capacities


def _share(word: str) -> float | None:
    try:
        share = float(word)
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def describe(workload: Workload, stagger_s: float) -> list[str]:
    """Lines that say what is played."""
    return [
        f"{_count(len(workload.traces), 'trace')}, {_count(workload.session_count, 'session')},"
        f" {_count(len(workload.requests), 'request')}, {workload.block_count:,} blocks;"
        f" starts {stagger_s:g} s apart",
        f"{workload.distinct_count:,} distinct blocks,"
        f" {format_size_bytes(workload.distinct_bytes)}; a cache that holds all of them has"
        f" {workload.hit_rate_max:.1%} hits",
    ]


def table(
    title: str,
    results: Sequence[Result],
    policies: Sequence[str],
    capacities: Sequence[Capacity],
    rate: Callable[[Tally], float],
) -> list[str]:
    """Lines of a table in percent: a row a capacity, a column a policy."""
    rates = {(result.capacity, result.policy): rate(result.tally) for result in results}
    head = [f"{title}, %", "size", *policies]
    rows = [
        [
            capacity.text,
            format_size_bytes(capacity.size_bytes),
            *(f"{rates[capacity, policy] * 100:.1f}" for policy in policies),
        ]
        for capacity in capacities
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]


def as_json(workload: Workload, stagger_s: float, results: Sequence[Result]) -> dict[str, object]:
    """All figures, for programs."""
    return {
        "format": "kvbench-simulate",
        "version": JSON_VERSION,
        "workload": {
            "traces": list(workload.traces),
            "sessions": workload.session_count,
            "stagger_s": stagger_s,
            "requests": len(workload.requests),
            "blocks": workload.block_count,
            "distinct_blocks": workload.distinct_count,
            "distinct_bytes": workload.distinct_bytes,
            "hit_rate_max": workload.hit_rate_max,
        },
        "results": [
            {
                "policy": result.policy,
                "capacity": result.capacity.text,
                "capacity_bytes": result.capacity.size_bytes,
                "block_hit_rate": result.tally.block_hit_rate,
                "prefix_hit_rate": result.tally.prefix_hit_rate,
                "evictions": result.tally.evictions,
            }
            for result in results
        ],
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _prefix(tally: Tally) -> float:
    return tally.prefix_hit_rate


def _block(tally: Tally) -> float:
    return tally.block_hit_rate


class _ProgressLine:
    """Shows on a terminal what runs; elsewhere nothing."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._total = total
        self._shown_at = 0.0
        self._terminal = stream.isatty()

    def show(self, label: str, number: int) -> None:
        now = time.monotonic()
        if self._terminal and now - self._shown_at >= _PROGRESS_INTERVAL_S:
            self._shown_at = now
            self._stream.write(f"\r\033[K{label}: {number / self._total:.0%}")
            self._stream.flush()

    def clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()


__all__ = ["add_simulate_parser"]
