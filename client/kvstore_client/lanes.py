"""The ways of one fetch: what each of them has yet to send, and what it has under way.

A *part* is layers of one block: `(index of the job, first layer, last layer)`, a plain tuple, for
there is one for each block of each fetch. A block begins as one part. With order=layer a lane
sends the first group of all its blocks before the second of any, so that a part is cut with each
request, and what is left of it goes behind all that are further back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath, Shipment
from kvstore_client.selector import PathMeter

# Layers `[first, last)` of a block: (index of the job, first, last).
Part = tuple[int, int, int]


class Lane:
    """One way of one fetch.

    Args:
        offsets: Where layers begin in a block, see `Geometry`.

    Attributes:
        key: Index of the daemon, or node id of the relay.
        waiting: What is yet to be sent.
        waiting_bytes: Of that.
        mixed: Whether earlier layers wait behind later ones.
        under_way: Shipments.
        barren: For another lane, how many at the end of `waiting` it may not take over.
    """

    __slots__ = (
        "_offsets",
        "barren",
        "key",
        "link",
        "meter",
        "mixed",
        "path",
        "under_way",
        "waiting",
        "waiting_bytes",
    )

    def __init__(
        self,
        key: int | str,
        path: FetchPath,
        link: PeerLink,
        meter: PathMeter,
        offsets: Sequence[int],
    ) -> None:
        self.key = key
        self.path = path
        self.link = link
        self.meter = meter
        self.waiting: deque[Part] = deque()
        self.waiting_bytes = 0
        self.mixed = False
        self.under_way: dict[Shipment, asyncio.Task[None]] = {}
        self.barren: dict[int | str, int] = {}
        self._offsets = offsets

    @property
    def relay(self) -> bool:
        """Whether it is the way by a relay."""
        return isinstance(self.key, str)

    @property
    def sent_bytes(self) -> int:
        """Bytes of this fetch that are under way."""
        return sum(one.size_bytes - one.arrived_bytes for one in self.under_way)

    @property
    def uniform(self) -> bool:
        """Whether the same layers of all blocks are waiting."""
        waiting = self.waiting
        return not waiting or all(part[1:] == waiting[0][1:] for part in waiting)

    def part_bytes(self, part: Part) -> int:
        """Size of a part."""
        return self._offsets[part[2]] - self._offsets[part[1]]

    def add(self, indices: Iterable[int], first: int, last: int) -> None:
        """The same layers of some blocks are to go this way, after all others."""
        before = len(self.waiting)
        if before and first < self.waiting[-1][1]:
            self.mixed = True
        self.waiting.extend(zip(indices, repeat(first), repeat(last)))
        count = len(self.waiting) - before
        self.waiting_bytes += count * (self._offsets[last] - self._offsets[first])

    def put(self, part: Part) -> None:
        """A part comes back, or from another lane: before all that begin with later layers."""
        if self.waiting and part[1] < self.waiting[-1][1]:
            self.mixed = True
        self.waiting.append(part)
        self.waiting_bytes += self.part_bytes(part)
        self.barren.clear()

    def sort(self) -> None:
        """Put earlier layers before later ones again, if something has come in between."""
        if self.mixed:
            self.mixed = False
            parts = sorted(self.waiting, key=lambda part: part[1:])
            self.waiting.clear()
            self.waiting.extend(parts)
            self.barren.clear()

    def take(self, count: int, fits: Callable[[Part], bool] | None = None) -> list[int]:
        """The next blocks of which the same layers are to be sent; at most `count`.

        Args:
            fits: Told of each part, whether it is still to go this way; what is not is gone.
        """
        waiting = self.waiting
        _, first, last = waiting[0]
        size_bytes = self._offsets[last] - self._offsets[first]
        indices: list[int] = []
        while waiting and len(indices) < count:
            part = waiting[0]
            if part[1] != first or part[2] != last:
                break
            waiting.popleft()
            self.waiting_bytes -= size_bytes
            if fits is None or fits(part):
                indices.append(part[0])
        return indices

    def give(self, thief: Lane, size_bytes: float, looks: int, may: Callable[[int], bool]) -> int:
        """Let another lane have parts, from the end on.

        Args:
            size_bytes: How much at most.
            looks: How many parts are looked at, at most.
            may: Whether a block may go there; it goes if so.

        Returns:
            How many parts have gone.
        """
        waiting = self.waiting
        # Behind those of which it is known: while a part waits nothing changes for it.
        barren = min(self.barren.get(thief.key, 0), len(waiting))
        waiting.rotate(barren)
        kept: list[Part] = []
        moved = moved_bytes = 0
        for _ in range(min(looks, len(waiting) - barren)):
            part_bytes = self.part_bytes(waiting[-1])
            if moved_bytes + part_bytes > size_bytes:
                break
            part = waiting.pop()
            if may(part[0]):
                thief.waiting.appendleft(part)
                moved_bytes += part_bytes
                moved += 1
            else:
                kept.append(part)
        waiting.extend(reversed(kept))
        waiting.rotate(-barren)
        self.waiting_bytes -= moved_bytes
        thief.waiting_bytes += moved_bytes
        if moved:
            # Their counts include what has gone, or what is here no more.
            self.barren.clear()
            thief.barren.clear()
        self.barren[thief.key] = barren + len(kept)
        return moved


__all__ = ["Lane", "Part"]
