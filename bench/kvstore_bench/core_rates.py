"""How fast this machine copies and hashes, on one core and on two, as the data path does."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvstore.buffers import Region
from kvstore.checksum import layer_checksum
from kvstore_bench.shaped.figures import Figure

MIB = 1024 * 1024
PIECE_BYTES = MIB
# What a client has that reuses the buffers of two requests of 16 MiB.
TARGET_BYTES = 32 * MIB
THREADS = (1, 2)
# How often a thread that waits for another looks whether it may run.
_LOOK_S = 0.0002

# What is done with a piece, and with the room for a copy of it.
Work = Callable[[memoryview, memoryview], object]


def _copy(source: memoryview, target: memoryview) -> None:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _hash(source: memoryview, target: memoryview) -> int:
    return layer_checksum(source, 0, 0)


def _copy_and_hash(source: memoryview, target: memoryview) -> int:
    _copy(source, target)
    return layer_checksum(target, 0, 0)


WORKS: dict[str, Work] = {"copy": _copy, "hash": _hash, "copy, then hash": _copy_and_hash}


class CoreRates:
    """Memory to be copied and hashed, in pieces of 1 MiB.

    Args:
        working_set_bytes: Whole pieces, two at least; more than caches hold.
    """

    def __init__(self, working_set_bytes: int) -> None:
        regions = Region(working_set_bytes, "kvbench-source"), Region(TARGET_BYTES)
        for region in regions:
            region.touch()
        self._source, target = (region.view for region in regions)
        self._sources, self._targets = _pieces(self._source), _pieces(target)

    def figures(self, trials: int, seconds: float) -> list[Figure]:
        """Bytes a second of all there is to do, in turn."""
        found: dict[tuple[int, str], list[float]] = defaultdict(list)
        for _ in range(trials):
            for threads in THREADS:
                for name, work in WORKS.items():
                    rate_Bps = self._rate_Bps(work, threads, seconds)
                    found[threads, name].append(rate_Bps / 1e9)
        return [
            Figure(f"{threads} core{'s' if threads > 1 else ''}", name, "GB/s", values)
            for (threads, name), values in found.items()
        ]

    def others_run(self) -> dict[str, bool]:
        """Whether other threads of the interpreter run while bytes are copied, or hashed."""
        half = len(self._source) // 2
        first, last = self._source[:half], self._source[half : 2 * half]
        return {
            "copy": others_run(lambda: _copy(first, last)),
            "hash": others_run(lambda: _hash(first, last)),
        }

    def _rate_Bps(self, work: Work, threads: int, seconds: float) -> float:
        """Of some threads together, each of which has a share of the memory for itself."""

        def run(number: int) -> int:
            sources, targets = self._sources[number::threads], self._targets[number::threads]
            count = 0
            while not count or time.perf_counter() < ends_at:
                work(sources[count % len(sources)], targets[count % len(targets)])
                count += 1
            return count * PIECE_BYTES

        with ThreadPoolExecutor(threads) as pool:
            began_at = time.perf_counter()
            ends_at = began_at + seconds
            done_bytes = sum(pool.map(run, range(threads)))
            return done_bytes / (time.perf_counter() - began_at)


def _pieces(view: memoryview) -> Sequence[memoryview]:
    return [view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES)]


def others_run(call: Callable[[], object]) -> bool:
    """Whether other threads of the interpreter run during a call that takes milliseconds.

    One of them notes the time again and again. Does it in the middle half of the call too, then
    the call has let the interpreter go.
    """
    ends: list[float] = []

    def run() -> None:
        began_at = time.perf_counter()
        call()
        ends.extend((began_at, time.perf_counter()))

    thread = threading.Thread(target=run)
    noted = []
    thread.start()
    while thread.is_alive():
        noted.append(time.perf_counter())
        time.sleep(_LOOK_S)
    thread.join()
    began_at, ended_at = ends
    margin_s = (ended_at - began_at) / 4
    return any(began_at + margin_s < at < ended_at - margin_s for at in noted)


__all__ = ["MIB", "PIECE_BYTES", "CoreRates", "others_run"]
