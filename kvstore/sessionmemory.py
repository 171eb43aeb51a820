"""Ways into the memory of one client, as its session has agreed on them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from kvstore.errors import Busy, TransportError
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.memorymessages import Memory
from kvstore.protocol.placing import FetchSink, PutPuller
from kvstore.protocol.strands import Strands
from kvstore.sharedregions import SharedRegions
from kvstore.transport.rdma_end import RdmaEnd


class SessionMemory:
    """What requests with `memory` are answered by.

    Args:
        who: The client, for errors.

    Attributes:
        shared: Regions that it has handed over.
        end: Our side of its queue pairs; None where payload does not go by RDMA.
    """

    def __init__(self, who: str) -> None:
        self.shared = SharedRegions(who)
        self.end: RdmaEnd | None = None

    def sink(
        self,
        memory: Memory,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        strands: Strands,
    ) -> FetchSink:
        """What brings a fetch into the memory that it names.

        Args:
            strands: Of the connection of the request.

        Raises:
            LimitExceeded, LocalProtocolError: What it names cannot be; see `SharedRegions.sink`.
            Busy: No queue pair is left.
        """
        if self.end is None:
            return self.shared.sink(memory, namespace, keys, pieces, strands)
        places = MemoryMap(
            memory, pieces.geometry, len(keys), pieces.layer_first, pieces.layer_last
        )
        try:
            return self.end.fetch_sink(places, pieces)
        except TransportError as error:
            raise Busy(str(error)) from error

    def puller(
        self, memory: Memory, geometry: Geometry, key_count: int, strands: Strands
    ) -> PutPuller:
        """What takes a put out of the memory that it names; raises as `sink`."""
        if self.end is None:
            return self.shared.puller(memory, geometry, key_count, strands)
        places = MemoryMap(memory, geometry, key_count, 0, geometry.layer_count)
        try:
            return self.end.put_puller(places, PieceMap(geometry, key_count))
        except TransportError as error:
            raise Busy(str(error)) from error

    def close(self) -> None:
        """The client is gone. Harmless when called again."""
        with contextlib.ExitStack() as ending:  # both, even if one fails
            ending.callback(self.shared.close)
            if self.end is not None:
                ending.callback(self.end.close)


__all__ = ["SessionMemory"]
