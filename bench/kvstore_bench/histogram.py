"""Latencies, counted in buckets whose width grows with the value. Pure.

The buckets are those of fio (stat.h, "plat"): below 128 each value has its own; above, every
power of two is cut into 64 equal parts, so that a bucket is at most 1/64 of its values wide.

::

    value   = 1 b b b b b b x x x x      1: highest bit, b: the bucket, x: cut off
    bucket  = 64 * (number of x, plus 1) + bbbbbb
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

SUB_BUCKET_BITS = 6
SUB_BUCKETS = 1 << SUB_BUCKET_BITS
# 2^40 ns are 18 minutes, above any deadline; what takes longer counts as this much.
VALUE_MAX = (1 << 40) - 1
BUCKET_COUNT = (40 - SUB_BUCKET_BITS + 1) * SUB_BUCKETS

#: The percentiles that fio prints.
PERCENTILES = (
    *(1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0),
    *(95.0, 99.0, 99.5, 99.9, 99.95, 99.99),
)


def bucket_of(value: int) -> int:
    """Index of the bucket of a value from 0 to `VALUE_MAX`."""
    cut_bits = value.bit_length() - SUB_BUCKET_BITS - 1
    if cut_bits <= 0:
        return value
    return (cut_bits << SUB_BUCKET_BITS) + (value >> cut_bits)


def bucket_range(bucket: int) -> tuple[int, int]:
    """The values of a bucket, `[first, last)`."""
    cut_bits = (bucket >> SUB_BUCKET_BITS) - 1
    if cut_bits <= 0:
        return bucket, bucket + 1
    first = (SUB_BUCKETS + bucket % SUB_BUCKETS) << cut_bits
    return first, first + (1 << cut_bits)


class Snapshot(msgspec.Struct, frozen=True):
    """A histogram as it travels between processes; sums are exact."""

    count: int
    minimum: int
    maximum: int
    total: int
    squares: int
    buckets: dict[int, int]


class Histogram:
    """Counts of values, with exact count, minimum, maximum, mean and deviation.

    Bounded: `BUCKET_COUNT` numbers whatever is recorded.
    """

    __slots__ = ("_buckets", "count", "maximum", "minimum", "squares", "total")

    def __init__(self) -> None:
        self.count = 0
        self.minimum = VALUE_MAX
        self.maximum = 0
        self.total = 0
        self.squares = 0
        self._buckets = [0] * BUCKET_COUNT

    def record(self, value: int) -> None:
        """Count a value; negative ones count as 0, too large ones as `VALUE_MAX`."""
        value = 0 if value < 0 else min(value, VALUE_MAX)
        self.count += 1
        self.total += value
        self.squares += value * value
        if value < self.minimum:
            self.minimum = value
        if value > self.maximum:
            self.maximum = value
        self._buckets[bucket_of(value)] += 1

    def merge(self, other: Snapshot) -> None:
        """Count everything that another one counted."""
        if not other.count:
            return
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        for bucket, count in other.buckets.items():
            self._buckets[bucket] += count

    def snapshot(self) -> Snapshot:
        """Everything that was counted, as a value."""
        return Snapshot(
            self.count, self.minimum, self.maximum, self.total, self.squares, dict(self._filled())
        )

    @property
    def mean(self) -> float:
        """Exact mean, 0 if nothing was counted."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample, 0 below two values."""
        if self.count < 2:
            return 0.0
        # Integers, so that nothing cancels out: n * sum(x^2) - sum(x)^2.
        spread = self.count * self.squares - self.total * self.total
        return math.sqrt(spread / (self.count * (self.count - 1)))

    def percentile(self, percent: float) -> int:
        """The value that `percent` of the values do not exceed, to half a bucket.

        Off by at most 1/128 of the value, and never outside of minimum and maximum.
        """
        if not self.count:
            return 0
        rank = max(1, math.ceil(percent * self.count / 100))
        seen = 0
        for bucket, count in self._filled():
            seen += count
            if seen >= rank:
                first, last = bucket_range(bucket)
                return max(self.minimum, min(self.maximum, (first + last - 1) // 2))
        return self.maximum

    def bins(self) -> dict[int, int]:
        """Count of each filled bucket, by the value in its middle."""
        middles = {bucket: sum(bucket_range(bucket)) // 2 for bucket, _ in self._filled()}
        return {middles[bucket]: count for bucket, count in self._filled()}

    def _filled(self) -> Iterator[tuple[int, int]]:
        return ((bucket, count) for bucket, count in enumerate(self._buckets) if count)
