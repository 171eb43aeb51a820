"""Payload of a session that shares memory with this process: copied there and verified there.

::

    arena ──copy──▶ asker's region ──compare with checksums──▶ news (DATA, PLACED | VERIFIED)
    asker's region ──copy──▶ reserved block ──▶ the source verifies what it has, not what was there

The asker may write into its memory at any time: what was verified is what the server had put
there, and a put is judged by the copy. Pure: `kvstore.sharedregions` has the memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from xxhash import xxh3_64

from kvstore.blocksource import Chunk
from kvstore.checksum import CHECKSUM_BYTES, layer_checksum, layer_hasher
from kvstore.layout import PieceMap
from kvstore.messages import Data
from kvstore.protocol.placing import FetchSink, Placed, PutPuller
from kvstore.protocol.strands import Strand, Strands
from kvstore.transfer import PENDING, BlockMemory, FetchTransfer, slice_memory
from kvstore.wire import FrameType, Header

# What a worker does in one go: 0.15 ms.
CHUNK_BYTES = 2 * 1024 * 1024
# Copied, and then hashed while the second cache of a core, of 1 MiB here, has source and target.
SLICE_BYTES = 256 * 1024
# So little is copied at once: 10 us, while handing it over takes 20 to 50.
HERE_BYTES_MAX = 128 * 1024
# What takes longer than numpy's calls around it lets other threads run: 3 us.
LETTING_BYTES_MIN = 64 * 1024
# News of this much go together: 6 ms of copying, and 2 where somebody may wait for a layer. Each
# of them may cost a reader whose interpreter is busy a switch of threads, 5 ms.
NEWS_BYTES_MAX = 64 * 1024 * 1024
LAYER_NEWS_BYTES_MAX = 16 * 1024 * 1024
# Checksums of layers of a few bytes; with one chunk more they fit into a frame.
NEWS_CHECKSUM_BYTES_MAX = 256 * 1024


class CopySink(FetchSink):
    """Copies a fetch into its asker's memory, and verifies it there.

    Args:
        namespace, keys, pieces: Of the request.
        memory: Of each block, in the asker's memory.
        strands: Of the connection.
    """

    transport = "shm"
    chunk_bytes = CHUNK_BYTES

    def __init__(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        memory: Sequence[BlockMemory],
        strands: Strands,
    ) -> None:
        super().__init__()
        # While parts are under way only `_copy` may use it.
        self._transfer = _CopiedTransfer(namespace, keys, pieces, memory, _ignore, _ignore)
        self._pieces = pieces
        self._strands = strands
        self._strand = Strand(strands)
        in_order = pieces.group_count > 1
        self._news_bytes_max = LAYER_NEWS_BYTES_MAX if in_order else NEWS_BYTES_MAX
        self._flushing = False  # as soon as nothing is under way
        # News that were kept back: where they begin, where the next byte belongs, how many.
        self._first = (0, 0)
        self._next = (-1, 0)
        self._length = 0
        self._checksums = bytearray()
        self._failed: list[int] = []
        self._corrupt: list[int] = []

    @property
    def accepts(self) -> bool:
        return self._strands.accepts

    @property
    def idle(self) -> bool:
        return not self._strand.count

    def take(self, chunk: Chunk) -> None:
        self._flushing = False
        work, copied = partial(self._copy, chunk), partial(self._copied, chunk)
        if chunk.length > HERE_BYTES_MAX or self._strand.count:
            self._strand.add(work, copied)
        else:
            self._strand.run(work, copied)

    def flush(self) -> None:
        if self._strand.count:
            self._flushing = True
        else:
            self._tell()

    def close(self) -> None:
        super().close()
        self._strand.drop()

    def _copy(self, chunk: Chunk) -> list[int]:
        """Bring a chunk; which of its blocks are bad. On a thread of the worker."""
        known = len(self._transfer.corrupt)
        self._transfer.bring(chunk)
        return self._transfer.corrupt[known:]

    def _copied(self, chunk: Chunk, corrupt: list[int] | Exception) -> None:
        chunk.release()
        if isinstance(corrupt, Exception):
            self.failure = self.failure or corrupt  # `Dropped` only when nobody asks any more
        if self.failure is not None or isinstance(corrupt, Exception):
            self.on_ready()  # nothing more is told: there would be a gap
            return
        begin = (chunk.piece, chunk.piece_offset)
        if chunk.length and begin != self._next:
            self._tell()
        if not self._length:
            self._first = begin
        if chunk.length:
            self._next = _after(self._pieces, *begin, chunk.length)
        self._length += chunk.length
        self._checksums += chunk.checksums
        self._failed += chunk.failed
        self._corrupt += corrupt
        if (
            self._length >= self._news_bytes_max
            or len(self._checksums) >= NEWS_CHECKSUM_BYTES_MAX
            or (self._flushing and not self._strand.count)
        ):
            self._tell()
        if not self._strand.count:
            self.on_ready()

    def _tell(self) -> None:
        if not (self._length or self._failed):
            return
        data = Data(
            checksums=bytes(self._checksums),
            failed=tuple(self._failed),
            corrupt=tuple(self._corrupt),
        )
        news = Placed(*self._first, self._length, data, verified=True)
        self._length = 0
        self._next = (-1, 0)
        self._checksums.clear()
        self._failed.clear()
        self._corrupt.clear()
        self.on_news(news)


class _CopiedTransfer(FetchTransfer):
    """Blocks that are copied to where they arrive, and hashed slice by slice while the cache of
    the core has them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Of blocks of which a group of layers is not complete: its checksums so far, and the state
        # of the layer that has begun.
        self._digests: dict[int, bytearray] = {}
        self._hashers: dict[int, xxh3_64] = {}

    def bring(self, chunk: Chunk) -> None:
        """Copy a chunk, and compare the pieces that end in it."""
        pieces, sources = self.pieces, _Sources(chunk.buffers)
        geometry, layer_first = pieces.geometry, pieces.layer_first
        header = Header(FrameType.DATA, 0, 0, 0, chunk.length, chunk.piece, chunk.piece_offset, 0)
        for index, start, take in self.claim(header):
            if self.outcomes[index] != PENDING:
                sources.copy(memoryview(bytearray(take)))  # of a block that has failed before
                continue
            at = start
            for view in slice_memory(self.memory[index], geometry, layer_first, start, take):
                for first in range(0, len(view), SLICE_BYTES):
                    part = view[first : first + SLICE_BYTES]
                    sources.copy(part)
                    self._hash(index, at, part)
                    at += len(part)
        self.data(header, chunk.checksums, chunk.failed)

    def _hash(self, index: int, at: int, part: memoryview) -> None:
        """Bytes of a block from `at` on are where they belong."""
        offsets, seed, begin = self.pieces.geometry.offsets, self.seed(index), at
        layer = bisect_right(offsets, at) - 1
        digests = self._digests.setdefault(index, bytearray())
        end = at + len(part)
        while at < end:
            layer_end = offsets[layer + 1]
            layer_part = part[at - begin : layer_end - begin]
            if at == offsets[layer] and layer_end <= end:
                digest = layer_checksum(layer_part, seed, layer)
            else:
                hasher = self._hashers.get(index)
                if hasher is None:
                    hasher = self._hashers[index] = layer_hasher(seed, layer)
                hasher.update(layer_part)
                if layer_end > end:
                    return
                del self._hashers[index]
                digest = hasher.intdigest()
            digests += digest.to_bytes(CHECKSUM_BYTES, "little")
            at = layer_end
            layer += 1

    def _verified(self, index: int, first: int, last: int, expected: bytes) -> bool:
        digests, count = self._digests[index], len(expected)
        same = digests[:count] == expected
        del digests[:count]  # a later group of the block may be there as well
        if not digests:
            del self._digests[index]
        return self._compared(index, same)


class CopyPuller(PutPuller):
    """Copies the blocks of a put out of its asker's memory.

    Args:
        memory: Of each block, in the asker's memory.
        strands: Of the connection.
    """

    transport = "shm"

    def __init__(self, memory: Sequence[BlockMemory], strands: Strands) -> None:
        super().__init__()
        self._memory = memory
        self._strand = Strand(strands)
        self._stopped = False

    @property
    def idle(self) -> bool:
        return not self._strand.count

    def pull(self, index: int, target: memoryview) -> None:
        self._strand.add(partial(self._copy, index, target), partial(self._copied, index))

    def stop(self) -> None:
        self._stopped = True
        self._strand.drop()

    def _copy(self, index: int, target: memoryview) -> None:
        """On a thread of the worker."""
        memory = self._memory[index]
        copy([memory] if isinstance(memory, memoryview) else memory, [target])

    def _copied(self, index: int, failure: Exception | None) -> None:
        if self._stopped:
            if self.idle:
                self.on_ready()
        elif failure is None:
            self.on_pulled(index)
        else:
            self.failure = self.failure or failure
            self.on_ready()


class _Sources:
    """Bytes that are to be copied, in order."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = deque(buffers)

    def copy(self, target: memoryview) -> None:
        """Fill a target with the next bytes. Other threads run meanwhile."""
        buffers, at, size = self._buffers, 0, len(target)
        while at < size:
            source = buffers[0]
            room = size - at
            if len(source) > room:
                buffers[0] = source[room:]
                source = source[:room]
            else:
                buffers.popleft()
            _copy_piece(target[at : at + len(source)], source)
            at += len(source)


def copy(sources: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
    """Copy bytes in order; both sides have as many, cut wherever they are. Other threads run
    meanwhile."""
    rest = _Sources(sources)
    for target in targets:
        rest.copy(target)


def _copy_piece(target: memoryview, source: memoryview) -> None:
    if len(source) < LETTING_BYTES_MIN:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _after(pieces: PieceMap, piece: int, offset: int, length: int) -> tuple[int, int]:
    """Where the byte behind `length` bytes belongs."""
    key_count, ranges = pieces.key_count, pieces.group_ranges
    while length:
        left = ranges[piece // key_count][3] - offset
        if length < left:
            return piece, offset + length
        length -= left
        piece += 1
        offset = 0
    return piece, 0


def _ignore(index: int, number: int) -> None:
    pass


__all__ = ["CHUNK_BYTES", "NEWS_BYTES_MAX", "CopyPuller", "CopySink", "copy"]
