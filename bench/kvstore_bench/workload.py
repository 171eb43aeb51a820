"""Which I/O comes next, and what the bytes of a block are. Pure.

An I/O has a number; its blocks are `number * batch` and those that follow, one prefix.

::

    0 ............ io_count        the working set: stored before a job that reads begins
    io_count ...                   written by the job, each number once: fresh keys for ever

With a hit rate below 100 % only the first blocks of a prefix of the working set are stored.

What is written goes round `size` too: with `randwrite` each round has its own order.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore_bench.job import Job

# A block is recognised by the number at the start of each page of it, so that a page of
# another block, or of an older one in the same memory, is a wrong one.
PAGE_WORDS = 512
KEY_PREFIX_BYTES = 24
# What decimal percentages lose in binary must not lose a block.
_ROUNDING = 1e-6

Words = NDArray[np.uint64]


class Operation(NamedTuple):
    """One I/O to do.

    Attributes:
        blocks: How many of its blocks are, or will be, stored: the first ones.
    """

    is_read: bool
    number: int
    blocks: int


def rounds(count: int, shuffled: bool, seed: int) -> Iterator[int]:
    """0 to count - 1 again and again, each time in another order if `shuffled`."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(count).tolist() if shuffled else range(count)


class Workload:
    """The I/Os of one clone of a job, in order.

    Args:
        clone: Its number, so that clones differ in their orders.

    Attributes:
        written_count: I/Os given out for writing.
        last_written: Their numbers, the newest last: those that a full arena may still hold.
    """

    def __init__(self, job: Job, clone: int) -> None:
        seed = (job.randseed << 16) + clone
        self.written_count = 0
        # Only what reads them back needs them.
        self.last_written: deque[int] = deque(maxlen=job.io_count if job.verify else 0)
        self.io_count = job.io_count
        self._job = job
        self._read_share = 1.0 if not job.writes else 0.0 if not job.reads else job.rwmixread / 100
        self._draws = random.Random(seed)
        self._reads = rounds(job.io_count, job.random, seed)
        self._writes = rounds(job.io_count, job.random, seed + 1)
        self._left = -1 if job.time_based else job.io_count

    @property
    def preload_count(self) -> int:
        """I/Os that must be stored before it begins: 0 to this."""
        return self.io_count if self._job.reads else 0

    @property
    def numbers_end(self) -> int:
        """Above all numbers that were stored so far."""
        rounds_begun = -(-self.written_count // self.io_count)
        return self.preload_count + rounds_begun * self.io_count

    def next(self, counts: bool = True) -> Operation | None:
        """The next I/O; None when size is done.

        Args:
            counts: Whether the I/O counts towards size.
        """
        if counts:
            if self._left == 0:
                return None
            self._left -= 1
        share = self._read_share
        if share == 1.0 or (share and self._draws.random() < share):
            number = next(self._reads)
            return Operation(True, number, self.stored_blocks(number))
        turn, self.written_count = self.written_count // self.io_count, self.written_count + 1
        number = self.preload_count + turn * self.io_count + next(self._writes)
        self.last_written.append(number)
        return Operation(False, number, self._job.batch)

    def stored_blocks(self, number: int) -> int:
        """Blocks of an I/O of the working set that are stored, so that all together have the
        job's hit rate."""
        each = self._job.batch * self._job.hit_rate / 100
        return math.floor((number + 1) * each + _ROUNDING) - math.floor(number * each + _ROUNDING)


class Contents:
    """The bytes of blocks: one random pattern, with the block's number on each page.

    Args:
        seed: Of the pattern.
        layers: Pieces of a block, each of which lies beside those of the other blocks of an I/O:
            `[layer, block, bytes]`. With one, blocks lie one after the other.
    """

    def __init__(self, bs: int, batch: int, seed: int, layers: int = 1) -> None:
        self._shape = (layers, batch, bs // 8 // layers)
        self._batch = batch
        self._numbers = np.arange(batch, dtype=np.uint64)[:, None, None]
        generator = np.random.default_rng(seed)
        pattern: Words = generator.integers(0, 2**64, bs // 8, dtype=np.uint64)
        self._pattern: Words = pattern.reshape(layers, -1)
        self._expected = self._pattern.copy()

    def words(self, buffer: memoryview) -> Words:
        """The memory of one I/O as words: block, layer, word."""
        return np.frombuffer(buffer, dtype=np.uint64).reshape(self._shape).swapaxes(0, 1)

    def fill(self, words: Words) -> None:
        """Write the pattern into the memory of an I/O."""
        words[:] = self._pattern

    def stamp(self, words: Words, io_number: int) -> None:
        """Make filled memory that of one I/O: a few words a block."""
        words[:, :, ::PAGE_WORDS] = self._numbers + np.uint64(io_number * self._batch)

    def wrong_blocks(self, words: Words, io_number: int, hits: Sequence[bool]) -> list[int]:
        """Indices of the blocks among `hits` that are not what was written."""
        expected = self._expected
        wrong = []
        for index in range(self._batch):
            if hits[index]:
                expected[:, ::PAGE_WORDS] = io_number * self._batch + index
                if not np.array_equal(words[index], expected):
                    wrong.append(index)
        return wrong


class Keys:
    """Keys of blocks: a prefix that no other run has, and the block's number.

    Args:
        run: What makes this run unique.
    """

    def __init__(self, run: str, job: Job, clone: int) -> None:
        text = f"{run}/{job.name}/{clone}".encode()
        self._prefix = hashlib.sha256(text).digest()[:KEY_PREFIX_BYTES]
        self._batch = job.batch

    def of_io(self, number: int, blocks: int | None = None) -> list[bytes]:
        """The keys of one I/O, or of its first blocks."""
        first = number * self._batch
        return self.of_blocks(first, first + (self._batch if blocks is None else blocks))

    def of_blocks(self, first: int, last: int) -> list[bytes]:
        """The keys of blocks `[first, last)`."""
        prefix = self._prefix
        return [prefix + number.to_bytes(8, "big") for number in range(first, last)]
