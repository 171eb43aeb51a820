"""The memory of an engine: room for the blocks of its turns, and the bytes that belong there."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from kvstore.errors import KVStoreError, LimitExceeded
from kvstore_bench.content import WORD_BYTES, BlockContent, Bytes
from kvstore_bench.emulate.slots import SlotRun, Slots


class PromptMemory:
    """Room for the blocks of one prompt, by their index in it.

    Args:
        rows: All memory, a row a block.
        runs: Which rows it has.
    """

    def __init__(self, rows: Bytes, runs: Sequence[SlotRun]) -> None:
        self._rows = rows
        self._runs = runs

    def parts(self, first: int, last: int) -> Iterator[tuple[int, Bytes]]:
        """Blocks [first, last) in arrays of consecutive rows, with the index of the first."""
        begin = 0
        for run in self._runs:
            lower, upper = max(first, begin), min(last, begin + run.size)
            if lower < upper:
                row = run.first + lower - begin
                yield lower, self._rows[row : row + upper - lower]
            begin += run.size

    def blocks(self, first: int, last: int, begin: int = 0, end: int | None = None) -> list[Bytes]:
        """Bytes [begin, end) of each of blocks [first, last)."""
        return [row[begin:end] for _, part in self.parts(first, last) for row in part]


class Memory:
    """Lends room to turns, first come first served, and knows what belongs there.

    A turn gets all its room at once: none ever waits for more while it has some.

    Args:
        view: Its bytes; what is no whole block at their end stays unused.
        block_bytes: A multiple of `WORD_BYTES`.

    Raises:
        KVStoreError: It has no room for a block.
    """

    def __init__(self, view: memoryview, block_bytes: int) -> None:
        count = len(view) // block_bytes
        if not count:
            raise KVStoreError(f"memory of {len(view)} bytes for blocks of {block_bytes}")
        self.slots = Slots(count)
        self._rows: Bytes = np.frombuffer(view[: count * block_bytes], np.uint8).reshape(
            count, block_bytes
        )
        self._content = BlockContent(block_bytes)
        # A word of zeros leaves the pattern as it is.
        self._pattern = np.empty((1, block_bytes), np.uint8)
        self._content.fill(self._pattern, [bytes(WORD_BYTES)])
        self._waiting: deque[tuple[int, asyncio.Future[Sequence[SlotRun]]]] = deque()

    @asynccontextmanager
    async def lend(self, count: int) -> AsyncIterator[PromptMemory]:
        """Room for so many blocks, as soon as there is some.

        Raises:
            LimitExceeded: There never will be.
        """
        if count > self.slots.count:
            raise LimitExceeded(
                f"a prompt of {count} blocks: this engine has memory for {self.slots.count}"
            )
        runs = await self._take(count)
        try:
            yield PromptMemory(self._rows, runs)
        finally:
            self._give(runs)

    async def _take(self, count: int) -> Sequence[SlotRun]:
        if not self._waiting and (runs := self.slots.take(count)) is not None:
            return runs
        given: asyncio.Future[Sequence[SlotRun]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, given))
        try:
            return await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._give(given.result())  # it came in the moment of the cancel
            self._lend_next()  # who was behind may have been in want of less
            raise

    def _give(self, runs: Sequence[SlotRun]) -> None:
        self.slots.give(runs)
        self._lend_next()

    def _lend_next(self) -> None:
        waiting = self._waiting
        while waiting:
            count, given = waiting[0]
            if not given.done():
                runs = self.slots.take(count)
                if runs is None:
                    return
                given.set_result(runs)
            waiting.popleft()

    def fill(
        self, room: PromptMemory, keys: Sequence[bytes], first: int, begin: int, end: int
    ) -> None:
        """Write bytes [begin, end) of the blocks from `first` on; on any thread.

        Args:
            keys: Of all blocks of the prompt.
            begin, end: Multiples of `WORD_BYTES`.
        """
        pattern = self._pattern[:, begin:end].view(np.uint64)
        for index, part in room.parts(first, len(keys)):
            some = keys[index : index + len(part)]
            words = np.frombuffer(b"".join(key[:WORD_BYTES] for key in some), np.uint64)
            out = part[:, begin:end].view(np.uint64)
            np.bitwise_xor(pattern, words.reshape(-1, 1), out=out)

    def wrong(self, room: PromptMemory, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks have other bytes than belong there; on any thread."""
        wrong = [False] * len(keys)
        for index, part in room.parts(0, len(keys)):
            some = keys[index : index + len(part)]
            wrong[index : index + len(part)] = self._content.wrong(part, some).tolist()
        return wrong


__all__ = ["Memory", "PromptMemory"]
