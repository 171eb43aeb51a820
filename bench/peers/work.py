"""The work that every peer gets: the same keys, the same bytes, the same order. Pure.

::

    batches   0 ........ read_batches ........ read_batches + write_batches
              what is read,                    what is written: stored anew
              stored once                      in every trial

A batch is `batch` blocks of `block_bytes`, whose keys follow each other as those of a prefix do.
What a block holds follows from its key (`kvstore_bench.content`), so that all of it can be
compared, wherever it comes from.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from kvstore_bench.content import BlockContent

KEY_BYTES = 32
# What memory holds before a read that is compared: no block of ours looks like that.
BLANK = 0xA5


@dataclass(frozen=True)
class Work:
    """What is done.

    Attributes:
        batch: Blocks of a batch.
        lanes: Batches that may be under way at once; each has memory of its own.
        seed: Of the order in which batches are read.
    """

    block_bytes: int
    batch: int
    lanes: int
    read_batches: int
    write_batches: int
    seed: int = 1

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch."""
        return self.batch * self.block_bytes

    @property
    def batches(self) -> int:
        """All batches, those that are read and those that are written."""
        return self.read_batches + self.write_batches

    @property
    def stored_bytes(self) -> int:
        """What a server holds in the end."""
        return self.batches * self.batch_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of a client: a batch for each lane, and all that is written, laid out once."""
        return (self.lanes + self.write_batches) * self.batch_bytes

    def keys(self, batch: int) -> list[bytes]:
        """Keys of a batch."""
        first = batch * self.batch
        return [block_key(self.block_bytes, n) for n in range(first, first + self.batch)]

    def order(self) -> list[int]:
        """The batches that are read, in the order in which they are, again and again."""
        batches = list(range(self.read_batches))
        random.Random(self.seed).shuffle(batches)
        return batches

    def writes(self) -> range:
        """The batches that are written."""
        return range(self.read_batches, self.batches)

    def plain(self) -> dict[str, int]:
        """All of it, for JSON."""
        return asdict(self)


def block_key(block_bytes: int, number: int) -> bytes:
    """The key of a block."""
    return hashlib.sha256(f"{block_bytes}/{number}".encode()).digest()


class Memory:
    """A client's memory, laid out for a work.

    Args:
        view: `work.memory_bytes` of it; this keeps it alive.
    """

    def __init__(self, work: Work, view: memoryview) -> None:
        assert len(view) == work.memory_bytes
        self.view = view
        self._work = work
        self._content = BlockContent(work.block_bytes)
        self._keys = [work.keys(batch) for batch in range(work.batches)]

    def lane(self, lane: int) -> memoryview:
        """Where a lane's batch is received."""
        size = self._work.batch_bytes
        return self.view[lane * size : (lane + 1) * size]

    def source(self, batch: int) -> memoryview:
        """Where a batch that is written lies."""
        return self.lane(self._work.lanes + batch - self._work.read_batches)

    def lay_out(self) -> None:
        """Make all that is written, and touch the rest."""
        for lane in range(self._work.lanes):
            self.blank(self.lane(lane))
        for batch in self._work.writes():
            self.fill(self.source(batch), batch)

    def fill(self, view: memoryview, batch: int) -> None:
        """Make the bytes of a batch."""
        self._content.fill(self._rows(view), self._keys[batch])

    def blank(self, view: memoryview) -> None:
        """Make bytes that belong to no batch."""
        np.frombuffer(view, np.uint8)[:] = BLANK

    def wrong(self, view: memoryview, batch: int) -> int:
        """How many blocks of a batch are not what they should be; compares every byte."""
        return int(self._content.wrong(self._rows(view), self._keys[batch]).sum())

    def _rows(self, view: memoryview) -> npt.NDArray[np.uint8]:
        return np.frombuffer(view, np.uint8).reshape(self._work.batch, -1)


def split(view: memoryview, block_bytes: int) -> list[memoryview]:
    """The blocks of a batch's memory."""
    return [view[at : at + block_bytes] for at in range(0, len(view), block_bytes)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that as many percent of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]
