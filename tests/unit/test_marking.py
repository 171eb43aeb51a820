"""Markings: their ranges, and that those of relay traffic are ones that wait."""

from __future__ import annotations

import re

import pytest

from kvstore.errors import ConfigError
from kvstore.transport import RELAY_MARKING, Marking
from kvstore.transport.marking import DSCP_MAX, PRIORITY_MAX


@pytest.mark.parametrize("priority", [0, PRIORITY_MAX])
@pytest.mark.parametrize("dscp", [0, DSCP_MAX])
def test_ends_of_the_ranges_are_allowed(priority: int, dscp: int) -> None:
    marking = Marking(priority, dscp)
    assert (marking.priority, marking.dscp) == (priority, dscp)


@pytest.mark.parametrize(
    ("priority", "dscp", "named"),
    [
        (-1, 0, "priority=-1: must be a whole number from 0 to 6"),
        (7, 0, "priority=7: must be a whole number from 0 to 6"),
        (0, -1, "dscp=-1: must be a whole number from 0 to 63"),
        (0, 64, "dscp=64: must be a whole number from 0 to 63"),
    ],
)
def test_what_is_out_of_range_is_named(priority: int, dscp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(named)}$") as caught:
        Marking(priority, dscp)
    assert caught.value.option == named.partition("=")[0]


def test_markings_of_equal_values_are_equal_and_never_change() -> None:
    assert Marking(1, 2) == Marking(1, 2)
    assert Marking(1, 2) != Marking(1, 3)
    with pytest.raises(AttributeError):
        Marking(1, 2).priority = 3  # type: ignore[misc]


def test_relays_wait_for_what_has_no_mark() -> None:
    # TC_PRIO_BULK of linux/pkt_sched.h, and the code point that RFC 8622 assigns.
    assert Marking(2, 0b000001) == RELAY_MARKING
