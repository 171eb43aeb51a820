"""How fast a job was from half second to half second, as fio's `bw_min`, `bw_dev` and so on. Pure.

Windows are those of the monotonic clock, which all processes of a host share, so that what the
clones of a job did in the same half second adds up. The first and the last window of a run are not
whole and do not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec

# As fio's bwavgtime.
WINDOW_NS = 500_000_000
# Bounds what a run of days keeps: windows become twice as long when there are more.
WINDOWS_MAX = 2048


class Windows(msgspec.Struct):
    """Bytes and I/Os that ended in each window, by its number.

    Attributes:
        width_ns: How long windows are.
    """

    width_ns: int = WINDOW_NS
    counts: dict[int, tuple[int, int]] = {}

    def record(self, at_ns: int, size_bytes: int) -> None:
        """An I/O has ended."""
        number = at_ns // self.width_ns
        bytes_so_far, ios = self.counts.get(number, (0, 0))
        self.counts[number] = (bytes_so_far + size_bytes, ios + 1)
        if len(self.counts) > WINDOWS_MAX:
            self.widen(2 * self.width_ns)

    def widen(self, width_ns: int) -> None:
        """Make windows longer, by a whole factor."""
        factor = width_ns // self.width_ns
        old, self.counts, self.width_ns = self.counts, {}, width_ns
        for number, (size_bytes, ios) in old.items():
            self._add(number // factor, size_bytes, ios)

    def merge(self, other: Windows) -> None:
        """Count what another clone did."""
        if other.width_ns > self.width_ns:
            self.widen(other.width_ns)
        factor = self.width_ns // other.width_ns
        for number, (size_bytes, ios) in other.counts.items():
            self._add(number // factor, size_bytes, ios)

    def _add(self, number: int, size_bytes: int, ios: int) -> None:
        before = self.counts.get(number, (0, 0))
        self.counts[number] = (before[0] + size_bytes, before[1] + ios)

    def rates(self) -> list[tuple[float, float]]:
        """(bytes, I/Os) a second in each whole window, in order; those without any are zeros."""
        if not self.counts:
            return []
        seconds = self.width_ns / 1e9
        whole = range(min(self.counts) + 1, max(self.counts))
        found = (self.counts.get(number, (0, 0)) for number in whole)
        return [(size_bytes / seconds, ios / seconds) for size_bytes, ios in found]


class Spread(msgspec.Struct, frozen=True):
    """What fio says of samples; zeros without any."""

    minimum: float = 0.0
    maximum: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0


def spread(values: Iterable[float]) -> Spread:
    """Of some samples."""
    known = list(values)
    if not known:
        return Spread()
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Spread(min(known), max(known), statistics.fmean(known), deviation, len(known))


__all__ = ["WINDOWS_MAX", "WINDOW_NS", "Spread", "Windows", "spread"]
