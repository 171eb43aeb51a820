"""Half seconds of a run."""

from __future__ import annotations

import msgspec
import pytest

from kvstore_bench.sampling import WINDOW_NS, WINDOWS_MAX, Windows, spread


def filled(*ends: tuple[float, int]) -> Windows:
    windows = Windows()
    for at_s, size_bytes in ends:
        windows.record(int(at_s * 1e9), size_bytes)
    return windows


def test_the_first_and_the_last_window_are_not_whole() -> None:
    windows = filled((10.2, 7), (10.6, 100), (10.9, 50), (11.7, 20), (12.1, 9))
    # From 10.5 to 12: two, none, one.
    assert windows.rates() == [(300.0, 4.0), (0.0, 0.0), (40.0, 2.0)]
    assert filled((10.2, 7)).rates() == filled().rates() == []


def test_clones_add_up_window_by_window() -> None:
    merged = filled((1.0, 1), (1.6, 10), (2.1, 1))
    merged.merge(filled((1.7, 20), (2.6, 1)))
    assert merged.rates() == [(60.0, 4.0), (2.0, 2.0)]


def test_a_long_run_has_longer_windows_and_loses_nothing() -> None:
    windows = Windows()
    for number in range(2 * WINDOWS_MAX + 1):
        windows.record(number * WINDOW_NS, 1)
    assert windows.width_ns == 4 * WINDOW_NS
    assert len(windows.counts) <= WINDOWS_MAX
    assert sum(size_bytes for size_bytes, _ in windows.counts.values()) == 2 * WINDOWS_MAX + 1


@pytest.mark.parametrize("swapped", [False, True])
def test_clones_with_other_windows_add_up_too(swapped: bool) -> None:
    short, long = filled((1.0, 1), (1.6, 10), (4.1, 1)), filled((2.2, 5))
    long.widen(2 * WINDOW_NS)
    one, other = (long, short) if swapped else (short, long)
    one.merge(other)
    assert one.width_ns == 2 * WINDOW_NS
    assert one.counts == {1: (11, 2), 2: (5, 1), 4: (1, 1)}


def test_windows_travel_between_processes() -> None:
    windows = filled((1.0, 1), (1.6, 10))
    assert msgspec.json.decode(msgspec.json.encode(windows), type=Windows) == windows


def test_a_spread_is_of_samples() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert (found.minimum, found.maximum, found.mean, found.count) == (1.0, 6.0, 3.0, 3)
    assert found.deviation == pytest.approx(7**0.5)
    assert (spread([]).count, spread([4.0]).deviation) == (0, 0.0)
