"""A GPU that sleeps instead of computing."""

from __future__ import annotations

import asyncio
import time


class Gpu:
    """Computes one thing at a time, in the order in which they come.

    What it computes ends when it would on a GPU that is never late: where the sleep before has
    taken too long (timers are coarse, processors busy), the next one is shorter by that.

    Attributes:
        free_at: When all that was begun so far is done.
    """

    def __init__(self) -> None:
        self.free_at = 0.0
        self._turn = asyncio.Lock()

    async def compute(self, ready_at: float, seconds: float) -> float:
        """Compute something.

        Args:
            ready_at: When all that it needs was there; not in the future.

        Returns:
            When it was done by the clock of the GPU.
        """
        async with self._turn:
            self.free_at = ends_at = max(self.free_at, ready_at) + seconds
            await sleep_until(ends_at)
            return ends_at


async def sleep_until(at: float) -> None:
    """Sleep until a time of `time.monotonic`."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))


__all__ = ["Gpu", "sleep_until"]
