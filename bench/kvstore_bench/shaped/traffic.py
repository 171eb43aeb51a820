"""What the links of a bed carry over time, by their own counters."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Short beside a fetch, long beside what a timer of a busy machine is late.
INTERVAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """What counters said at one time, in the order of the fields of `Sample`."""

    at: float
    bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second of one link, one value for each time between two edges.

    Attributes:
        edges: Seconds, one more than there are values.
    """

    edges: list[float]
    values_Bps: list[float]


def rates(readings: Sequence[Reading], place: int, zero: float) -> Rates:
    """The rates of one link between its readings. Pure.

    Args:
        place: Of the link in each reading.
        zero: The time that is called 0.
    """
    # Two readings of one time tell no rate.
    kept = [one for one, then in itertools.pairwise(readings) if then.at > one.at]
    kept += readings[-1:]
    values = [
        (then.bytes[place] - one.bytes[place]) / (then.at - one.at)
        for one, then in itertools.pairwise(kept)
    ]
    edges = [one.at - zero for one in kept]
    return Rates(edges, values)


@asynccontextmanager
async def watching(read: Callable[[], tuple[int, ...]]) -> AsyncIterator[list[Reading]]:
    """Read counters again and again while the block runs, and at both of its ends.

    Args:
        read: Reads them.
    """
    readings = [Reading(time.monotonic(), read())]

    async def go_on() -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            readings.append(Reading(time.monotonic(), read()))

    task = asyncio.create_task(go_on())
    try:
        yield readings
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    readings.append(Reading(time.monotonic(), read()))


__all__ = ["INTERVAL_S", "Rates", "Reading", "rates", "watching"]
