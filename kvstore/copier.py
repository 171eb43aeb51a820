"""Threads that copy and hash payload beside the loop; a `Worker` of `kvstore.protocol.strands`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

logger = logging.getLogger(__name__)

# A core copies and hashes 16 to 19 GB/s (`kvstore_bench.memory_cost`), and memory gives two to four
# cores' worth: more threads would take cores from the engines of the host. Never all of its cores:
# the loop needs one.
THREADS_MAX = 4


def thread_count() -> int:
    """How many threads are of use on the cores that this process may use."""
    return max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) // 2))


class Copier:
    """Starts its threads when it is first asked for something.

    Thread rule: `again` and `post` from any thread, the rest on the loop's.

    Args:
        loop: Where calls are posted.
        threads: How many.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int | None = None) -> None:
        self._loop = loop
        self._thread_count = thread_count() if threads is None else threads
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._calls: deque[Callable[[], None]] = deque()
        self._waking = False
        self._draining = False
        self._closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on one of the threads, after those that came before.

        A job ends in bounded time, and raises nothing.
        """
        if not self._closed and len(self._threads) < self._thread_count:
            self._start_thread()
        self.again(job)

    def again(self, job: Callable[[], None]) -> None:
        """The same, from within a job: starts no thread, for we may be closing."""
        self._jobs.put(job)
        if not self._threads:  # closed, or the system has none left: the loop's does it
            self._drain()

    def post(self, call: Callable[[], None], wake: bool = True) -> None:
        """Run a call on the loop's thread, in the order of posting.

        Args:
            wake: Soon; else with the next one that is to run soon, which must follow.
        """
        self._calls.append(call)
        # Calls that come before the loop is there go along: to wake it is a system call.
        if wake and not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: see `close`
                self._loop.call_soon_threadsafe(self._deliver)

    def close(self) -> None:
        """Let the jobs that were submitted end, and run all calls. Harmless when called again."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._drain()  # what came behind
        self._deliver()

    def _start_thread(self) -> None:
        name = f"copy-{len(self._threads)}"
        # A daemon: an interpreter that ends without `close` does not wait for it.
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # later perhaps
        self._threads.append(thread)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or it would keep its memory until the next one

    def _drain(self) -> None:
        if self._draining:
            return  # a job that submits another one
        self._draining = True
        with contextlib.suppress(Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job()
        self._draining = False

    def _deliver(self) -> None:
        self._waking = False
        calls = self._calls
        while calls:
            try:
                calls.popleft()()
            except Exception:
                logger.exception("internal error after work beside the loop")


__all__ = ["Copier", "thread_count"]
