"""The highest rate at which a limit is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from kvstore_bench.emulate.search import PRECISION, TRIES_MAX, RateSearch


def search(first: float, limit: float) -> RateSearch:
    """Find what keeps to a limit that is sharp."""
    found = RateSearch(first)
    while (rate := found.next) is not None:
        found.tried(rate, rate <= limit)
    return found


@given(st.floats(0.05, 20), st.floats(0.5, 2))
def test_sharp_limit_is_found_closely(limit: float, guess: float) -> None:
    found = search(limit * guess, limit)
    assert found.kept <= limit < found.broken
    assert found.broken <= found.kept * PRECISION
    assert found.tries <= TRIES_MAX


@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_limit_that_is_never_or_always_kept_ends_the_search(limit: float) -> None:
    found = search(1.0, limit)
    assert found.tries == TRIES_MAX
    assert found.kept == 0 if limit == 0 else found.broken == math.inf


@given(st.lists(st.booleans(), min_size=TRIES_MAX, max_size=TRIES_MAX), st.floats(0.1, 10))
def test_chance_never_makes_bounds_that_contradict(kept: list[bool], first: float) -> None:
    found = RateSearch(first)
    for one in kept:
        rate = found.next
        if rate is None:
            return
        assert 0 < rate < math.inf
        found.tried(rate, one)
        assert found.kept < found.broken
