"""Water-filling: how much each path gets so that all end together; and how fast it may change.

Paths are vessels: the floor of each is when it can begin, its width the rate. Bytes are
poured in; the surface is the time at which all that got any are done. The same picture
divides power over channels (T. Cover and J. Thomas, "Elements of Information Theory", on
parallel Gaussian channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# The share that a relay gets stays this near to the average of what it was meant to get ...
BAND = 0.25
# ... which follows within a quarter of a second: some ten reports of a node that is busy. So
# that a share which was steady moves by at most a third from one report to the next, whatever
# that says, and clients that all hear of an idle node come slowly enough to hear of each other.
SHARE_TIME_CONSTANT_S = 0.25
# What a relay may carry of which nothing is known from the last second: half, the best that a
# first request can do with one other link as fast as ours.
FIRST_SHARE_MAX = 0.5
SHARE_MEMORY_S = 1.0


def fill(starts_s: Sequence[float], rates_Bps: Sequence[float], size_bytes: float) -> float:
    """The time at which all paths end.

    Args:
        starts_s: When each path can begin.
        rates_Bps: How fast each is; above zero.
        size_bytes: To be spread over them.
    """
    assert starts_s, "there is a path"
    level_s = 0.0
    rate_Bps = 0.0
    area_bytes = size_bytes
    for start_s, path_Bps in sorted(zip(starts_s, rates_Bps, strict=True)):
        if rate_Bps and start_s >= level_s:
            break
        rate_Bps += path_Bps
        area_bytes += start_s * path_Bps
        level_s = area_bytes / rate_Bps
    return level_s


class Shares:
    """What part of requests each relay was meant to carry lately, and how far it may move from
    there. One thread.

    The average is of what was wanted, not of what was given: limits that feed on themselves
    would ratchet shares down wherever queues come and go.
    """

    __slots__ = ("_averages",)

    def __init__(self) -> None:
        #: By relay: the average, and when it was last moved.
        self._averages: dict[str, tuple[float, float]] = {}

    def bound(
        self, now: float, names: Sequence[str], wanted: Sequence[float], commit: bool
    ) -> list[float]:
        """The parts of a request that relays may carry, near those that are wanted.

        Args:
            names: The relays.
            wanted: Their parts, from 0 to 1, together at most 1.
            commit: Whether the request will be sent, or this is only a question.

        Returns:
            As many parts, together at most 1.
        """
        parts = []
        for name, part in zip(names, wanted, strict=True):
            average, moved_at = self._averages.get(name, (0.0, -math.inf))
            elapsed_s = max(0.0, now - moved_at)
            if elapsed_s >= SHARE_MEMORY_S:
                part = average = min(part, FIRST_SHARE_MAX)
            else:
                average += (part - average) * (1.0 - math.exp(-elapsed_s / SHARE_TIME_CONSTANT_S))
                part = min(max(part, average - BAND), average + BAND)
            parts.append(part)
            if commit:
                self._averages[name] = (average, now)
        total = sum(parts)
        return [part / total for part in parts] if total > 1.0 else parts

    def forget(self, name: str) -> None:
        """A relay is used no more."""
        self._averages.pop(name, None)
