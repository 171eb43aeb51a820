"""The statistics of `kvctl ping`."""

from __future__ import annotations

import random

import pytest

from kvstore_client.ctl import ping
from kvstore_client.ctl.ping import RoundTrips


def test_nothing_answered_has_no_figures() -> None:
    trips = RoundTrips()
    trips.failure("gone")
    assert (trips.sent, trips.answered, trips.error) == (1, 0, "gone")
    assert trips.summary_ms() is None
    assert not trips.all_answered


def test_no_ping_is_no_success() -> None:
    assert not RoundTrips().all_answered


def test_figures_of_many(seed: int) -> None:
    times_ms = list(range(1, 201))
    random.Random(seed).shuffle(times_ms)
    trips = RoundTrips()
    for time_ms in times_ms:
        trips.answer(time_ms / 1e3)
    assert trips.summary_ms() == {"min": 1.0, "avg": 100.5, "max": 200.0, "p99": 198.0}
    assert trips.all_answered
    trips.failure("gone")
    assert not trips.all_answered
    assert trips.summary_ms() == {"min": 1.0, "avg": 100.5, "max": 200.0, "p99": 198.0}


def test_one_is_all_figures() -> None:
    trips = RoundTrips()
    trips.answer(0.002)
    assert trips.summary_ms() == dict.fromkeys(("min", "avg", "max", "p99"), 2.0)


def test_memory_is_bounded_and_only_the_percentile_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ping, "SAMPLES_MAX", 2)
    trips = RoundTrips()
    for time_s in (9.0, 1.0, 2.0):
        trips.answer(time_s)
    assert trips.summary_ms() == {"min": 1e3, "avg": 4e3, "max": 9e3, "p99": 2e3}
