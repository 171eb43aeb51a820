"""What shared memory costs beside its bytes, and how fast a core moves and hashes those.

::

    $ python -m kvstore_bench.memory_cost --json memory_cost.json

request   processor time of a request to a daemon on this host, at both ends: of an empty one
          (PING), and of a view of some blocks together with its release. The daemon is a process
          of its own behind a unix socket, both loops are uvloop's, one request is under way at a
          time, and nothing is verified: no byte of a block is touched
verified  what the daemon says that it took to verify a view
1 core,   pieces of 1 MiB, as numpy copies them and as checksums are made of them. They lie in a
2 cores   working set that no cache holds, and are copied into a target of 32 MiB, which is what
          a client has that reuses its buffers. "copy, then hash" hashes what was just copied

A trial does all of it once; of the trials the median, the lowest and the highest are told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from kvstore.buffers import PAGE_BYTES
from kvstore.errors import ConfigError, KVStoreError
from kvstore.messages import Empty
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore.wire import FrameType
from kvstore_bench.core_rates import MIB, PIECE_BYTES, CoreRates
from kvstore_bench.daemons import DaemonFailed, Daemons
from kvstore_bench.engines.base import POOL
from kvstore_bench.outputs import check_output, writing
from kvstore_bench.shaped.figures import Figure, table
from kvstore_client import AsyncClient, Layout, Namespace

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

TRIALS_MAX = 1000
SECONDS_MAX = 60.0
# A view of that many is what the target is about.
BATCH_BLOCKS = 16
VIEW_US_TARGET = 40.0
# As many as a client asks for in one request without a thought for its size.
BLOCKS_MAX = 4096
BLOCK_BYTES_MAX = 64 * MIB
# Requests before those that count: the first view maps the arena.
WARM_REQUESTS = 16
# Of a put when blocks are stored, and what the arena has beyond them.
PUT_BYTES = 32 * MIB
ARENA_SPARE_BYTES = 64 * MIB

WORKING_SET_BYTES_MAX = 64 * 1024 * MIB


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for.

    Attributes:
        block_counts: Blocks in a view, each measured by itself.
        seconds: Of each measurement in a trial.
    """

    block_counts: tuple[int, ...] = (1, BATCH_BLOCKS, 64, 256, 1024)
    block_bytes: int = MIB
    working_set_bytes: int = 512 * MIB
    trials: int = 5
    seconds: float = 0.5


# --- requests ----------------------------------------------------------------------------------


async def requests(options: Options) -> list[Figure]:
    """Processor time of requests, and what verification takes beside."""
    stored = max(*options.block_counts, BATCH_BLOCKS)
    # A session may lease half of an arena.
    arena_bytes = 2 * stored * -(-options.block_bytes // PAGE_BYTES) * PAGE_BYTES
    arena_bytes += ARENA_SPARE_BYTES
    costs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    verify_ms = []
    with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
        daemon = Daemons(1, arena_bytes, ("--pool", POOL), f"unix://{folder}/kvstored")
        async with daemon, AsyncClient(daemon.endpoints, transport="shm") as client:
            layout = Layout(
                model_id="memory-cost",
                dtype="uint8",
                block_tokens=16,
                layer_bytes=(options.block_bytes,),
            )
            viewer = _Viewer(client, await client.open_namespace(POOL, layout))
            await viewer.store(stored, options.block_bytes)
            for _ in range(options.trials):
                cost = await _cost_us(daemon, viewer.ping, options.seconds)
                costs["empty (PING)"].append(cost)
                for count in options.block_counts:
                    ask = viewer.asking(count)
                    cost = await _cost_us(daemon, ask, options.seconds)
                    costs[_view_of(count)].append(cost)
                verify_ms.append(await viewer.verify_ms(options.seconds))
    size = format_size_bytes(options.block_bytes)
    verified = Figure("verified", f"{BATCH_BLOCKS} blocks of {size}", "ms", verify_ms)
    return [*_request_figures(costs, options.block_counts), verified]


def _view_of(count: int) -> str:
    return f"view of {count:,}"


def _request_figures(
    costs: dict[str, list[tuple[float, float]]], block_counts: Sequence[int]
) -> list[Figure]:
    """Both ends by themselves and together, and of large views the share of 16 blocks."""
    figures = []
    for name, found in costs.items():
        for end, values in (
            ("client", [client_us for client_us, _ in found]),
            ("daemon", [daemon_us for _, daemon_us in found]),
            ("both", [sum(both) for both in found]),
        ):
            figures.append(Figure("request", f"{name}: {end}", "us", values))
    for count in block_counts:
        if count >= BATCH_BLOCKS:
            shares = [sum(both) * BATCH_BLOCKS / count for both in costs[_view_of(count)]]
            name = f"{_view_of(count)}: both, for each {BATCH_BLOCKS}"
            figures.append(Figure("request", name, "us", shares, at_most=VIEW_US_TARGET))
    return figures


class _Viewer:
    """A client that asks its one daemon for views, and for nothing."""

    def __init__(self, client: AsyncClient, namespace: Namespace) -> None:
        self._client = client
        self._namespace = namespace
        self._keys: list[bytes] = []

    async def store(self, count: int, block_bytes: int) -> None:
        """Put blocks of zeros, under keys that form one prefix."""
        self._keys = [number.to_bytes(32, "big") for number in range(count)]
        step = max(1, min(count, PUT_BYTES // block_bytes))
        region = await self._client.allocate(step * block_bytes)
        for first in range(0, count, step):
            keys = self._keys[: first + step]
            blocks = region.view[: (len(keys) - first) * block_bytes]
            handle = self._client.put(self._namespace, keys, blocks, first=first)
            result = await handle
            await handle.quiesced()
            if not result.ok:
                raise KVStoreError(f"blocks were not stored: {result.errors or result.outcomes}")
            del blocks
        await self._client.free(region)

    async def ping(self) -> None:
        """An empty request, through the library."""
        for endpoint, said in (
            await self._client.cluster.ask_all(FrameType.PING, Empty(), Empty)
        ).items():
            if isinstance(said, KVStoreError):
                raise KVStoreError(f"{endpoint}: {said}")

    def asking(self, count: int) -> Callable[[], Awaitable[int]]:
        """A request for that many blocks, not verified, and the lease's release."""
        keys = self._keys[:count]
        return lambda: self._view(keys, verify=False)

    async def verify_ms(self, seconds: float) -> float:
        """What the daemon takes on the average to verify a view of a batch."""
        keys = self._keys[:BATCH_BLOCKS]
        await self._view(keys, verify=True)
        taken_us, count, ends_at = 0, 0, time.perf_counter() + seconds
        while not count or time.perf_counter() < ends_at:
            taken_us += await self._view(keys, verify=True)
            count += 1
        return taken_us / count / 1e3

    async def _view(self, keys: Sequence[bytes], verify: bool) -> int:
        """Microseconds of verification, as the daemon says."""
        views = await self._client.view(self._namespace, keys, verify=verify)
        held = await views.release()
        if not held or views.hit_count != len(keys):
            raise KVStoreError(f"a view failed: {views.hit_count} blocks, {views.errors}")
        return views.verify_us


async def _cost_us(
    daemon: Daemons, ask: Callable[[], Awaitable[object]], seconds: float
) -> tuple[float, float]:
    """Processor time of a request at the client, and at the daemon."""
    for _ in range(WARM_REQUESTS):
        await ask()
    count = 0
    ours, theirs = time.process_time_ns(), daemon.cpu_ns()
    ends_at = time.perf_counter() + seconds
    while not count or time.perf_counter() < ends_at:
        await ask()
        count += 1
    ours, after = time.process_time_ns() - ours, daemon.cpu_ns()
    if theirs is None or after is None:
        raise DaemonFailed("; ".join(daemon.failures()))
    return ours / count / 1e3, (after - theirs) / count / 1e3


# --- the command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: all was measured, whether or not the target is met. 1: something failed. 2: a wrong
        option. 130: interrupted.
    """
    args = _parser().parse_args(arguments)
    to_stdout = args.json is not None and str(args.json) == "-"
    try:
        options = _options(args)
        if args.json is not None and not to_stdout:
            check_output("--json", args.json)
        figures = uvloop.run(requests(options))
        rates = CoreRates(options.working_set_bytes)
        figures += rates.figures(options.trials, options.seconds)
        free = rates.others_run()
        # With the figures on standard output, what is for people goes to the other one.
        print("\n".join(_report(figures, free)), file=sys.stderr if to_stdout else sys.stdout)
        text = json.dumps(as_json(options, figures, free), indent=2) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        elif args.json is not None:
            with writing("--json", args.json) as file:
                file.write(text.encode())
    except (KVStoreError, OSError) as error:
        print(f"memory_cost: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("memory_cost: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _report(figures: Sequence[Figure], free: dict[str, bool]) -> list[str]:
    """All figures for people."""
    words = [f"{name}: {'yes' if runs else 'no'}" for name, runs in free.items()]
    return [*table(figures), "", f"other threads run during a call: {', '.join(words)}"]


def as_json(
    options: Options, figures: Sequence[Figure], free: dict[str, bool]
) -> dict[str, object]:
    """All figures for programs."""
    return {
        "format": "kvbench-memory-cost",
        "version": JSON_VERSION,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "trials": options.trials,
        "seconds": options.seconds,
        "block_bytes": options.block_bytes,
        "working_set_bytes": options.working_set_bytes,
        "figures": [figure.plain() for figure in figures],
        "others_run": free,
    }


def _options(args: argparse.Namespace) -> Options:
    block_bytes = parse_size_bytes(args.bs, "--bs")
    working_set_bytes = parse_size_bytes(args.working_set, "--working-set")
    for option, value, lowest, highest in (
        *(("--blocks", count, 1, BLOCKS_MAX) for count in args.blocks),
        ("--bs", block_bytes, 1, BLOCK_BYTES_MAX),
        ("--working-set", working_set_bytes, 2 * PIECE_BYTES, WORKING_SET_BYTES_MAX),
        ("--trials", args.trials, 1, TRIALS_MAX),
        ("--seconds", args.seconds, 0.001, SECONDS_MAX),
    ):
        if not lowest <= value <= highest:
            raise ConfigError(option, value, f"is {lowest:,} to {highest:,}")
    if working_set_bytes % PIECE_BYTES:
        raise ConfigError("--working-set", args.working_set, "is a number of MiB")
    counts = tuple(dict.fromkeys(args.blocks))
    return Options(counts, block_bytes, working_set_bytes, args.trials, args.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_bench.memory_cost",
        description="Measure the processor time of views of blocks in a daemon's memory, at both"
        " ends, and how fast a core of this machine copies and hashes. Starts a daemon of its own"
        " on a unix socket. Whatever else runs on the machine goes into the figures.",
        allow_abbrev=False,
    )
    add, options = parser.add_argument, Options()
    add(
        "--blocks",
        type=int,
        nargs="+",
        default=options.block_counts,
        metavar="N",
        help=f"in a view (default: {' '.join(map(str, options.block_counts))}); the daemon"
        " takes twice the memory of the largest",
    )
    add(
        "--bs",
        default=format_size_bytes(options.block_bytes),
        metavar="SIZE",
        help="bytes of a block (default: %(default)s); matters to verification alone",
    )
    add(
        "--working-set",
        default=format_size_bytes(options.working_set_bytes),
        metavar="SIZE",
        help="what a core copies and hashes in turn (default: %(default)s); more than all"
        " caches hold, or their speed is measured",
    )
    add("--trials", type=int, default=options.trials, metavar="N", help="(default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=options.seconds,
        metavar="S",
        help="of each measurement in a trial (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    return parser


__all__ = ["Options", "as_json", "main", "requests"]

if __name__ == "__main__":
    sys.exit(main())
