"""Where free memory lies: an allocator of extents of whole pages. Pure.

An *extent* is a run of pages, free or allocated; extents tile the arena without gaps. Each
has a number, and its neighbours by address are one array read away, which is what merging
free neighbours and clearing a window need. There is no table over pages: memory grows with
the number of extents (13 bytes each) and not with the size of the arena.

::

    number      0 (the end)     5           2        7
    pages       -               [0, 4)      [4, 5)   [5, 1000)
    state       -               allocated   free     allocated

Allocation takes a free extent of exactly the right size if there is one, else the smallest
that is larger (best fit; D. Knuth, The Art of Computer Programming 1, 2.5). In an arena with
blocks of one size every hole fits the next block.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator

# Page numbers are kept in 32 bits: 16 TiB of 4 KiB pages.
PAGES_MAX = (1 << 32) - 1
# Number of the sentinel that closes the ring of extents; never a real extent, so that 0
# means "none" to callers.
END = 0


class ExtentAllocator:
    """Allocates extents of whole pages.

    Args:
        page_count: Pages in the arena.

    Attributes:
        starts: First page of each extent, by its number. Read only.
        free_pages: Pages in free extents.
    """

    def __init__(self, page_count: int) -> None:
        assert 0 < page_count <= PAGES_MAX
        self.page_count = page_count
        self.free_pages = page_count
        self.starts = array("I", [page_count])
        # A ring by address through END. The size of an extent is the distance to the next.
        self._next = array("i", [END])
        self._previous = array("i", [END])
        self._free = bytearray(1)
        self._spare_numbers: list[int] = []
        # Free extents by size. The inner dicts are sets that give back the newest first.
        self._holes: dict[int, dict[int, None]] = {}
        self._hole_sizes: list[int] = []  # keys of _holes, sorted
        whole = self._add_after(END, 0)
        self._add_hole(whole, page_count)

    def __len__(self) -> int:
        """Number of extents, free ones included."""
        return len(self.starts) - 1 - len(self._spare_numbers)

    @property
    def largest_hole_pages(self) -> int:
        """Size of the largest free extent."""
        return self._hole_sizes[-1] if self._hole_sizes else 0

    def pages(self, extent: int) -> int:
        """Size of an extent in pages."""
        return self.starts[self._next[extent]] - self.starts[extent]

    def is_free(self, extent: int) -> bool:
        """Whether an extent is a hole."""
        return bool(self._free[extent])

    def extents(self) -> Iterator[int]:
        """All extents by address. The allocator must not change meanwhile."""
        extent = self._next[END]
        while extent != END:
            yield extent
            extent = self._next[extent]

    def allocate(self, page_count: int) -> int:
        """The number of an allocated extent of `page_count` pages, `END` if no hole fits."""
        holes = self._holes.get(page_count)
        if holes is not None:
            extent = holes.popitem()[0]
            if not holes:
                self._forget_size(page_count)
            self._free[extent] = 0
        else:
            at = bisect_left(self._hole_sizes, page_count)
            if at == len(self._hole_sizes):
                return END
            size = self._hole_sizes[at]
            holes = self._holes[size]
            extent = holes.popitem()[0]
            if not holes:
                self._forget_size(size)
            self._free[extent] = 0
            rest = self._add_after(extent, self.starts[extent] + page_count)
            self._add_hole(rest, size - page_count)
        self.free_pages -= page_count
        return extent

    def free(self, extent: int) -> int:
        """Free an allocated extent and merge it with free neighbours.

        Returns:
            The number of the hole that it is part of now; `extent` itself may be gone.
        """
        assert extent != END
        assert not self._free[extent]
        self.free_pages += self.pages(extent)
        following = self._next[extent]
        if self._free[following]:
            self._remove_hole(following)
            self._unlink(following)
        previous = self._previous[extent]
        if self._free[previous]:
            self._remove_hole(previous)
            self._unlink(extent)
            extent = previous
        self._add_hole(extent, self.pages(extent))
        return extent

    def window(
        self, hole: int, page_count: int, evictable: Callable[[int], bool]
    ) -> list[int] | None:
        """Which extents to free so that `hole` grows to `page_count` pages.

        The window grows to the side that costs less: over a free neighbour, else over the
        smaller of the two. Looks at no more than `page_count` extents.

        Args:
            evictable: Whether an allocated extent may be freed.

        Returns:
            Allocated extents, or None when the neighbours on both sides stay.
        """
        size = self.pages(hole)
        left, right = self._previous[hole], self._next[hole]
        chosen: list[int] = []
        while size < page_count:
            left_cost = self._clearing_cost(left, evictable)
            right_cost = self._clearing_cost(right, evictable)
            if left_cost is None and right_cost is None:
                return None
            if right_cost is None or (left_cost is not None and left_cost < right_cost):
                extent, left = left, self._previous[left]
            else:
                extent, right = right, self._next[right]
            size += self.pages(extent)
            if not self._free[extent]:
                chosen.append(extent)
        return chosen

    def check(self) -> None:
        """Assert that extents tile the arena, holes are merged, and every total is right."""
        position, free_pages, holes, after_hole = 0, 0, 0, False
        previous = END
        for extent in self.extents():
            assert self.starts[extent] == position, (extent, self.starts[extent], position)
            assert self._previous[extent] == previous
            size = self.pages(extent)
            assert size > 0
            if self._free[extent]:
                assert not after_hole, f"holes {previous} and {extent} are not merged"
                assert extent in self._holes[size]
                holes += 1
                free_pages += size
            after_hole = bool(self._free[extent])
            position += size
            previous = extent
        assert position == self.page_count
        assert self._previous[END] == previous
        assert free_pages == self.free_pages
        assert holes == sum(map(len, self._holes.values()))
        assert self._hole_sizes == sorted(self._holes)
        assert all(self._holes.values())

    def _clearing_cost(self, extent: int, evictable: Callable[[int], bool]) -> int | None:
        if self._free[extent]:
            return 0
        if extent == END or not evictable(extent):
            return None
        return self.pages(extent)

    def _add_after(self, extent: int, start: int) -> int:
        following = self._next[extent]
        if self._spare_numbers:
            number = self._spare_numbers.pop()
            self.starts[number] = start
            self._next[number] = following
            self._previous[number] = extent
        else:
            number = len(self.starts)
            self.starts.append(start)
            self._next.append(following)
            self._previous.append(extent)
            self._free.append(0)
        self._next[extent] = number
        self._previous[following] = number
        return number

    def _unlink(self, extent: int) -> None:
        following, previous = self._next[extent], self._previous[extent]
        self._next[previous] = following
        self._previous[following] = previous
        self._free[extent] = 0
        self._spare_numbers.append(extent)

    def _add_hole(self, extent: int, page_count: int) -> None:
        self._free[extent] = 1
        holes = self._holes.get(page_count)
        if holes is None:
            self._holes[page_count] = {extent: None}
            self._hole_sizes.insert(bisect_left(self._hole_sizes, page_count), page_count)
        else:
            holes[extent] = None

    def _remove_hole(self, extent: int) -> None:
        page_count = self.pages(extent)
        holes = self._holes[page_count]
        del holes[extent]
        if not holes:
            self._forget_size(page_count)

    def _forget_size(self, page_count: int) -> None:
        del self._holes[page_count]
        del self._hole_sizes[bisect_left(self._hole_sizes, page_count)]
