"""Ways into the memory of one client, as its session has agreed on them."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import Memory
from kvstore.protocol.placing import FetchSink, PutPuller
from kvstore.sharedregions import SharedRegions


class SessionMemory:
    """What requests with `memory` are answered by.

    Args:
        who: The client, for errors.

    Attributes:
        shared: Regions that it has handed over.
    """

    def __init__(self, who: str) -> None:
        self.shared = SharedRegions(who)

    def sink(
        self, memory: Memory, namespace: bytes, keys: Sequence[bytes], pieces: PieceMap
    ) -> FetchSink:
        """What brings a fetch into the memory that it names; raises as `SharedRegions.sink`."""
        return self.shared.sink(memory, namespace, keys, pieces)

    def puller(self, memory: Memory, geometry: Geometry, key_count: int) -> PutPuller:
        """What takes a put out of the memory that it names; raises as `SharedRegions.sink`."""
        return self.shared.puller(memory, geometry, key_count)

    def close(self) -> None:
        """The client is gone. Harmless when called again."""
        self.shared.close()


__all__ = ["SessionMemory"]
