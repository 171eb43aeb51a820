"""Leases of storage that an agent holds for engines of its node."""

from __future__ import annotations

import pytest

from kvstore.errors import LimitExceeded
from kvstore_client.agent import leases
from kvstore_client.agent.leases import PassedLeases
from kvstore_client.handles import Lease


class Counted(dict):  # type: ignore[type-arg]
    """Counts who walks over all entries."""

    walks = 0

    def items(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().items()


def lease(number: int) -> Lease:
    return Lease("node", number)


def test_each_ends_at_its_time_in_whatever_order_they_were_added() -> None:
    passed = PassedLeases()
    numbers = {end: passed.add("owner", [lease(end)], float(end)) for end in (3, 1, 4, 2)}
    passed.expire(0.9)
    assert len(passed) == 4
    passed.expire(2.0)
    assert len(passed) == 2
    assert passed.take(numbers[2], "owner") == ()
    assert passed.take(numbers[3], "other") == ()
    assert passed.take(numbers[3], "owner") == [lease(3)]
    assert passed.take_all("owner") == [lease(4)]
    passed.expire(10.0)
    assert len(passed) == 0


def test_a_look_at_the_clock_walks_over_no_leases() -> None:
    passed = PassedLeases()
    passed._passed = counted = Counted()
    for end in range(100):
        passed.add("owner", [lease(end)], 100.0 + end)
    for now in range(100):
        passed.expire(float(now))
    assert counted.walks == 0
    assert len(passed) == 100


def test_what_is_given_back_early_is_forgotten() -> None:
    passed = PassedLeases()
    for number in range(10 * leases.STALE_ENTRIES_MAX):
        taken = passed.take(passed.add("owner", [lease(number)], 1e9), "owner")
        assert taken == [lease(number)]
    assert len(passed._ends) <= leases.STALE_ENTRIES_MAX + 2


def test_there_is_room_again_when_leases_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES_MAX", 2)
    passed = PassedLeases()
    for end in (1.0, 2.0):
        passed.check_room(0.0)
        passed.add("owner", [], end)
    with pytest.raises(LimitExceeded):
        passed.check_room(0.5)
    passed.check_room(1.0)
    assert len(passed) == 1
