"""Work requests cover all bytes in order, within the limits, and are no more than it takes."""

from __future__ import annotations

import itertools
import random

import pytest

from kvstore.buffers import Region
from kvstore.errors import LocalProtocolError
from kvstore.transport.rdma_cut import cut, local_pieces, remote_ranges
from kvstore.transport.rdma_memory import Registration, Registrations
from kvstore.transport.shm import address_of
from kvstore.transport.verbs import MemoryRegion, Opcode, Work


class Keys(MemoryRegion):
    """A region that counts its closings."""

    def __init__(self, key: int, fails: bool = False) -> None:
        self.lkey, self.rkey = key, key + 1
        self.closed = 0
        self._fails = fails

    def close(self) -> None:
        self.closed += 1
        if self._fails:
            raise OSError("refused")


@pytest.fixture
def memory() -> Registrations:
    """Where nothing is registered."""
    return Registrations()


def register(memory: Registrations, view: memoryview, *keys: int) -> Registration:
    """Registered memory with a key for each rail."""
    regions = [Keys(key) if key else None for key in keys]
    made = Registration(view, address_of(view), regions, memory.remove)
    memory.add(made)
    return made


def moved(works: list[Work]) -> list[tuple[int, int, int, int]]:
    """(local address, lkey, remote address, rkey) of each byte."""
    return [
        (piece.address + at, piece.lkey, work.remote_address + before + at, work.rkey)
        for work in works
        for before, piece in zip(
            [sum(p.length for p in work.pieces[:n]) for n in range(len(work.pieces))],
            work.pieces,
            strict=True,
        )
        for at in range(piece.length)
    ]


def test_spans_that_touch_are_one_range() -> None:
    spans = [(0, 10, 5), (0, 15, 5), (1, 20, 5), (1, 26, 1), (0, 27, 2), (0, 29, 1)]
    assert remote_ranges(spans, [1000, 2000], [7, 8]) == [
        (1010, 7, 10),
        (2020, 8, 5),
        (2026, 8, 1),
        (1027, 7, 3),
    ]
    assert remote_ranges([], [], []) == []


def test_buffers_that_touch_are_one_piece(memory: Registrations) -> None:
    region = Region(8192)
    base = address_of(region.view)
    first = register(memory, region.view[:4096], 11, 21)
    register(memory, region.view[4096:], 12, 22)
    view = region.view
    buffers = [view[0:10], view[10:20], view[30:40], view[4000:4096], view[4096:4100], view[5:5]]
    assert local_pieces(buffers, memory, 1) == [
        (base, 20, 21),
        (base + 30, 10, 21),
        (base + 4000, 96, 21),
        (base + 4096, 4, 22),
    ]
    first.close()
    with pytest.raises(LocalProtocolError, match=r"10 bytes at 0x.* in no registered memory"):
        local_pieces(buffers, memory, 0)


def test_request_gathers_and_is_cut_where_it_must_be() -> None:
    pieces = [(100, 10, 1), (200, 10, 1), (300, 10, 2)]
    one = cut(Opcode.WRITE, 5, [(1000, 9, 30)], pieces, 3, 100)
    assert one == [Work(5, Opcode.WRITE, pieces, 1000, 9)]
    by_pieces = cut(Opcode.WRITE, 5, [(1000, 9, 30)], pieces, 2, 100)
    assert [(work.id, work.remote_address, len(work.pieces)) for work in by_pieces] == [
        (5, 1000, 2),
        (6, 1020, 1),
    ]
    by_bytes = cut(Opcode.READ, 0, [(1000, 9, 30)], pieces, 3, 12)
    assert [sum(p.length for p in work.pieces) for work in by_bytes] == [12, 12, 6]
    assert moved(by_bytes) == moved(by_pieces) == moved(one)


def test_any_cut_moves_the_same_bytes(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        total = draw.randint(1, 400)
        sides = []
        for step in (1000, 5000):
            cuts = sorted({0, total, *(draw.randint(0, total) for _ in range(draw.randint(0, 9)))})
            sides.append(
                [
                    (step * (n + 1), n, end - begin)
                    for n, (begin, end) in enumerate(itertools.pairwise(cuts))
                ]
            )
        pieces = [(address, size, key) for address, key, size in sides[0]]
        expected = [
            (a + x, k, b + y, r)
            for (a, k, x), (b, r, y) in zip(
                [(a, k, x) for a, k, size in sides[0] for x in range(size)],
                [(b, r, y) for b, r, size in sides[1] for y in range(size)],
                strict=True,
            )
        ]
        pieces_max, bytes_max = draw.randint(1, 5), draw.randint(1, 200)
        works = cut(Opcode.WRITE, 3, sides[1], pieces, pieces_max, bytes_max)
        assert moved(works) == expected
        assert [work.id for work in works] == list(range(3, 3 + len(works)))
        for work in works:
            assert 1 <= len(work.pieces) <= pieces_max
            assert sum(piece.length for piece in work.pieces) <= bytes_max


# --- which registration memory lies in -----------------------------------------------------


def test_overlapping_registrations_are_all_found(memory: Registrations, seed: int) -> None:
    region = Region(64 * 1024)
    base = address_of(region.view)
    draw = random.Random(seed)
    made: list[Registration] = []
    for round_number in range(60):
        first = draw.randint(0, 60_000)
        made.append(register(memory, region.view[first : first + draw.randint(1, 5000)], 1))
        if round_number % 3 == 2:
            made.pop(draw.randrange(len(made))).close()
        for _ in range(30):
            address, length = base + draw.randint(0, 64_000), draw.randint(1, 1500)
            found = memory.find(address, length)
            fits = [one for one in made if one.address <= address and address + length <= one.end]
            assert found in fits if fits else found is None
    assert memory.all == sorted(made, key=lambda one: one.address)
    assert len(memory) == len(made)


def test_registration_says_what_peers_must_know(memory: Registrations) -> None:
    region = Region(4096)
    made = register(memory, region.view, 11, 0, 13)
    assert (made.lkeys, made.rkeys) == ((11, 0, 13), (12, 0, 14))
    told = made.described()
    assert (told.keys, told.address, told.size_bytes) == (made.rkeys, made.address, 4096)


def test_registration_closes_all_of_its_regions_once(memory: Registrations) -> None:
    region = Region(4096)
    regions = [Keys(1), Keys(2, fails=True), Keys(3)]
    made = Registration(region.view, address_of(region.view), regions, memory.remove)
    memory.add(made)
    with pytest.raises(OSError, match="refused"):
        made.close()
    assert [one.closed for one in regions] == [1, 1, 1]
    assert memory.find(made.address, 1) is None
