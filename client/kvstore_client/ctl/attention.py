"""What a command that goes on by itself wakes up for: the end of a wait, news, a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Both are how an operator ends a command that has no end of its own.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Attention:
    """Where a command sleeps, on one loop.

    Attributes:
        stopped: Whether the command shall end.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._stop = asyncio.Event()
        self._event = asyncio.Event()

    def stop(self) -> None:
        """End the command."""
        self.stopped = True
        self._stop.set()
        self._event.set()

    def wake(self) -> None:
        """Something has changed; the command goes on."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Sleep until somebody stops or wakes us, or the time is over."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._event.wait()
        except TimeoutError:
            pass
        if not self.stopped:
            self._event.clear()

    async def until_stopped(self) -> None:
        """Sleep until somebody stops the command."""
        await self._stop.wait()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Let signals stop the command inside of this context."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
