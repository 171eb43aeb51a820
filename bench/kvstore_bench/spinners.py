"""Threads that never rest, as an engine's scheduler beside its client: they count in pure Python.

A thread of that kind asks for the interpreter again as soon as it has given it up, so that every
other thread of its process waits for it, up to a switch interval, whenever it has something to do.
In another process it takes a core now and then, and no more than that: the difference is what the
interpreter costs.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable

from kvstore.errors import KVStoreError
from kvstore_bench.children import Child, cpu_ns

# An interpreter that starts, on a busy machine, and says a word.
START_TIMEOUT_S = 20.0


class Spinners:
    """Some threads that spin between `start` and `stop`; those two and `cpu_ns` on one thread.

    Args:
        count: How many.
        outside: Whether in a process of their own.
    """

    def __init__(self, count: int, outside: bool = False) -> None:
        self._count = count
        self._outside = outside
        self._spinning = False
        self._threads: list[threading.Thread] = []
        self._child: Child | None = None

    async def start(self) -> None:
        """Let them spin; they do when this returns.

        Raises:
            KVStoreError: Their process does not start.
        """
        if not self._count:
            return
        if self._outside:
            self._child = await _started_child(self._count)
        else:
            self._spinning = True
            self._threads = _spin(self._count, lambda: self._spinning)

    async def stop(self) -> None:
        """End them; stopping twice does no harm."""
        self._spinning = False
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()  # a switch interval or two
        if self._child is not None:
            await self._child.stop()
            self._child = None

    def cpu_ns(self) -> int:
        """Processor time of all of them so far; 0 if none spins."""
        if self._child is not None:
            return cpu_ns(self._child.pid) or 0
        # Only of threads that live, as these do until `stop`: the clock of another is no clock.
        idents = [thread.ident for thread in self._threads if thread.ident is not None]
        return sum(time.clock_gettime_ns(time.pthread_getcpuclockid(ident)) for ident in idents)


def _spin(count: int, spinning: Callable[[], bool]) -> list[threading.Thread]:
    def run() -> None:
        rounds = 0
        while spinning():
            rounds += 1

    # Daemons, so that a process which fails does not have to stop them.
    threads = [threading.Thread(target=run, name=f"spin-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads


async def _started_child(count: int) -> Child:
    heard = asyncio.Event()
    child = await Child.start(
        "spin", "kvstore_bench.spinners", [str(count)], lambda line: heard.set()
    )
    waits = [asyncio.ensure_future(heard.wait()), asyncio.ensure_future(child.ended())]
    try:
        await asyncio.wait(waits, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not heard.is_set():
            failed = child.story() if child.status is not None else "spin does not start"
            raise KVStoreError(failed)
    except BaseException:
        await child.stop()
        raise
    finally:
        for wait in waits:
            wait.cancel()
    return child


def main() -> None:
    """Spin in a process of its own, with as many threads as the first argument says, until
    standard input ends."""
    _spin(int(sys.argv[1]), lambda: True)
    print("spinning", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
