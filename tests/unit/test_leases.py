"""Leases end when they are released, when their time is over, or with their owner."""

from __future__ import annotations

import pytest

from kvstore_daemon.engine import leases
from kvstore_daemon.engine.leases import LeaseTable


def ended(result: list[object]) -> list[list[int]]:
    return [list(slots) for slots in result]  # type: ignore[call-overload]


def test_a_lease_holds_until_it_is_released() -> None:
    table = LeaseTable(1000)
    number = table.grant("me", [3, 4], 10, ends_at=10.0)
    assert number > 0
    assert table.slots() == [3, 4]
    slots = table.release(number, "me", now=9.9)
    assert slots is not None
    assert list(slots) == [3, 4]
    assert table.release(number, "me", now=9.9) is None
    assert len(table) == table.block_count == 0


def test_a_lease_ends_by_itself_and_releasing_it_then_says_so() -> None:
    table = LeaseTable(1000)
    late = table.grant("me", [1], 10, ends_at=20.0)
    early = table.grant("me", [2, 3], 10, ends_at=10.0)
    assert table.expire(9.9) == []
    assert table.release(early, "me", now=10.0) is None
    assert ended(table.expire(10.0)) == [[2, 3]]
    assert table.expire(10.0) == []
    assert table.release(early, "me", now=10.0) is None
    assert table.release(late, "me", now=10.0) is not None
    assert table.expire(99.0) == []


def test_only_the_owner_releases() -> None:
    table = LeaseTable(1000)
    number = table.grant("me", [1], 10, ends_at=10.0)
    assert table.release(number, "you", now=0.0) is None
    assert table.release(number + 1, "me", now=0.0) is None
    assert table.release(number, "me", now=0.0) is not None


def test_leases_end_with_their_owner() -> None:
    table = LeaseTable(1000)
    table.grant("me", [1], 10, ends_at=10.0)
    kept = table.grant("you", [1, 2], 10, ends_at=10.0)
    table.grant("me", [2], 10, ends_at=10.0)
    assert ended(table.owner_gone("me")) == [[1], [2]]
    assert table.owner_gone("me") == []
    assert table.slots() == [1, 2]
    assert table.release(kept, "you", now=0.0) is not None


def test_an_owner_has_a_limited_number_of_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES_PER_OWNER_MAX", 2)
    table = LeaseTable(1000)
    first = table.grant("me", [1], 10, ends_at=10.0)
    assert table.grant("me", [2], 10, ends_at=10.0)
    assert table.grant("me", [3], 10, ends_at=10.0) == 0
    assert table.grant("you", [3], 10, ends_at=10.0)
    table.release(first, "me", now=0.0)
    assert table.grant("me", [3], 10, ends_at=10.0)


def test_an_owner_has_a_limited_number_of_leased_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASED_BLOCKS_PER_OWNER_MAX", 4)
    table = LeaseTable(1000)
    assert table.grant("me", [1, 2, 3], 10, ends_at=10.0)
    assert table.grant("me", [4, 5], 10, ends_at=11.0) == 0
    assert table.grant("me", [4], 10, ends_at=11.0)
    table.expire(10.0)
    assert table.grant("me", [1, 2, 3], 10, ends_at=20.0)
    assert table.block_count == 4


def test_an_owner_has_a_limited_number_of_leased_bytes() -> None:
    table = LeaseTable(1000)
    first = table.grant("me", [1, 2], 600, ends_at=10.0)
    assert table.grant("me", [3], 401, ends_at=10.0) == 0
    assert table.grant("you", [3], 1000, ends_at=10.0)
    assert table.grant("me", [3], 400, ends_at=10.0)
    assert table.grant("me", [4], 1, ends_at=10.0) == 0
    table.release(first, "me", now=0.0)
    assert table.grant("me", [1, 2], 600, ends_at=10.0)
    table.owner_gone("me")
    assert table.grant("me", [1, 2], 1000, ends_at=10.0)


def test_a_refused_owner_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASED_BLOCKS_PER_OWNER_MAX", 0)
    table = LeaseTable(1000)
    for number in range(10):
        assert table.grant(number, [1], 10, ends_at=10.0) == 0
    assert not table._owners


def test_released_leases_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "STALE_ENTRIES_MAX", 10)
    table = LeaseTable(1000)
    kept = table.grant("me", [7], 10, ends_at=5.0)
    for _ in range(1000):
        table.release(table.grant("me", [1], 10, ends_at=60.0), "me", now=0.0)
    assert len(table._ends) <= 14
    assert ended(table.expire(5.0)) == [[7]]
    assert table.release(kept, "me", now=5.0) is None
