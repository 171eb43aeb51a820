"""Latency histograms beside the exact numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kvstore_bench.histogram import (
    BUCKET_COUNT,
    PERCENTILES,
    SUB_BUCKETS,
    VALUE_MAX,
    Histogram,
    bucket_of,
    bucket_range,
)

values = st.lists(st.integers(0, VALUE_MAX) | st.integers(0, 5000), min_size=1, max_size=300)


def filled(numbers: list[int]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.record(number)
    return histogram


def test_buckets_follow_each_other_without_gap() -> None:
    edges = [bucket_range(bucket) for bucket in range(BUCKET_COUNT)]
    assert edges[0][0] == 0
    assert edges[-1][1] == VALUE_MAX + 1
    assert all(left[1] == right[0] for left, right in pairwise(edges))


def test_buckets_are_at_most_a_64th_of_their_values_wide() -> None:
    for bucket in range(BUCKET_COUNT):
        first, last = bucket_range(bucket)
        assert bucket_of(first) == bucket_of(last - 1) == bucket
        assert last - first == 1 or (last - first) * SUB_BUCKETS <= first


@given(values)
def test_percentiles_agree_with_numpy_within_half_a_bucket(numbers: list[int]) -> None:
    histogram = filled(numbers)
    for percent in PERCENTILES:
        exact = int(np.percentile(numbers, percent, method="inverted_cdf"))
        assert abs(histogram.percentile(percent) - exact) <= exact / (2 * SUB_BUCKETS)


@given(values)
def test_moments_are_exact(numbers: list[int]) -> None:
    histogram = filled(numbers)
    assert (histogram.minimum, histogram.maximum) == (min(numbers), max(numbers))
    assert histogram.mean == pytest.approx(np.mean(numbers), rel=1e-12)
    if len(numbers) > 1:
        spread = float(np.std([float(number) for number in numbers], ddof=1))
        assert histogram.deviation == pytest.approx(spread, rel=1e-6, abs=1e-3)


@given(values, values)
def test_merging_is_the_same_as_counting_in_one(left: list[int], right: list[int]) -> None:
    merged = filled(left)
    merged.merge(filled(right).snapshot())
    assert merged.snapshot() == filled(left + right).snapshot()


def test_merging_nothing_changes_nothing() -> None:
    histogram = filled([7])
    histogram.merge(Histogram().snapshot())
    assert histogram.snapshot() == filled([7]).snapshot()


def test_what_is_out_of_range_counts_at_the_edge() -> None:
    histogram = filled([-5, VALUE_MAX * 4])
    assert (histogram.minimum, histogram.maximum) == (0, VALUE_MAX)


def test_an_empty_histogram_has_zeros() -> None:
    histogram = Histogram()
    assert (histogram.mean, histogram.deviation, histogram.percentile(50)) == (0, 0, 0)
    assert histogram.bins() == {}


def test_bins_count_everything() -> None:
    histogram = filled([1, 1, 1000, 1_000_000])
    assert sum(histogram.bins().values()) == 4
    assert histogram.bins()[1] == 2
