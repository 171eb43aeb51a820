"""The extent allocator: exact fit, best fit, merging, windows."""

from __future__ import annotations

import random

import pytest

from kvstore.allocator import END, ExtentAllocator


def place(allocator: ExtentAllocator, extent: int) -> tuple[int, int]:
    start = allocator.starts[extent]
    return start, start + allocator.pages(extent)


def fill(allocator: ExtentAllocator, *sizes: int) -> list[int]:
    extents = [allocator.allocate(size) for size in sizes]
    assert END not in extents
    return extents


def test_extents_lie_side_by_side_in_an_empty_arena() -> None:
    allocator = ExtentAllocator(10)
    assert [place(allocator, e) for e in fill(allocator, 3, 1, 6)] == [(0, 3), (3, 4), (4, 10)]
    assert allocator.free_pages == 0
    assert allocator.allocate(1) == END
    allocator.check()


def test_an_extent_larger_than_the_largest_hole_is_not_to_be_had() -> None:
    allocator = ExtentAllocator(10)
    assert allocator.allocate(11) == END
    fill(allocator, 4)
    assert allocator.largest_hole_pages == 6
    assert allocator.allocate(7) == END
    assert allocator.free_pages == 6


def test_a_hole_of_the_exact_size_comes_first_then_the_smallest_that_is_larger() -> None:
    allocator = ExtentAllocator(100)
    a, _, b, _, c, _ = fill(allocator, 8, 1, 5, 1, 3, 82)
    for extent in (a, b, c):
        allocator.free(extent)
    assert place(allocator, allocator.allocate(5)) == (9, 14)
    assert place(allocator, allocator.allocate(2)) == (15, 17)
    assert place(allocator, allocator.allocate(2)) == (0, 2)
    allocator.check()


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_free_neighbours_merge(order: tuple[int, ...]) -> None:
    allocator = ExtentAllocator(9)
    extents = fill(allocator, 2, 3, 4)
    for index in order:
        hole = allocator.free(extents[index])
        assert allocator.is_free(hole)
        allocator.check()
    assert len(allocator) == 1
    assert place(allocator, allocator.allocate(9)) == (0, 9)


def test_numbers_are_used_again_so_that_columns_stay_small() -> None:
    allocator = ExtentAllocator(1000)
    for _ in range(50):
        for extent in fill(allocator, *[7] * 100):
            allocator.free(extent)
    assert max(fill(allocator, *[10] * 100)) <= 102


def anything(extent: int) -> bool:
    return True


def test_no_neighbour_is_needed_when_the_hole_is_large_enough() -> None:
    allocator = ExtentAllocator(10)
    extents = fill(allocator, 4, 3, 3)
    hole = allocator.free(extents[1])
    assert allocator.window(hole, 3, anything) == []


def test_a_window_grows_over_holes_and_small_neighbours_first() -> None:
    allocator = ExtentAllocator(20)
    big, victim, small, gap, rest = fill(allocator, 8, 2, 1, 3, 6)
    allocator.free(gap)
    hole = allocator.free(victim)
    assert allocator.window(hole, 6, anything) == [small]
    assert allocator.window(hole, 7, anything) == [small, rest]
    assert allocator.window(hole, 13, anything) == [small, rest, big]


def test_a_window_goes_round_what_must_stay() -> None:
    allocator = ExtentAllocator(20)
    left, victim, pinned, _ = fill(allocator, 8, 2, 1, 9)
    hole = allocator.free(victim)
    assert allocator.window(hole, 5, lambda extent: extent != pinned) == [left]
    assert allocator.window(hole, 11, lambda extent: extent != pinned) is None


def test_a_window_never_leaves_the_arena() -> None:
    allocator = ExtentAllocator(6)
    first, last = fill(allocator, 3, 3)
    hole = allocator.free(first)
    assert allocator.window(hole, 6, anything) == [last]
    assert allocator.window(hole, 7, anything) is None
    allocator.free(last)
    assert allocator.window(hole, 7, anything) is None


def test_the_work_for_a_window_is_bounded_by_its_pages() -> None:
    allocator = ExtentAllocator(1000)
    extents = fill(allocator, *[1] * 1000)
    looked_at: set[int] = set()
    hole = allocator.free(extents[500])
    window = allocator.window(hole, 10, lambda extent: not looked_at.add(extent))
    assert window is not None
    assert len(window) == 9
    assert len(looked_at) <= 11


def test_clearing_a_window_makes_the_hole(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        allocator = ExtentAllocator(200)
        extents = []
        while (extent := allocator.allocate(draw.randint(1, 9))) != END:
            extents.append(extent)
        pinned = set(draw.sample(extents, len(extents) // 10))
        victim = draw.choice([extent for extent in extents if extent not in pinned])
        wanted = draw.randint(1, 60)
        hole = allocator.free(victim)
        window = allocator.window(hole, wanted, lambda extent, pinned=pinned: extent not in pinned)
        if window is not None:
            assert not pinned & set(window)
            for extent in window:
                allocator.free(extent)
            assert allocator.allocate(wanted) != END
        allocator.check()


def test_random_work_keeps_the_books(seed: int) -> None:
    draw = random.Random(seed)
    allocator = ExtentAllocator(512)
    held: dict[int, tuple[int, int]] = {}
    for step in range(5000):
        if held and draw.random() < 0.5:
            extent = draw.choice(list(held))
            assert place(allocator, extent) == held.pop(extent)
            allocator.free(extent)
        elif (extent := allocator.allocate(size := draw.choice((1, 1, 1, 2, 5, 64)))) != END:
            start, end = place(allocator, extent)
            assert end - start == size
            assert all(end <= a or b <= start for a, b in held.values())
            held[extent] = (start, end)
        if step % 100 == 0:
            allocator.check()
            assert allocator.free_pages == 512 - sum(b - a for a, b in held.values())
    for extent in held:
        allocator.free(extent)
    assert len(allocator) == 1
    assert allocator.free_pages == allocator.largest_hole_pages == 512
