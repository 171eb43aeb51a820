"""Event loops for tests: both real ones, and one on which time stands until it is moved."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def run_on(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own, in debug mode.

    An exception in a callback of the loop fails the caller, as it should a test.
    """
    failed: list[dict[str, Any]] = []
    with asyncio.Runner(debug=True, loop_factory=LOOPS[loop]) as runner:
        runner.get_loop().set_exception_handler(lambda loop, context: failed.append(context))
        result = runner.run(main)
    assert not failed, failed
    return result


async def turns(count: int = 5) -> None:
    """Let the loop turn a few times."""
    for _ in range(count):
        await asyncio.sleep(0)


class Timer:
    """A call in the future; as much of `asyncio.TimerHandle` as is used."""

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when = when
        self.cancelled = False
        self._callback = callback
        self._args = args

    def cancel(self) -> None:
        """Never call."""
        self.cancelled = True

    def run(self) -> None:
        """Call, unless cancelled."""
        if not self.cancelled:
            self._callback(*self._args)


class ManualLoop:
    """Stands in for an event loop whose descriptors and clock are in the test's hands.

    Attributes:
        readers, writers: Callbacks by descriptor, as registered now.
        changes: Every registration and its end, in order, as ("+reader", descriptor).
    """

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}
        self.writers: dict[int, Callable[[], object]] = {}
        self.changes: list[tuple[str, int]] = []
        self._now = 1000.0
        self._soon: list[Timer] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    @property
    def as_loop(self) -> asyncio.AbstractEventLoop:
        """Itself, for those who ask for a whole loop."""
        return self  # type: ignore[return-value]

    @property
    def pending(self) -> list[float]:
        """When the calls in the future are due, cancelled ones left out."""
        return sorted(when for when, _, timer in self._timers if not timer.cancelled)

    def time(self) -> float:
        """What the clock shows."""
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """As of a loop."""
        timer = Timer(self._now, callback, args)
        self._soon.append(timer)
        return timer

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """As of a loop."""
        timer = Timer(when, callback, args)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """As of a loop."""
        return self.call_at(self._now + delay, callback, *args)

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """As of a loop."""
        assert fd >= 0
        self.readers[fd] = callback
        self.changes.append(("+reader", fd))

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        """As of a loop."""
        assert fd >= 0
        self.writers[fd] = callback
        self.changes.append(("+writer", fd))

    def remove_reader(self, fd: int) -> bool:
        """As of a loop."""
        assert fd >= 0
        self.changes.append(("-reader", fd))
        return self.readers.pop(fd, None) is not None

    def remove_writer(self, fd: int) -> bool:
        """As of a loop."""
        assert fd >= 0
        self.changes.append(("-writer", fd))
        return self.writers.pop(fd, None) is not None

    def run_soon(self) -> int:
        """Run what was to be called soon, and what that asks for in turn; how many calls."""
        count = 0
        while self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                call.run()
            count += len(calls)
        return count

    def advance(self, seconds: float) -> None:
        """Move the clock on, and stop at every call that is due on the way."""
        end = self._now + seconds
        self.run_soon()
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, when)
            timer.run()
            self.run_soon()
        self._now = end
