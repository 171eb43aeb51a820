"""The seam between the harness and what it measures: one file a peer, one class each.

A peer lives in a process of its own, whose Python has its client library. `open` starts its
server as a child of that process, so that it is gone when the process is, however that ends.
From then on batches are put and got, `depth` at a time. Where nothing else is said, each of
them has a thread ("lane") with a connection of its own, since most clients block.

A `get` ends when the batch lies in memory that was there before, and a `put` when the server has
said that it has it. What a client needs for that is part of the time: a library that returns new
objects copies out of them.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peers.work import Memory, Work

#: A call that takes so long has failed.
CALL_TIMEOUT_S = 30.0


class PeerFailed(Exception):
    """Raised when a peer cannot be measured; says why."""


class PeerMissing(Exception):
    """Raised when something is not installed; names it."""


@dataclass
class Driven:
    """What was done in a while.

    Attributes:
        took_s: Each batch.
        last: The last batch of each lane, which lies in its memory.
    """

    took_s: list[float] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)


class Peer(ABC):
    """See the module.

    Args:
        work: What it will be asked for.
        variant: Which of the ways that its module knows.

    Attributes:
        lanes_max: How many batches it can have under way, if that is limited.
        in_order: Whether it gives batches in their order only.
        server_pids: Processes whose time is the server's; known after `open`.
        versions: Of server and client, for people; known after `open`.
    """

    lanes_max: int | None = None
    in_order = False

    def __init__(self, work: Work, variant: str = "") -> None:
        self.work = work
        self.variant = variant
        self.server_pids: Sequence[int] = ()
        self.versions = ""
        self.memory: Memory

    @classmethod
    def missing(cls) -> str:
        """Not required. What this process lacks to measure it; empty if nothing."""
        return ""

    @abstractmethod
    async def open(self, folder: Path) -> None:
        """Required. Start the server, connect `work.lanes` times, set `memory`.

        Args:
            folder: For sockets and logs; ends with the run.
        """

    @abstractmethod
    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """Required. Read a batch.

        Raises:
            PeerFailed: Not all of its blocks are there.
        """

    @abstractmethod
    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """Required. Store a batch; it is there when this returns, or when `settle` does."""

    def settle(self) -> None:
        """Not required. Wait for all that was put; part of the time."""
        return None

    def rewind(self) -> None:
        """Not required. Called before reads begin; not part of the time."""
        return None

    async def forget(self, batches: Sequence[int]) -> None:
        """Not required. Before batches are put again, if it would not store them then."""
        return None

    async def close(self) -> None:
        """Not required. End the server, whatever happened before."""
        return None

    async def drive(
        self, action: str, depth: int, batches: Iterator[int], until: float = float("inf")
    ) -> Driven:
        """Put or get batches, `depth` at a time.

        Args:
            batches: Which; shared by all lanes.
            until: No batch but each lane's first begins after that, by `time.perf_counter`.
        """
        driven = Driven()
        lanes = min(depth, self.lanes_max or depth)
        step = self._step(action)

        def keep_busy(lane: int) -> None:
            while (began := time.perf_counter()) < until or lane not in driven.last:
                if (batch := next(batches, None)) is None:
                    return
                step(lane, batch)
                driven.took_s.append(time.perf_counter() - began)
                driven.last[lane] = batch

        await asyncio.gather(*(asyncio.to_thread(keep_busy, lane) for lane in range(lanes)))
        if action == "put":
            await asyncio.to_thread(self.settle)
        return driven

    def _step(self, action: str) -> Callable[[int, int], None]:
        memory = self.memory
        # Made before: the loops above make nothing.
        lanes = [memory.lane(lane) for lane in range(self.work.lanes)]
        if action == "get":
            return lambda lane, batch: self.get(lane, batch, lanes[lane])
        sources = {batch: memory.source(batch) for batch in self.work.writes()}
        return lambda lane, batch: self.put(lane, batch, sources[batch])

    async def fill(self) -> None:
        """Store all that will be read."""
        area = self.memory.lane(0)
        for batch in range(self.work.read_batches):
            self.memory.fill(area, batch)
            await asyncio.to_thread(self.put, 0, batch, area)
        await asyncio.to_thread(self.settle)


def private_memory(work: Work) -> Memory:
    """Memory of this process alone, touched and laid out."""
    memory = Memory(work, memoryview(mmap.mmap(-1, work.memory_bytes)))
    memory.lay_out()
    return memory


def endless(peer: Peer) -> Iterator[int]:
    """The batches that a peer is asked for, without end."""
    work = peer.work
    return itertools.cycle(range(work.read_batches) if peer.in_order else work.order())
