"""Estimators: right on average, forgetting at the promised pace, bounded in memory."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from kvstore.rates import (
    CAPACITY_TIME_CONSTANT_S,
    CAPACITY_WINDOW_S,
    CapacityEstimator,
    PercentileWindow,
    RateEstimator,
)

MIB = 1024 * 1024


def test_rate_is_zero_before_anything_was_moved() -> None:
    assert RateEstimator().rate_Bps(5.0) == 0.0


@pytest.mark.parametrize("gap_s", [0.001, 0.02, 0.1])
def test_steady_stream_shows_its_rate_whatever_the_spacing(gap_s: float) -> None:
    rate = RateEstimator(time_constant_s=1.0)
    for n in range(round(20 / gap_s)):
        rate.add(n * gap_s, round(MIB * gap_s))
    # Just after an arrival the estimate is high by half an arrival's share.
    assert rate.rate_Bps(20.0) == pytest.approx(MIB, rel=gap_s)


def test_irregular_stream_shows_its_rate(seed: int) -> None:
    draws = random.Random(seed)
    rate = RateEstimator(time_constant_s=5.0)
    now, seen = 0.0, []
    for n in range(20_000):
        now += draws.expovariate(100.0)
        rate.add(now, 10_000)
        if n > 5_000:
            seen.append(rate.rate_Bps(now))
    assert sum(seen) / len(seen) == pytest.approx(1_000_000, rel=0.02)


def test_rate_fades_with_its_time_constant() -> None:
    rate = RateEstimator(time_constant_s=2.0)
    rate.add(10.0, 1000)
    assert rate.rate_Bps(10.0) == 500.0
    assert rate.rate_Bps(12.0) == pytest.approx(500.0 / math.e)
    assert rate.rate_Bps(100.0) < 1e-10
    # Asking changes nothing.
    assert rate.rate_Bps(12.0) == pytest.approx(500.0 / math.e)


@given(st.lists(st.tuples(st.floats(-1, 10), st.integers(0, 1 << 40)), max_size=50))
def test_rate_is_bounded_by_what_was_moved(arrivals: list[tuple[float, int]]) -> None:
    rate, now, total = RateEstimator(time_constant_s=0.5), 0.0, 0
    for elapsed_s, size_bytes in arrivals:
        now += elapsed_s  # even a clock that went backwards
        rate.add(now, size_bytes)
        total += size_bytes
        assert 0.0 <= rate.rate_Bps(now) <= total / 0.5 * (1 + 1e-9)


def busy_for(capacity: CapacityEstimator, duration_s: float, rate_Bps: float) -> None:
    for _ in range(round(duration_s / CAPACITY_WINDOW_S)):
        capacity.add(CAPACITY_WINDOW_S, round(rate_Bps * CAPACITY_WINDOW_S), busy=True)


def test_capacity_is_unknown_until_the_link_was_busy() -> None:
    capacity = CapacityEstimator()
    for _ in range(100):
        capacity.add(1.0, 100 * MIB, busy=False)
    assert capacity.capacity_Bps == 0.0


def test_capacity_is_the_highest_rate_while_busy() -> None:
    capacity = CapacityEstimator()
    busy_for(capacity, 1.0, 50 * MIB)
    busy_for(capacity, 0.1, 100 * MIB)
    assert capacity.capacity_Bps == pytest.approx(100 * MIB)


def test_burst_into_the_kernel_is_no_capacity() -> None:
    capacity = CapacityEstimator()
    capacity.add(0.001, 4 * MIB, busy=True)
    assert capacity.capacity_Bps == 0.0
    capacity.add(0.001, 0, busy=False)
    capacity.add(CAPACITY_WINDOW_S, 10 * MIB, busy=True)
    assert capacity.capacity_Bps == pytest.approx(10 * MIB / CAPACITY_WINDOW_S)


def test_busy_time_counts_only_without_interruption() -> None:
    capacity = CapacityEstimator()
    for _ in range(10):
        capacity.add(0.9 * CAPACITY_WINDOW_S, 10 * MIB, busy=True)
        capacity.add(10.0, 0, busy=False)
    assert capacity.capacity_Bps == 0.0


def test_idle_time_leaves_the_capacity_alone() -> None:
    capacity = CapacityEstimator()
    busy_for(capacity, 1.0, 100 * MIB)
    for _ in range(1000):
        capacity.add(60.0, MIB, busy=False)
    assert capacity.capacity_Bps == pytest.approx(100 * MIB)


def test_capacity_is_hardly_lowered_by_a_slow_reader_and_follows_a_slow_link() -> None:
    capacity = CapacityEstimator()
    busy_for(capacity, 1.0, 100 * MIB)
    busy_for(capacity, 5.0, 10 * MIB)
    assert capacity.capacity_Bps > 98 * MIB
    busy_for(capacity, 5 * CAPACITY_TIME_CONSTANT_S, 10 * MIB)
    assert capacity.capacity_Bps == pytest.approx(10 * MIB, rel=0.1)


def test_percentiles_of_nothing_are_zero() -> None:
    assert PercentileWindow().percentiles(0.0, (0.5, 0.99)) == (0.0, 0.0)


def test_percentiles_are_values_that_occurred() -> None:
    window = PercentileWindow()
    for value in random.Random(3).sample(range(1, 101), 100):
        window.add(0.0, float(value))
    assert window.percentiles(0.0, (0.0, 0.01, 0.5, 0.99, 1.0)) == (1.0, 1.0, 50.0, 99.0, 100.0)
    single = PercentileWindow()
    single.add(0.0, 7.5)
    assert single.percentiles(0.0, (0.5, 0.99)) == (7.5, 7.5)


def test_samples_leave_by_age() -> None:
    window = PercentileWindow(window_s=10.0)
    window.add(0.0, 100.0)
    window.add(5.0, 1.0)
    assert window.percentiles(10.0, (1.0,)) == (100.0,)
    assert window.percentiles(10.1, (1.0,)) == (1.0,)
    assert window.percentiles(15.1, (1.0,)) == (0.0,)


def test_samples_leave_by_number() -> None:
    window = PercentileWindow(count_max=8)
    for value in range(1000):
        window.add(0.0, float(value))
    assert len(window) == 8
    assert window.percentiles(0.0, (0.0, 1.0)) == (992.0, 999.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=100), st.floats(0, 1))
def test_at_least_its_share_of_samples_is_at_most_a_percentile(
    values: list[float], share: float
) -> None:
    window = PercentileWindow(count_max=len(values))
    for value in values:
        window.add(0.0, value)
    (percentile,) = window.percentiles(0.0, (share,))
    assert percentile in values
    assert sum(value <= percentile for value in values) >= share * len(values)
    assert sum(value < percentile for value in values) <= share * len(values)
