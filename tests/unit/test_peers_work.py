"""The work of bench/peers: the same for all, and every wrong byte is found."""

from __future__ import annotations

import math

import pytest

from peers.work import BLANK, Memory, Work, percentile, split

WORK = Work(block_bytes=64, batch=4, lanes=2, read_batches=5, write_batches=3)


def memory() -> Memory:
    return Memory(WORK, memoryview(bytearray(WORK.memory_bytes)))


def test_keys_differ_between_all_blocks_and_sizes() -> None:
    other = Work(block_bytes=128, batch=4, lanes=2, read_batches=5, write_batches=3)
    keys = [key for work in (WORK, other) for n in range(work.batches) for key in work.keys(n)]
    assert len(set(keys)) == len(keys) == 2 * 8 * 4
    # What a block holds follows from the first bytes alone.
    assert len({key[:8] for key in keys}) == len(keys)


def test_all_that_is_read_is_read_in_an_order_of_its_own_that_is_always_the_same() -> None:
    assert sorted(WORK.order()) == list(range(5))
    assert WORK.order() == WORK.order() != list(range(5))


def test_what_is_read_and_what_is_written_are_all_batches() -> None:
    assert [*range(WORK.read_batches), *WORK.writes()] == list(range(WORK.batches))
    assert WORK.stored_bytes == 8 * 4 * 64


def test_no_two_places_of_the_memory_overlap() -> None:
    found = memory()
    places = [found.lane(0), found.lane(1), *map(found.source, WORK.writes())]
    for number, place in enumerate(places):
        place[:] = bytes([number]) * len(place)
    assert [set(place) for place in places] == [{n} for n in range(5)]
    assert sum(map(len, places)) == WORK.memory_bytes


def test_what_is_written_is_laid_out() -> None:
    found = memory()
    found.lay_out()
    assert [found.wrong(found.source(n), n) for n in WORK.writes()] == [0, 0, 0]
    assert set(found.lane(1)) == {BLANK}


@pytest.mark.parametrize("at", [0, 63, 64, 255])
def test_a_wrong_byte_is_a_wrong_block(at: int) -> None:
    found = memory()
    area = found.lane(0)
    found.fill(area, 2)
    area[at] ^= 1
    assert found.wrong(area, 2) == 1


def test_another_batch_and_blank_memory_are_wrong_altogether() -> None:
    found = memory()
    area = found.lane(0)
    found.fill(area, 2)
    assert found.wrong(area, 3) == 4
    found.blank(area)
    assert found.wrong(area, 2) == 4


def test_blocks_that_changed_places_are_wrong() -> None:
    found = memory()
    area = found.lane(0)
    found.fill(area, 2)
    first, second = bytes(area[:64]), bytes(area[64:128])
    area[:128] = second + first
    assert found.wrong(area, 2) == 2


def test_memory_is_split_into_its_blocks() -> None:
    view = memoryview(bytes(range(12)))
    assert [bytes(part) for part in split(view, 4)] == [bytes(range(n, n + 4)) for n in (0, 4, 8)]


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (50, 5), (90, 9), (91, 10), (99, 10), (100, 10)]
)
def test_a_percentile_is_one_of_the_values(percent: float, expected: int) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected
    assert math.isclose(percentile([2.5], percent), 2.5)
