"""What the agent keeps for engines and peers: attempts, claims, ends, bounds."""

from __future__ import annotations

import random

import pytest

from kvstore_client import Namespace
from kvstore_client.agent import retention
from kvstore_client.agent.memory import PAGE_BYTES, BlockPool, HeldBlock
from kvstore_client.agent.retention import Retentions
from tests.support.engine import key, layout

ONE = Namespace("pool", layout(PAGE_BYTES))
ENGINE, OTHER = object(), object()


class Bed:
    """A pool of some pages, and what is kept in it."""

    def __init__(self, pages: int = 20) -> None:
        self.pool = BlockPool(memoryview(bytearray(pages * PAGE_BYTES)))
        self.kept = Retentions(self.pool)

    def block(self, number: int) -> HeldBlock:
        block = self.pool.reserve(ONE, key(number))
        assert block is not None
        return block

    def blocks(self, *numbers: int) -> list[HeldBlock]:
        return [self.block(number) for number in numbers]

    def retain(self, name: str, attempt: int, *numbers: int, ends_at: float = 10.0) -> bool:
        return self.kept.retain(name, attempt, self.blocks(*numbers), ends_at)

    def claim(
        self, name: str, attempt: int, owner: object = ENGINE, lease_s: float = 5.0, now: float = 0
    ) -> int:
        claimed = self.kept.claim(name, attempt, owner, lease_s, now)
        return 0 if claimed is None else claimed.number

    def leased(self) -> list[int]:
        found = [(n, self.pool.find(ONE.id, key(n))) for n in range(40)]
        return [n for n, block in found if block is not None and block.leases]

    def check(self) -> None:
        self.pool.check()
        self.kept.check()


@pytest.fixture
def bed() -> Bed:
    return Bed()


def test_what_is_retained_stays_until_its_time_is_over(bed: Bed) -> None:
    assert bed.kept.next_end is None
    assert bed.retain("r", 0, 1, 2)
    assert bed.leased() == [1, 2]
    assert bed.kept.next_end == 10.0
    assert (bed.kept.block_count, bed.kept.request_count) == (2, 1)
    assert not bed.claim("r", 0, now=10.0), "its time is over, whether or not it was swept"
    bed.kept.expire(9.9)
    assert bed.leased() == [1, 2]
    bed.kept.expire(10.0)
    assert bed.leased() == []
    assert bed.kept.next_end is None
    assert bed.kept.counters == {"retentions_expired": 1, "claims_missed": 1}
    assert not bed.claim("r", 0, now=10.0)
    bed.check()


def test_the_same_attempt_adds_blocks_and_prolongs(bed: Bed) -> None:
    bed.retain("r", 3, 1, ends_at=10)
    bed.retain("r", 3, 1, 2, ends_at=12)
    bed.retain("r", 3, 3, ends_at=8)
    assert bed.kept.next_end == 12
    bed.kept.expire(11)
    assert bed.leased() == [1, 2, 3]
    bed.check()


def test_a_newer_attempt_ends_the_older_and_an_older_keeps_nothing(bed: Bed) -> None:
    assert bed.retain("r", 1, 1, 2)
    assert bed.retain("s", 1, 5)
    assert bed.retain("r", 2, 2, 3)
    assert bed.leased() == [2, 3, 5]
    assert not bed.retain("r", 1, 4)
    assert bed.leased() == [2, 3, 5]
    assert not bed.claim("r", 1)
    assert bed.claim("r", 2)
    bed.check()


def test_an_older_attempt_keeps_nothing_after_the_newer_has_ended(bed: Bed) -> None:
    bed.retain("r", 2, 1)
    bed.kept.expire(10)
    assert not bed.retain("r", 1, 1)
    assert bed.retain("r", 2, 1), "nobody has claimed it yet"
    bed.check()


def test_a_claim_is_repeated_alike_and_others_get_nothing(bed: Bed) -> None:
    bed.retain("r", 0, 1, 2)
    claimed = bed.kept.claim("r", 0, ENGINE, 5.0, 1.0)
    assert claimed is not None
    assert claimed.number > 0
    assert claimed.blocks == bed.blocks(1, 2)
    assert bed.kept.claim("r", 0, ENGINE, 5.0, 2.0) == claimed
    assert bed.kept.next_end == 7.0, "counted from the claim that was answered last"
    assert not bed.claim("r", 0, OTHER)
    assert not bed.claim("r", 1)
    assert not bed.claim("s", 0)
    assert bed.kept.counters == {"claims": 1, "claims_missed": 3}
    bed.check()


def test_a_claim_ends_sooner_than_the_retention_would_have(bed: Bed) -> None:
    bed.retain("r", 0, 1, ends_at=60)
    assert bed.claim("r", 0, lease_s=5, now=1)
    assert bed.kept.next_end == 6
    bed.kept.expire(6)
    assert bed.leased() == []
    assert bed.kept.counters["retentions_expired"] == 0
    bed.check()


def test_blocks_that_come_later_are_claimed_too(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    number = bed.claim("r", 0, lease_s=5)
    assert bed.retain("r", 0, 2, ends_at=100)
    claimed = bed.kept.claim("r", 0, ENGINE, 5, 0)
    assert claimed is not None
    assert claimed.blocks == bed.blocks(1, 2)
    assert bed.kept.next_end == 5, "what the storage side asks for prolongs no claim"
    assert bed.kept.release(number, ENGINE)
    assert bed.leased() == []
    bed.check()


def test_only_who_has_claimed_gives_back_and_once(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    number = bed.claim("r", 0)
    assert not bed.kept.release(number, OTHER)
    assert not bed.kept.release(number + 1, ENGINE)
    assert not bed.kept.release(0, ENGINE)
    assert bed.kept.release(number, ENGINE)
    assert not bed.kept.release(number, ENGINE)
    assert bed.leased() == []
    bed.check()


def test_a_straggler_of_what_was_given_back_keeps_nothing(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    bed.kept.release(bed.claim("r", 0), ENGINE)
    assert not bed.retain("r", 0, 2)
    assert bed.leased() == []
    assert bed.retain("r", 1, 2)
    bed.check()


def test_a_newer_attempt_leaves_the_engine_what_it_has_claimed(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    number = bed.claim("r", 0)
    bed.retain("r", 1, 2)
    assert bed.leased() == [1, 2]
    newer = bed.claim("r", 1)
    assert newer not in (0, number)
    assert bed.kept.release(number, ENGINE)
    assert bed.leased() == [2]
    assert not bed.claim("r", 0)
    bed.check()


def test_an_engine_that_is_gone_holds_nothing(bed: Bed) -> None:
    for name, number, owner in (("r", 1, ENGINE), ("s", 2, ENGINE), ("t", 3, OTHER)):
        bed.retain(name, 0, number)
        bed.claim(name, 0, owner)
    bed.retain("u", 0, 4)
    bed.kept.owner_gone(ENGINE)
    bed.kept.owner_gone(ENGINE)
    assert bed.leased() == [3, 4]
    bed.check()


def test_done_ends_what_nobody_has_claimed(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    bed.retain("s", 0, 2)
    bed.claim("s", 0)
    for name in ("r", "s", "t"):
        bed.kept.done(name)
    assert bed.leased() == [2]
    bed.check()


def test_a_block_of_two_requests_stays_for_the_second(bed: Bed) -> None:
    bed.retain("r", 0, 1, 2, ends_at=5)
    bed.retain("s", 0, 2, 3, ends_at=9)
    bed.kept.expire(5)
    assert bed.leased() == [2, 3]
    bed.check()


def test_what_was_dropped_is_kept_for_nobody(bed: Bed) -> None:
    bed.retain("r", 0, 1, 2)
    bed.retain("s", 0, 1)
    block = bed.block(1)
    bed.kept.offer(block, 20)
    bed.pool.pin(block)
    bed.pool.drop(block)
    bed.kept.block_dropped(block)
    assert block.leases == 0
    assert bed.kept.block_count == 1
    claimed = bed.kept.claim("r", 0, ENGINE, 5, 0)
    assert claimed is not None
    assert claimed.blocks == bed.blocks(2)
    assert not bed.kept.offer(block, 20)
    assert bed.kept.retain("r", 0, [block], 20)
    assert block.leases == 0
    bed.check()


def test_half_of_the_pool_is_kept_at_most(bed: Bed) -> None:
    assert bed.retain("r", 0, *range(8))
    assert not bed.retain("s", 0, *range(5, 12))
    assert bed.leased() == list(range(10)), "as many as there is room for, the first ones"
    assert bed.kept.counters["retentions_refused"] == 1
    assert not bed.kept.offer(bed.block(11), 10)
    assert bed.kept.offer(bed.block(3), 10), "it is kept anyway"
    assert not bed.kept.has_room(1)
    bed.check()
    bed.kept.done("r")
    assert bed.leased() == [3, 5, 6, 7, 8, 9]
    assert bed.kept.has_room(4 * PAGE_BYTES)
    assert not bed.kept.has_room(5 * PAGE_BYTES)
    assert bed.retain("s", 0, 11)
    bed.check()


def test_offers_are_kept_one_by_one(bed: Bed) -> None:
    for number, ends_at in ((1, 5.0), (2, 6.0), (1, 7.0), (1, 6.5)):
        assert bed.kept.offer(bed.block(number), ends_at)
    bed.kept.expire(5)
    assert bed.leased() == [1, 2]
    bed.kept.expire(6)
    assert bed.leased() == [1]
    assert bed.kept.next_end == 7
    bed.kept.expire(7)
    assert bed.leased() == []
    assert not bed.kept.counters, "no request has missed anything"
    bed.check()


def test_requests_are_bounded(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "REQUESTS_MAX", 3)
    for name in "rst":
        assert bed.retain(name, 0, 1)
    bed.claim("r", 0)
    assert not bed.retain("r", 1, 1), "what is claimed counts until it is given back"
    assert not bed.retain("u", 0, 1)
    assert bed.retain("s", 0, 2)
    bed.kept.done("s")
    assert bed.retain("u", 0, 1)
    bed.check()


def test_the_memory_of_attempts_is_bounded(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ENDED_REQUESTS_MAX", 3)
    bed.retain("held", 5, 9)
    for name in "rstu":
        bed.retain(name, 5, 1)
        bed.kept.done(name)
    assert bed.retain("r", 1, 1), "forgotten"
    assert not bed.retain("u", 1, 1)
    assert not bed.retain("held", 4, 1), "not while it holds something"
    bed.check()


def test_prolonging_does_not_grow_without_end(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "STALE_ENTRIES_MAX", 4)
    for second in range(1, 100):
        bed.retain("r", 0, 1, ends_at=float(second))
        bed.kept.offer(bed.block(2), float(second))
        assert len(bed.kept._ends) <= 8
        bed.check()
    assert bed.kept.next_end == 99


def test_who_waits_for_room_is_told_when_a_hold_ends(bed: Bed) -> None:
    bed.retain("r", 0, 1)
    for number in range(2, 21):
        bed.pool.pin(bed.block(number))
    assert bed.pool.reserve(ONE, key(30)) is None
    told = []
    bed.pool.on_room = lambda: told.append(bed.check())
    bed.kept.expire(10)
    assert len(told) == 1


def test_the_books_agree_whatever_happens() -> None:
    draw = random.Random(3)
    bed = Bed(12)
    now = 0.0
    numbers: list[int] = []
    for _ in range(3000):
        name, attempt = draw.choice("rst"), draw.randrange(4)
        owner = draw.choice([ENGINE, OTHER])
        blocks = [draw.randrange(8) for _ in range(draw.randrange(4))]
        match draw.randrange(9):
            case 0 | 1 | 2:
                bed.retain(name, attempt, *blocks, ends_at=now + draw.random() * 9)
            case 3:
                if number := bed.claim(name, attempt, owner, draw.random() * 9, now):
                    numbers.append(number)
            case 4 if numbers:
                bed.kept.release(draw.choice(numbers), owner)
            case 5:
                bed.kept.offer(bed.block(draw.randrange(8)), now + draw.random() * 9)
            case 6:
                bed.pool.drop(bed.block(draw.randrange(8)))
            case 7:
                now += draw.random()
                bed.kept.expire(now)
                assert (bed.kept.next_end or now + 1) > now
            case 8:
                draw.choice([bed.kept.owner_gone, bed.kept.done])(draw.choice([owner, name]))
        bed.check()
        if draw.random() < 0.01:
            name = draw.choice("rst")
            bed.kept._attempts.pop(name, None)
    bed.kept.expire(now + 100)
    bed.kept.owner_gone(ENGINE)
    assert (bed.kept.block_count, bed.kept.request_count, bed.leased()) == (0, 0, [])
    assert bed.kept.counters["claims"] > 5
    bed.check()
