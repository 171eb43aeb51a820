"""Estimators behind load reports: rates, capacities and percentiles of what was observed.

Pure: `now` is in seconds of any monotonic clock. Memory is bounded, and every update takes
constant time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

# Long against the gaps between frames, short against a minute-long request: a rate that is
# one second old is what a selector can still act on.
RATE_TIME_CONSTANT_S = 1.0
# The kernel takes some megabytes at once whatever the link does; over 100 ms that is a small
# part of what a storage network moves.
CAPACITY_WINDOW_S = 0.1
# In seconds of being busy. Long, because a slow reader at the other end looks just like a slow
# link; finite, because a link that came back at half its speed must not be believed forever.
CAPACITY_TIME_CONSTANT_S = 300.0
# A p99 needs hundreds of samples; sorting this many takes less than 0.1 ms.
SAMPLES_MAX = 512
SAMPLES_WINDOW_S = 10.0


class RateEstimator:
    """An exponentially weighted average of bytes a second, for irregular arrivals.

    Each arrival of n bytes counts n / tau at once and fades with exp(-t / tau), so that the
    estimate is right on average for any spacing of the arrivals.

    Args:
        time_constant_s: tau; two thirds of a change show after this time.
    """

    __slots__ = ("_rate_Bps", "_time_constant_s", "_updated_at")

    def __init__(self, time_constant_s: float = RATE_TIME_CONSTANT_S) -> None:
        self._time_constant_s = time_constant_s
        self._rate_Bps = 0.0
        self._updated_at = -math.inf

    def add(self, now: float, size_bytes: int) -> None:
        """`size_bytes` were moved since the last call, or just now."""
        self._rate_Bps = self.rate_Bps(now) + size_bytes / self._time_constant_s
        self._updated_at = max(now, self._updated_at)

    def rate_Bps(self, now: float) -> float:
        """The rate as seen from `now`; falls by itself when nothing is added."""
        if self._rate_Bps == 0.0:
            return 0.0
        elapsed_s = max(0.0, now - self._updated_at)
        return self._rate_Bps * math.exp(-elapsed_s / self._time_constant_s)


class CapacityEstimator:
    """What a link can carry: the highest rate it has shown while it had something to send.

    An idle link says nothing, so only busy time counts. Windows of `CAPACITY_WINDOW_S` of
    uninterrupted busy time are judged: a faster one is believed at once, a slower one draws
    the estimate down with `CAPACITY_TIME_CONSTANT_S`.

    Attributes:
        capacity_Bps: The estimate; 0.0 is unknown.
    """

    __slots__ = ("_sent_bytes", "_window_s", "capacity_Bps")

    def __init__(self) -> None:
        self.capacity_Bps = 0.0
        self._window_s = 0.0
        self._sent_bytes = 0

    def add(self, elapsed_s: float, sent_bytes: int, busy: bool) -> None:
        """Take account of the time since the last call.

        Args:
            elapsed_s: Length of that time.
            sent_bytes: What was sent in it.
            busy: Whether bytes were waiting throughout.
        """
        if not busy:
            self._window_s = 0.0
            self._sent_bytes = 0
            return
        self._window_s += max(0.0, elapsed_s)
        self._sent_bytes += sent_bytes
        if self._window_s < CAPACITY_WINDOW_S:
            return
        rate_Bps = self._sent_bytes / self._window_s
        if rate_Bps > self.capacity_Bps:
            self.capacity_Bps = rate_Bps
        else:
            kept = math.exp(-self._window_s / CAPACITY_TIME_CONSTANT_S)
            self.capacity_Bps = rate_Bps + (self.capacity_Bps - rate_Bps) * kept
        self._window_s = 0.0
        self._sent_bytes = 0


class PercentileWindow:
    """Percentiles of the newest samples: at most `count_max`, at most `window_s` old.

    Nearest-rank percentiles (definition 1 in R. Hyndman and Y. Fan, "Sample Quantiles in
    Statistical Packages", The American Statistician 50(4), 1996): always a value that occurred.
    """

    __slots__ = ("_samples", "_window_s")

    def __init__(self, window_s: float = SAMPLES_WINDOW_S, count_max: int = SAMPLES_MAX) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float]] = deque(maxlen=count_max)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, now: float, value: float) -> None:
        """One more sample; the oldest goes when there are too many."""
        self._samples.append((now, value))

    def percentiles(self, now: float, shares: Sequence[float]) -> tuple[float, ...]:
        """The value at each of `shares` (0.99 for p99); zeros when there is no sample."""
        while self._samples and self._samples[0][0] < now - self._window_s:
            self._samples.popleft()
        if not self._samples:
            return (0.0,) * len(shares)
        values = sorted(value for _, value in self._samples)
        return tuple(values[max(0, math.ceil(share * len(values)) - 1)] for share in shares)
