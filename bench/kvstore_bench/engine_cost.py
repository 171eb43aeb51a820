"""What the daemon's engine costs beside the bytes that it holds: time of a lookup, memory of
the index, evictions.

::

    python -m kvstore_bench.engine_cost --blocks 1000000 --json cost.json

One process, no network, and no payload: the arena is memory that is mapped and never written,
and blocks enter it as a put enters them (reserve, publish, enqueue). Two stores are filled one
after the other, because tracing allocations slows down whatever is timed beside it:

1. Untraced: lookups, then as many puts as there are blocks, each of which evicts one.
2. Traced: what was allocated when the arena is full. What the parts of the index take more
   when all blocks were replaced is added as the first store showed it.

A lookup is timed from the bytes of its frame to the bytes of its reply, through the connection
class that serves real clients. Each asks for another session, whose blocks were put one by one
between those of all others: neither caches nor the order of allocation help it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import mmap
import platform
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from kvstore.errors import ConfigError
from kvstore.messages import Lookup, LookupReply, Release, decode, encode
from kvstore.serving import Server, ServerOptions
from kvstore.wire import HEADER_BYTES, FrameType
from kvstore_bench.engine_bed import (
    KEY_BYTES,
    LAYERS,
    PREFIX_KEYS,
    PUT_BLOCKS,
    Bed,
    Caller,
    Progress,
    frame,
)

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

BLOCKS_DEFAULT = 1_000_000
# One session may lease half of the arena, and a lookup leases this many.
BLOCKS_MIN = 2 * PREFIX_KEYS
# An arena of 64 GiB in the smallest blocks; beyond it the run takes minutes and 6 GB.
BLOCKS_MAX = 16_000_000
REPETITIONS_DEFAULT = 50
REPETITIONS_MAX = 10_000

LOOKUP_MS_TARGET = 2.0
INDEX_BYTES_TARGET = 256.0

# Parts in which all blocks are replaced; each gives one rate of puts.
_ROUNDS = 10
# A share of all blocks that is evicted through the policy alone, in each round.
_EVICT_DIVISOR = 50
# Blocks that are replaced while allocations are traced, which takes ten times as long.
_REPLACED_TRACED = 20_000
_LEASE_MS = 10_000
_PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        value: The median, where there are several.
        lowest, highest: Of all measurements.
        target: What it may be at most; None where it is for information.
    """

    name: str
    unit: str
    value: float
    lowest: float
    highest: float
    count: int
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Cost:
    """All that one run measured.

    Attributes:
        found_keys: Keys that the worst of all lookups found.
        parts: Bytes a block of each part of the index, when every block was replaced once.
    """

    blocks: int
    found_keys: int
    figures: tuple[Figure, ...]
    parts: dict[str, float]


def measure(blocks: int, repetitions: int, progress: Progress) -> Cost:
    """Measure everything.

    Args:
        blocks: In the arena, at least `BLOCKS_MIN`.
        repetitions: Lookups of each kind.
        progress: Told what is done, how much of it, and of how much.
    """
    progress("making keys", 0, 1)
    names = random.Random(blocks).randbytes(2 * blocks * KEY_BYTES)
    gc.collect()
    resident_before = _resident_bytes()
    bed = Bed(blocks, names)
    bed.put(0, blocks, progress, "filling")
    filled_parts, resident_filled = bed.parts(), _resident_bytes() - resident_before
    lookups, found = asyncio.run(_lookups(bed, repetitions, progress))
    churn = _replace_all(bed, progress)
    parts, resident_replaced = bed.parts(), _resident_bytes() - resident_before
    evictions = _evict(bed, progress)
    checksums_bytes = blocks * sys.getsizeof(bed.checksums) + bed.checksums_bytes()
    del bed
    gc.collect()
    filled, growth = _traced(blocks, names, progress)
    replaced = filled + sum(parts.values()) - sum(filled_parts.values()) + growth * blocks
    shares = {name: size_bytes / blocks for name, size_bytes in parts.items()}
    shares["everything else"] = replaced / blocks - sum(shares.values())

    def a_block(name: str, size_bytes: float, target: float | None = None) -> Figure:
        return _figure(name, "B/block", [size_bytes / blocks], target)

    memory = [
        a_block("index, arena just filled", filled, INDEX_BYTES_TARGET),
        a_block("index, all blocks replaced", replaced, INDEX_BYTES_TARGET),
        a_block("resident, arena just filled", resident_filled),
        a_block("resident, all blocks replaced", resident_replaced),
        a_block(f"checksums of {LAYERS} layers, and their column", checksums_bytes),
        a_block("ghosts", parts["ghosts of the eviction policy"]),
    ]
    return Cost(blocks, found, (*lookups, *memory, *churn, evictions), shares)


async def _lookups(bed: Bed, repetitions: int, progress: Progress) -> tuple[list[Figure], int]:
    """Lookups that find all, through a connection and at the source, without and with lease."""
    server = Server(bed.source, [], ServerOptions(node_id="engine-cost"))
    await server.start()
    caller = Caller(server)
    try:
        kinds = [(whole, lease_ms) for whole in (True, False) for lease_ms in (0, _LEASE_MS)]
        taken_ms: list[list[float]] = [[] for _ in kinds]
        found = PREFIX_KEYS
        for turn in range(repetitions):
            progress("looking up", turn, repetitions)
            for place, (whole, lease_ms) in enumerate(kinds):
                number = turn * len(kinds) + place
                look_up = _through_connection if whole else _at_source
                elapsed_s, hits = look_up(bed, caller, bed.session(number), lease_ms, number)
                taken_ms[place].append(elapsed_s * 1e3)
                found = min(found, hits)
    finally:
        await server.stop(0)
        caller.close()
    names = [
        ("lookup with a lease" if lease_ms else "lookup")
        + (", frame to reply" if whole else ", source alone")
        for whole, lease_ms in kinds
    ]
    figures = [
        _figure(name, "ms", values, LOOKUP_MS_TARGET)
        for name, values in zip(names, taken_ms, strict=True)
    ]
    return figures, found


def _through_connection(
    bed: Bed, caller: Caller, keys: list[bytes], lease_ms: int, number: int
) -> tuple[float, int]:
    """Seconds from the frame's bytes to the reply's, and how many keys were found."""
    message = Lookup(namespaces=(bed.namespace.id,), keys=keys, lease_ms=lease_ms)
    request = frame(FrameType.LOOKUP, 2 * number + 1, encode(message))
    began_at = time.perf_counter()
    reply = caller.call(request)
    elapsed_s = time.perf_counter() - began_at
    answer = decode(reply[HEADER_BYTES:], LookupReply)
    if answer.lease:
        release = encode(Release(leases=(answer.lease,)))
        caller.call(frame(FrameType.RELEASE, 2 * number + 2, release))
    return elapsed_s, _count(answer.bitmap, answer.lease, lease_ms)


def _at_source(
    bed: Bed, caller: Caller, keys: list[bytes], lease_ms: int, number: int
) -> tuple[float, int]:
    """The same without protocol and messages."""
    began_at = time.perf_counter()
    bitmap, lease = bed.source.lookup([bed.namespace.id], keys, lease_ms, caller)
    elapsed_s = time.perf_counter() - began_at
    bed.source.release([lease] if lease else [], caller)
    return elapsed_s, _count(bitmap, lease, lease_ms)


def _count(bitmap: bytes, lease: int, lease_ms: int) -> int:
    """Keys that were found; none if a lease was asked for and refused."""
    if bool(lease) != bool(lease_ms):
        return 0
    return int.from_bytes(bitmap, "little").bit_count()


def _replace_all(bed: Bed, progress: Progress) -> list[Figure]:
    """Put as many new blocks as the arena holds; each evicts one."""
    rates, longest_ms = [], []
    for turn in range(_ROUNDS):
        first = bed.blocks + bed.blocks * turn // _ROUNDS
        last = bed.blocks + bed.blocks * (turn + 1) // _ROUNDS
        evicted = bed.store.counters["blocks_evicted"]
        began_at = time.perf_counter()
        label = f"replacing, part {turn + 1} of {_ROUNDS}"
        longest_ms.append(bed.put(first, last, progress, label) * 1e3)
        elapsed_s = time.perf_counter() - began_at
        rates.append((bed.store.counters["blocks_evicted"] - evicted) / elapsed_s)
    return [
        _figure("puts into a full arena, each evicts", "/s", rates),
        _figure(f"longest put of {PUT_BLOCKS} blocks in each tenth", "ms", longest_ms),
    ]


def _evict(bed: Bed, progress: Progress) -> Figure:
    """Evictions by the policy alone. The store is of no use afterwards."""
    rates = []
    for turn in range(_ROUNDS):
        progress("evicting", turn, _ROUNDS)
        count = max(1, bed.blocks // _EVICT_DIVISOR)
        began_at = time.perf_counter()
        for _ in range(count):
            bed.policy.evict(_anything)
        rates.append(count / (time.perf_counter() - began_at))
    return _figure("evictions, policy alone", "/s", rates)


def _anything(slot: int) -> bool:
    return True


def _traced(blocks: int, names: bytes, progress: Progress) -> tuple[int, float]:
    """What a store allocates, as Python's allocators and the system were asked for it.

    Returns:
        Bytes until its arena is full; and bytes by which each block that takes the place of
        another makes that grow, containers aside. (Equal numbers may come in objects of 28
        and of 32 bytes.)
    """
    traced_before = tracemalloc.is_tracing()
    if not traced_before:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        bed = Bed(blocks, names)
        bed.put(0, blocks, progress, "filling, every allocation counted")
        gc.collect()
        filled, parts = _allocated(bed), bed.parts()
        index_bytes = filled - before - sys.getsizeof(bed.checksums) - bed.checksums_bytes()
        count = min(blocks, _REPLACED_TRACED)
        bed.put(blocks, blocks + count, progress, "replacing, every allocation counted")
        gc.collect()
        grown = _allocated(bed) - filled
        containers = sum(bed.parts().values()) - sum(parts.values())
        return index_bytes, (grown - containers) / count
    finally:
        if not traced_before:
            tracemalloc.stop()


def _allocated(bed: Bed) -> int:
    return tracemalloc.get_traced_memory()[0] + bed.namespace.slots.mapped_bytes


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _figure(name: str, unit: str, values: Sequence[float], target: float | None = None) -> Figure:
    median = statistics.median(values)
    return Figure(name, unit, median, min(values), max(values), len(values), target)


def table(cost: Cost) -> list[str]:
    """All figures for people: a line each, with its target and whether it is met."""
    rows = [("", "median", "lowest", "highest", "", "target", "")]
    for figure in cost.figures:
        one = figure.count == 1
        rows.append(
            (
                figure.name,
                _number(figure.value),
                "" if one else _number(figure.lowest),
                "" if one else _number(figure.highest),
                figure.unit,
                "" if figure.target is None else f"<= {figure.target:g}",
                {None: "", True: "met", False: "missed"}[figure.met],
            )
        )
    parts = [(name, f"{size:.1f}") for name, size in cost.parts.items()]
    return [
        f"{cost.blocks:,} blocks, keys of {KEY_BYTES} bytes; a lookup asks for"
        f" {PREFIX_KEYS:,} and found {cost.found_keys:,}; Python {platform.python_version()}",
        "",
        *_aligned(rows),
        "",
        "bytes a block of the index when all blocks were replaced",
        *_aligned(parts),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in (1, 2, 3) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def as_json(cost: Cost) -> dict[str, object]:
    """All figures for programs."""
    return {
        "format": "kvbench-engine-cost",
        "version": JSON_VERSION,
        "python": platform.python_version(),
        "blocks": cost.blocks,
        "prefix_keys": PREFIX_KEYS,
        "found_keys": cost.found_keys,
        "key_bytes": KEY_BYTES,
        "layers": LAYERS,
        "figures": [{**asdict(figure), "met": figure.met} for figure in cost.figures],
        "parts_bytes_per_block": cost.parts,
    }


class _ProgressLine:
    """Shows on a terminal what is done; elsewhere nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown_at = 0.0

    def show(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal and now - self._shown_at >= _PROGRESS_INTERVAL_S:
            self._shown_at = now
            self._stream.write(f"\r\033[K{label}: {done / total:.0%}")
            self._stream.flush()

    def clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: all was measured, whether or not targets are met. 1: a lookup missed keys, or the
        figures could not be written. 2: a wrong option. 130: interrupted.
    """
    args = _parser().parse_args(arguments)
    progress = _ProgressLine(sys.stderr)
    try:
        _check("--blocks", args.blocks, BLOCKS_MIN, BLOCKS_MAX)
        _check("--repetitions", args.repetitions, 1, REPETITIONS_MAX)
        if args.json is not None and not args.json.parent.is_dir():
            raise ConfigError("--json", args.json, "lies in a directory that exists")
        cost = measure(args.blocks, args.repetitions, progress.show)
        progress.clear()
        figures = json.dumps(as_json(cost), indent=2) + "\n"
        to_stdout = args.json is not None and str(args.json) == "-"
        # With the figures on standard output, what is for people goes to the other one.
        print("\n".join(table(cost)), file=sys.stderr if to_stdout else sys.stdout)
        if to_stdout:
            sys.stdout.write(figures)
        elif args.json is not None:
            args.json.write_text(figures)
    except (ConfigError, OSError) as error:
        progress.clear()
        print(f"engine_cost: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        progress.clear()
        print("engine_cost: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if cost.found_keys < PREFIX_KEYS:
        print(f"engine_cost: a lookup found {cost.found_keys} of {PREFIX_KEYS}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _check(option: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(option, value, f"is {lowest:,} to {highest:,}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_bench.engine_cost",
        description="Measure what the daemon's engine costs beside the bytes it holds: time of"
        " a lookup, memory of the index, evictions. Needs no daemon and no network. Tables grow"
        " by powers of two: with 700,000 blocks they have just grown, and a block costs most.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=BLOCKS_DEFAULT,
        metavar="N",
        help=f"in the arena, {BLOCKS_MIN:,} or more (default: {BLOCKS_DEFAULT:,};"
        " that takes 700 MB and less than a minute)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=REPETITIONS_DEFAULT,
        metavar="N",
        help=f"lookups of each kind (default: {REPETITIONS_DEFAULT})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    return parser


__all__ = ["Cost", "Figure", "as_json", "main", "measure", "table"]

if __name__ == "__main__":
    sys.exit(main())
