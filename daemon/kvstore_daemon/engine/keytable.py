"""From key to slot: an open-addressed table of 4 bytes a place, which grows in steps. Pure.

A dict costs 84 to 120 bytes a block and 28 more for the slot as a Python number, and stops
everything for 50 ms when a million keys have to move. Here a place holds nothing but the
number of a slot, 12 to 24 bytes a block; the key itself is in the index's column, which all
tables share::

    place    0     1     2     3     4     5     6     7
    slot     0     0    17     4     0     0     0     9
    home                 2     2                       7        home = hash of the key & 7

Slot 0 is never a block, so that 0 means "empty". A search goes from the home of a key towards
larger places, around the end, until it meets the key or an empty place. Removing closes the
gap by moving back what stands behind it, so that no tombstones lengthen later searches
(D. Knuth, The Art of Computer Programming 3, 6.4, algorithms L and R).

When a table has to become larger or smaller, a second one stands beside it for a while: new
keys go there, each change moves a few of the old ones, and a search looks into both. The old
table is emptied from larger places to smaller ones, beginning before an empty place: so each
entry is the last of its run when it goes, nobody's search passed over it, and nothing has to
be closed up.

The hash is Python's own of `bytes`, which is kept in the key and drawn anew for each process,
so that no client can choose keys which collide. It goes nowhere beyond this table.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from operator import ne

import numpy as np
from numpy.typing import NDArray

# Most namespaces of a store with many models and ranks are small: 32 bytes to begin with.
PLACES_MIN = 8
# A table grows when more than one place in 3 is taken: until then a search for a key that is
# there looks at 1.3 places at most, and for one that is not at 1.6 (Knuth, 6.4). With 1 in 2 it
# would be 1.5 and 2.5, and each is likely a cache miss: a put into a full arena of a million
# blocks took a fifth longer, and 4 to 8 bytes a block were saved.
LOAD_DIVISOR_MIN = 3
# A table shrinks when fewer than one place in 12 is taken. The smaller one has one in 6: as
# far from growing as from shrinking again.
LOAD_DIVISOR_MAX = 12
# Places of the old table that one change empties: 2 to 5 us. A table of n places is empty
# after n / 32 changes. By then one place in 10 to 7 of a larger one is taken, and one in 10 to
# 4 of a smaller one: a move always ends before the next is due.
PLACES_PER_CHANGE = 32
# Places of the old table that `take` looks at for each key that it may take. Where nobody
# has taken any yet, 3 to 12 places hold one.
PLACES_PER_TAKEN_KEY = 16
# From this size on a table is memory mapped for it alone: the system clears each page when it
# is used first. An allocator may clear all at once (3 ms for a million blocks), or ask for
# huge pages (6 ms for each of the first changes of a larger table, which touch many).
MAPPED_BYTES_MIN = 128 * 1024


class KeyTable(Mapping[bytes, int]):
    """The slots of one namespace's published blocks, by key.

    A mapping for whoever reads at leisure; hot paths use the methods below, which say 0 for
    "not there" (slot 0 is never a block). Between two calls the column holds the key of
    every slot in the table: whoever inserts writes it there, whoever removes clears it.

    No change moves more than `PLACES_PER_CHANGE` entries, nor clears the memory of a table.
    What is left at once is to give the old one back: 0.6 ms for a million blocks.

    Args:
        keys: The index's column of keys, by slot. It may grow, and stays the same object.
    """

    __slots__ = (
        "_count",
        "_keys",
        "_leaving",
        "_leaving_at",
        "_leaving_left",
        "_mask",
        "_places",
        "_table",
    )

    def __init__(self, keys: Sequence[bytes | None]) -> None:
        self._keys = keys
        self._count = 0
        self._set_places(PLACES_MIN)
        # The table that is on its way out; the next place to empty; how many are left.
        self._leaving: memoryview[int] | None = None
        self._leaving_at = 0
        self._leaving_left = 0

    # --- searching -------------------------------------------------------------------------

    def find(self, key: bytes) -> int:
        """The slot of a key, 0 if it is not there."""
        keys, places, mask = self._keys, self._places, self._mask
        place = hash(key) & mask
        while slot := places[place]:
            if keys[slot] == key:
                return slot
            place = (place + 1) & mask
        return 0 if self._leaving is None else self._find_leaving(key)

    def run_of(self, keys: Sequence[bytes]) -> list[int]:
        """The slots of several keys, up to the first that is not there."""
        # `find` without a call for each key: most of what a fetch of small blocks does.
        known, places, mask, leaving = self._keys, self._places, self._mask, self._leaving
        slots: list[int] = []
        for key in keys:
            place = hash(key) & mask
            while (slot := places[place]) and known[slot] != key:
                place = (place + 1) & mask
            if not slot and (leaving is None or not (slot := self._find_leaving(key))):
                break
            slots.append(slot)
        return slots

    def slots_of(self, keys: Sequence[bytes]) -> NDArray[np.int32]:
        """The slot of each of many keys, 0 for those that are not there."""
        # All homes at once, then all keys: where nothing is in the cache, the misses of
        # several keys overlap. What stands elsewhere than at home is searched one by one.
        known, places, mask = self._keys, self._places, self._mask
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        slots: NDArray[np.int32] = self._table[hashes & mask]
        at_home = slots.tolist()
        elsewhere = map(ne, map(known.__getitem__, at_home), keys)
        leaving = self._leaving
        for index in compress(range(len(keys)), elsewhere):
            key, slot = keys[index], at_home[index]
            if slot:
                place = hash(key) & mask
                while slot and known[slot] != key:
                    place = (place + 1) & mask
                    slot = places[place]
                slots[index] = slot
            if not slot and leaving is not None:
                slots[index] = self._find_leaving(key)
        return slots

    # --- changing --------------------------------------------------------------------------

    def insert(self, key: bytes, slot: int) -> int:
        """Give a slot to a key that has none. The caller writes the key into the column next.

        Returns:
            0; or the slot that the key has already, and nothing has changed.
        """
        if self._leaving is None and self._count * LOAD_DIVISOR_MIN > self._mask:
            self._leave_for(2 * len(self._places))
        if self._leaving is not None:
            self._move()
        keys, places, mask = self._keys, self._places, self._mask
        place = hash(key) & mask
        while known := places[place]:
            if keys[known] == key:
                return known
            place = (place + 1) & mask
        if self._leaving is not None and (known := self._find_leaving(key)):
            return known
        places[place] = slot
        self._count += 1
        return 0

    def remove(self, slot: int) -> None:
        """Take out a slot that is in the table. The caller clears its key in the column next."""
        keys, places, mask = self._keys, self._places, self._mask
        if self._leaving is not None:
            self._move()
        elif self._count * LOAD_DIVISOR_MAX <= mask >= PLACES_MIN:
            self._leave_for(len(places) // 2)
            places, mask = self._places, self._mask
            self._move()
        place = hash(keys[slot]) & mask
        # Slots are compared, not keys: nothing has to be read but the table.
        while (known := places[place]) and known != slot:
            place = (place + 1) & mask
        if not known:
            assert self._leaving is not None, f"slot {slot} is not in the table"
            places, mask = self._leaving, len(self._leaving) - 1
            place = hash(keys[slot]) & mask
            while (known := places[place]) != slot:
                assert known, f"slot {slot} is not in the table"
                place = (place + 1) & mask
        self._count -= 1
        if not self._count:
            self._leaving = None
            self._set_places(PLACES_MIN)
            return
        # Close the gap.
        gap = place
        while known := places[place := (place + 1) & mask]:
            # Its search begins at its home, and finds it in the gap if that is on the way.
            home = hash(keys[known]) & mask
            if (place - home) & mask >= (place - gap) & mask:
                places[gap] = known
                gap = place
        places[gap] = 0

    def take(self, count_max: int) -> list[int]:
        """Take out any keys, at most so many; their slots. The column still has the keys.

        The work is bounded: it may be fewer, even none, while there are more.
        """
        taken: list[int] = []
        for _ in range(count_max * PLACES_PER_TAKEN_KEY):
            if len(taken) == count_max or len(taken) == self._count:
                break
            if self._leaving is None:
                self._leave_for(len(self._places))
            slot = self._empty_next()
            if slot:
                taken.append(slot)
        self._count -= len(taken)
        if not self._count:
            self._leaving = None
            self._set_places(PLACES_MIN)
        return taken

    # --- the rest of a mapping -------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.find(key) != 0

    def __getitem__(self, key: bytes) -> int:
        slot = self.find(key)
        if not slot:
            raise KeyError(key)
        return slot

    def __iter__(self) -> Iterator[bytes]:
        """All keys, in no order. The table must not change meanwhile."""
        for places in self._tables():
            for slot in places:
                key = self._keys[slot] if slot else None
                if key is not None:
                    yield key

    @property
    def size_bytes(self) -> int:
        """Memory of all places."""
        return sum(places.nbytes for places in self._tables())

    @property
    def mapped_bytes(self) -> int:
        """The part of it which no allocator knows of."""
        sizes = [places.nbytes for places in self._tables()]
        return sum(size for size in sizes if size >= MAPPED_BYTES_MIN)

    def check(self) -> None:
        """Assert that each slot is where a search finds it, once, and that all are counted."""
        count = 0
        for places in self._tables():
            for slot in filter(None, places):
                key = self._keys[slot]
                assert key is not None, f"slot {slot} is in the table, and has no key"
                assert self.find(key) == slot, f"a search for {key.hex()} misses slot {slot}"
                count += 1
        assert count == self._count
        assert 2 * count <= len(self._places)
        if self._leaving is not None:
            mask, at = len(self._leaving) - 1, self._leaving_at
            assert 0 < self._leaving_left <= mask + 1
            emptied = range(at + 1, at + 1 + mask + 1 - self._leaving_left)
            assert not any(self._leaving[place & mask] for place in emptied)

    # --- moving to another table -----------------------------------------------------------

    def _tables(self) -> list[memoryview[int]]:
        return [self._places] if self._leaving is None else [self._places, self._leaving]

    def _set_places(self, count: int) -> None:
        # The array is for many places at a time; a single one is read faster through the view.
        self._table = _zeros(count)
        self._places: memoryview[int] = self._table.data
        self._mask = count - 1

    def _leave_for(self, count: int) -> None:
        """Begin to move to a table of `count` places."""
        old, mask = self._places, self._mask
        at = mask
        while old[(at + 1) & mask]:
            at -= 1
        self._leaving, self._leaving_at, self._leaving_left = old, at, mask + 1
        self._set_places(count)

    def _move(self) -> None:
        """Move what stands in the next few places of the old table."""
        keys, places, mask = self._keys, self._places, self._mask
        for _ in range(min(PLACES_PER_CHANGE, self._leaving_left)):
            slot = self._empty_next()
            if slot:
                place = hash(keys[slot]) & mask
                while places[place]:
                    place = (place + 1) & mask
                places[place] = slot

    def _empty_next(self) -> int:
        """What stood in the next place of the old table, 0 if nothing did."""
        leaving, at = self._leaving, self._leaving_at
        assert leaving is not None
        slot = leaving[at]
        leaving[at] = 0
        self._leaving_at = (at - 1) & (len(leaving) - 1)
        self._leaving_left -= 1
        if not self._leaving_left:
            self._leaving = None
        return slot

    def _find_leaving(self, key: bytes) -> int:
        """`find` in the old table alone."""
        leaving = self._leaving
        assert leaving is not None
        keys, mask = self._keys, len(leaving) - 1
        place = hash(key) & mask
        while slot := leaving[place]:
            if keys[slot] == key:
                return slot
            place = (place + 1) & mask
        return 0


def _zeros(count: int) -> NDArray[np.int32]:
    """Empty places, as an array."""
    size_bytes = count * np.dtype(np.int32).itemsize
    if size_bytes < MAPPED_BYTES_MIN:
        return np.zeros(count, dtype=np.int32)
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # where the system has no huge pages at all
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=np.int32)
