"""When I/Os are due, and waiting until then.

A job with a rate is an open loop: its I/Os come when they come, whether or not those before them
have ended, as requests come to an engine. One that finds all `iodepth` under way waits, and that
wait is part of what its caller sees: latencies are counted from when an I/O was due, not from when
a place was free for it. (What a closed loop leaves out has a name, "coordinated omission".)

Slots take the next due time each as they become free, so that together they are a queue that
`iodepth` servers empty in order.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import random
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

from kvstore_bench.job import Job

# <sys/timerfd.h>. The timers of a loop count milliseconds, which is as long as a small I/O.
_CLOCK_MONOTONIC = time.CLOCK_MONOTONIC
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def arrivals(job: Job, clone: int) -> Iterator[int]:
    """When the I/Os of a clone are due, in nanoseconds from its beginning, in order.

    The same seed gives the same times; clones differ.
    """
    interval_ns = job.io_interval_s * 1e9
    if job.rate_process == "linear":
        number = 0
        while True:
            yield round(number * interval_ns)
            number += 1
    draws = random.Random(f"arrivals/{job.randseed}/{clone}")
    at_ns = 0.0
    while True:
        at_ns += draws.expovariate(1 / interval_ns)
        yield round(at_ns)


class Timer:
    """Wakes waiters at times of the monotonic clock, to some ten microseconds. One loop."""

    def __init__(self) -> None:
        self._fd = _LIBC.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._count = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._wake)

    async def until(self, at_ns: int) -> None:
        """Return at this time, or when the timer is closed."""
        if self._fd < 0:
            return
        waiter = self._loop.create_future()
        self._count += 1
        heapq.heappush(self._waiting, (at_ns, self._count, waiter))
        self._arm()
        await waiter

    def close(self) -> None:
        """Let all waiters go."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._release(1 << 62)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it was set to a later time meanwhile
            os.read(self._fd, 8)
        self._release(time.monotonic_ns())
        self._arm()

    def _release(self, now_ns: int) -> None:
        while self._waiting and self._waiting[0][0] <= now_ns:
            waiter = heapq.heappop(self._waiting)[2]
            if not waiter.done():
                waiter.set_result(None)

    def _arm(self) -> None:
        if not self._waiting:
            return
        # Zero would turn it off.
        seconds, nanoseconds = divmod(max(1, self._waiting[0][0]), 1_000_000_000)
        # struct itimerspec: the interval, which is none, and the time.
        when = struct.pack("llll", 0, 0, seconds, nanoseconds)
        if _LIBC.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, when, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")


class Pacer:
    """Gives the slots of a clone their turns.

    Args:
        start_ns: When it begins.
        end_ns: From when on no I/O may begin; 0 for never.
    """

    def __init__(self, job: Job, clone: int, start_ns: int, end_ns: int) -> None:
        self._arrivals = arrivals(job, clone)
        self._start_ns = start_ns
        self._end_ns = end_ns or 1 << 62
        self._closed = False
        self._timer = Timer()
        self._next_ns = start_ns + next(self._arrivals)

    async def turn(self) -> int | None:
        """Wait until the next I/O is due; when that was, None if there is none before the end."""
        due_ns = self._next_ns
        if self._closed or due_ns >= self._end_ns:
            return None
        self._next_ns = self._start_ns + next(self._arrivals)
        if time.monotonic_ns() < due_ns:
            await self._timer.until(due_ns)
        return None if self._closed else due_ns

    @property
    def behind_ns(self) -> int:
        """How long before the end the next I/O is due, which nobody has begun then."""
        return 0 if self._closed else max(0, self._end_ns - self._next_ns)

    def close(self) -> None:
        """There are no more turns, also for those that wait for one."""
        self._closed = True
        self._timer.close()


__all__ = ["Pacer", "Timer", "arrivals"]
