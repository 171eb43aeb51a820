"""Ways into the memory of one client, as its session has agreed on them."""

from __future__ import annotations

import os
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


def host_name() -> str:
    """What tells this host from others, to processes that may be in containers: of its boot,
    and of where it looks for sockets."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        mounts = os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return ""
    return f"{boot}-{mounts}"


__all__ = ["SessionMemory", "host_name"]
