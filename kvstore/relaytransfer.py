"""Blocks that arrive to be passed on: news of each run of layers, with its checksums.

A reader can use a piece when all of it is here; a relay sends on what it has. Sans I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvstore.checksum import CHECKSUM_BYTES
from kvstore.layout import PieceMap
from kvstore.transfer import PENDING, BlockMemory, FetchTransfer


class LayerSink(Protocol):
    """Who is told of layers as they come. `index` counts the keys of the request."""

    def checksums_known(self, index: int, layer_first: int, checksums: bytes) -> None:
        """Checksums of the layers from `layer_first` on that will arrive next."""

    def layers_arrived(self, index: int, layer_first: int, layer_last: int) -> None:
        """Layers `[layer_first, layer_last)` of a block are in its memory."""


class RelayTransfer(FetchTransfer):
    """A fetch whose blocks are passed on while they arrive.

    Args:
        sink: Is told of checksums and layers. Nothing is told of a block that has failed, or
            once the transfer was abandoned.
        verify: Whether layers are compared with their checksums before they are told of. If
            not, the reader behind the next hop does it.
    """

    def __init__(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        memory: Sequence[BlockMemory],
        on_piece: Callable[[int, int], None],
        on_failed: Callable[[int, int], None],
        sink: LayerSink,
        verify: bool,
    ) -> None:
        super().__init__(namespace, keys, pieces, memory, on_piece, on_failed)
        self._sink = sink
        self._verify = verify

    def _arrived(self, piece: int, start: int, end: int) -> None:
        pieces = self.pieces
        group, index = divmod(piece, pieces.key_count)
        first, last, group_start, size = pieces.group_ranges[group]
        expected = self._expected[piece]
        if end == size:
            del self._expected[piece]
        if self._abandoned or self.outcomes[index] != PENDING:
            return
        if not start:
            self._sink.checksums_known(index, first, expected)
        # Layers of which the last byte is among those that have come now.
        offsets = pieces.geometry.offsets
        begin = first
        while offsets[begin + 1] - group_start <= start:
            begin += 1
        until = begin
        while until < last and offsets[until + 1] - group_start <= end:
            until += 1
        if until > begin:
            at = (begin - first) * CHECKSUM_BYTES
            known = expected[at : (until - first) * CHECKSUM_BYTES]
            if self._verify and not self._verified(index, begin, until, known):
                return
            self._sink.layers_arrived(index, begin, until)
        # The sink may have made this end.
        if end == size and not self._abandoned and self.outcomes[index] == PENDING:
            self._group_done(index, group)


__all__ = ["LayerSink", "RelayTransfer"]
