"""Which block goes next: least recently used, with a guard against scans. Pure.

::

    new block ──▶ window  ──── read again ────▶  main
                    │                             │
                    ▼                             ▼
                 ghosts ── put again ──▶ main    gone

Both lists are in order of last use. While the window holds no more than its share of the
bytes, the older of the two oldest blocks goes, as in one LRU list. Above that, the window's
oldest goes: blocks that nobody has read yet can drive out each other and nothing else, so
that a scan of any length leaves the main list as it is, up to the rest of the share. What
the window let go is remembered for a while by its digest, and goes straight to the main
list when it is put again: else a set of blocks larger than the window would never get in.

The parts are those of 2Q (T. Johnson, D. Shasha, "2Q: A Low Overhead High Performance Buffer
Management Replacement Algorithm", VLDB 1994) with the promotion at the first hit of ARC
(N. Megiddo, D. Modha, FAST 2003). `docs/decisions/0001-eviction.md` has the measurements,
and why it is not S3-FIFO.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from kvstore_daemon.engine.policy import CANDIDATES_MAX

# The window holds at most this many parts of a pool's bytes for so many parts of the main
# list: three fifths. One half gains more where the cache is far too small (3.0 instead of
# 2.4 points of prefix hit rate over LRU at best) and loses more where LRU is hard to beat
# (1.1 instead of 0.5 at worst); one tenth, the share of S3-FIFO, loses up to 3.8.
WINDOW_PARTS, MAIN_PARTS = 3, 2
# As many evicted blocks are remembered as this fraction of those that are held. More of them
# let blocks into the main list whose next use is further away than the cache reaches.
GHOSTS_DIVISOR = 2

# Segments. Their numbers are also the nodes that close their rings.
_WINDOW, _MAIN, _ABSENT = 0, 1, 2
# Slot n is node n + _NODES_FIRST.
_NODES_FIRST = 2
_MASK = (1 << 32) - 1
# Multiplier of Knuth's multiplicative hashing (The Art of Computer Programming 3, 6.4).
_SPREAD = 2654435769
_GHOST_PLACES_MIN = 64


class GuardedLru:
    """Least recently used; blocks that were never read hold at most three fifths.

    Chains keep their order: the store inserts and touches them tail first, so that within a
    list the tail of the chain that was idle longest goes first. Pinned candidates become the
    most recently used of their list: whoever holds a pin is about to read, and no candidate
    is looked at again before all others were.

    Memory: 25 bytes a slot in arrays, and 8 to 16 bytes a block for the ghosts.

    Args:
        capacity_bytes: Means nothing here: all shares are of what the pool holds.
        ticks: The shared clock of uses.
    """

    def __init__(self, capacity_bytes: int, ticks: Iterable[int]) -> None:
        self._ticks = iter(ticks)
        # Rings: window and main each through their own node. The node that closes a ring
        # has the oldest block as its newer neighbour, and the newest as its older one.
        self._newer = array("i", [_WINDOW, _MAIN])
        self._older = array("i", [_WINDOW, _MAIN])
        self._used = array("q", [0, 0])
        self._sizes = array("I", [0, 0])
        self._digests = array("I", [0, 0])
        self._segments = bytearray([_ABSENT, _ABSENT])
        self._counts = [0, 0]
        self._bytes = [0, 0]
        self._ghosts = Ghosts()

    def resize(self, capacity_bytes: int) -> None:
        """Means nothing here."""

    def insert(self, slot: int, size_bytes: int, digest: int) -> None:
        node = slot + _NODES_FIRST
        if node >= len(self._newer):
            self._grow(node + 1 - len(self._newer))
        assert self._segments[node] == _ABSENT
        reach = (len(self) + 1) // GHOSTS_DIVISOR
        self._ghosts.fit(reach)
        known = self._ghosts.recall(digest, reach)
        self._sizes[node] = size_bytes
        self._digests[node] = digest & _MASK
        self._append(node, _MAIN if known else _WINDOW)

    def touch(self, slot: int) -> None:
        # `_unlink` and `_append` in one, since this runs once for each block that is read.
        node = slot + _NODES_FIRST
        newer, older = self._newer, self._older
        before, after = older[node], newer[node]
        newer[before] = after
        older[after] = before
        newest = older[_MAIN]
        newer[newest] = older[_MAIN] = node
        older[node] = newest
        newer[node] = _MAIN
        self._used[node] = next(self._ticks)
        if self._segments[node] != _MAIN:
            assert self._segments[node] == _WINDOW
            self._account(node, _WINDOW, -1)
            self._account(node, _MAIN, +1)
            self._segments[node] = _MAIN

    def remove(self, slot: int) -> None:
        node = slot + _NODES_FIRST
        assert self._segments[node] != _ABSENT
        self._unlink(node)

    def evict(self, evictable: Callable[[int], bool]) -> int | None:
        unseen = self._counts.copy()
        for _ in range(min(CANDIDATES_MAX, len(self))):
            segment = self._next_segment()
            if not unseen[segment]:
                segment = _MAIN - segment
            unseen[segment] -= 1
            node = self._newer[segment]
            self._unlink(node)
            slot = node - _NODES_FIRST
            if evictable(slot):
                if segment == _WINDOW:
                    self._ghosts.remember(self._digests[node])
                return slot
            self._append(node, segment)
        return None

    def next_tick(self) -> int:
        return self._used[self._newer[self._next_segment()]]

    def __len__(self) -> int:
        return self._counts[_WINDOW] + self._counts[_MAIN]

    def _next_segment(self) -> int:
        """The segment whose oldest block is the next candidate."""
        if not self._counts[_WINDOW]:
            return _MAIN
        window_parts = self._bytes[_WINDOW] * MAIN_PARTS
        if not self._counts[_MAIN] or window_parts > self._bytes[_MAIN] * WINDOW_PARTS:
            return _WINDOW
        oldest_window, oldest_main = self._newer[_WINDOW], self._newer[_MAIN]
        return _WINDOW if self._used[oldest_window] < self._used[oldest_main] else _MAIN

    def _append(self, node: int, segment: int) -> None:
        """Add a node as the most recently used of a segment."""
        newest = self._older[segment]
        self._newer[newest] = self._older[segment] = node
        self._older[node] = newest
        self._newer[node] = segment
        self._used[node] = next(self._ticks)
        self._segments[node] = segment
        self._account(node, segment, +1)

    def _unlink(self, node: int) -> None:
        before, after = self._older[node], self._newer[node]
        self._newer[before] = after
        self._older[after] = before
        self._account(node, self._segments[node], -1)
        self._segments[node] = _ABSENT

    def _account(self, node: int, segment: int, sign: int) -> None:
        self._counts[segment] += sign
        self._bytes[segment] += sign * self._sizes[node]

    def _grow(self, count: int) -> None:
        for column in (self._newer, self._older, self._used, self._sizes, self._digests):
            column.extend([0] * count)
        self._segments.extend([_ABSENT] * count)


class Ghosts:
    """Digests of blocks that went not long ago. May forget, and rarely takes one for another.

    A hash table of four places a digest in two arrays, two pairs of neighbours; the one that
    was written longest ago is written over. A digest counts as known while fewer than `reach`
    others came after it, so that nothing has to be taken out. With at least twice as many
    places as that, the oldest that still count are lost at a rate of one in sixteen, and others
    hardly ever. (With two places it was one in four, and every block that is lost breaks the
    prefix that it belongs to.)

    Memory: 8 bytes a place; twice as many places as may count, up to a power of two.
    """

    def __init__(self) -> None:
        self._marks = array("I")
        self._times = array("I")
        self._clock = 0
        self._shift = 32
        self.fit(_GHOST_PLACES_MIN // 2)

    def fit(self, reach: int) -> None:
        """Make room for `reach` digests. A larger table starts empty: copying one would hold
        up the loop, and it grows only while the pool does."""
        if 2 * reach > len(self._marks):
            bits = (2 * reach - 1).bit_length()
            self._shift = 32 - bits
            self._marks = array("I", bytes(4 << bits))
            self._times = array("I", bytes(4 << bits))

    def remember(self, digest: int) -> None:
        """A block of this digest went."""
        mark = (digest & _MASK) or 1
        marks, times, clock = self._marks, self._times, self._clock
        chosen, chosen_age = 0, -1
        for place in self._places(mark):
            if marks[place] in (0, mark):
                chosen = place
                break
            age = (clock - times[place]) & _MASK
            if age > chosen_age:
                chosen, chosen_age = place, age
        marks[chosen] = mark
        times[chosen] = clock
        self._clock = (clock + 1) & _MASK

    def recall(self, digest: int, reach: int) -> bool:
        """Whether a block of this digest was among the last `reach` that went; forgets it."""
        mark = (digest & _MASK) or 1  # 0 marks an empty place
        for place in self._places(mark):
            if self._marks[place] == mark:
                self._marks[place] = 0
                return (self._clock - self._times[place]) & _MASK <= reach
        return False

    def _places(self, mark: int) -> tuple[int, int, int, int]:
        first = mark & (len(self._marks) - 1)
        second = (mark * _SPREAD & _MASK) >> self._shift
        return first, first ^ 1, second, second ^ 1
