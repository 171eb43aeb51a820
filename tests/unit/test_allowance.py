"""So much in a second: what is granted, what is saved, what is not."""

from __future__ import annotations

import pytest

from kvstore.allowance import Allowance


def test_a_burst_is_granted_and_then_what_grows() -> None:
    allowance = Allowance(per_second=2, most=3)
    assert [allowance.take(0.0, 1) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [allowance.take(1.0, 1) for _ in range(4)] == [True] * 2 + [False] * 2
    assert not allowance.take(1.25, 1)
    assert allowance.take(1.5, 1), "halves add up"


def test_no_more_is_saved_than_the_most() -> None:
    allowance = Allowance(per_second=2, most=3)
    assert allowance.take(1000.0, 3)
    assert not allowance.take(1000.0, 0.1)


@pytest.mark.parametrize("amount", [4, 3.1])
def test_what_is_not_granted_costs_nothing(amount: float) -> None:
    allowance = Allowance(per_second=2, most=3)
    assert not allowance.take(0.0, amount)
    assert allowance.take(0.0, 3)


def test_a_clock_that_goes_back_grants_nothing() -> None:
    allowance = Allowance(per_second=2, most=3)
    assert allowance.take(10.0, 3)
    assert not allowance.take(5.0, 1)
    assert allowance.take(6.0, 2)
