"""A store filled with blocks of no content, and a client of its server without a network.

What `kvstore_bench.engine_cost` measures on: the arena is memory that is mapped and never
written, and blocks enter it as a put enters them (reserve, publish, enqueue).
"""

from __future__ import annotations

import mmap
import socket
import sys
import time
from collections.abc import Callable, Iterable

from kvstore.checksum import CHECKSUM_BYTES
from kvstore.layout import Layout
from kvstore.messages import Channel, Role, encode
from kvstore.protocol import hello_message
from kvstore.serving import Server, ServerConnection
from kvstore.transport.sockets import SocketStream
from kvstore.wire import FrameType, encode_header
from kvstore_daemon.engine.eviction import Ghosts
from kvstore_daemon.engine.store import PAGE_BYTES
from kvstore_daemon.source import ArenaSource

#: Keys of one lookup: a context of 32,000 tokens in blocks of 16.
PREFIX_KEYS = 2000
KEY_BYTES = 32
#: Layers of a block; matters for its checksums alone.
LAYERS = 32
#: Blocks of one put.
PUT_BLOCKS = 64

#: Told what is done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]


class Bed:
    """A store with an arena of as many blocks, in which nothing is ever written.

    Args:
        blocks: How many fit.
        names: Keys of all blocks that will be put, one behind the other.
    """

    def __init__(self, blocks: int, names: bytes) -> None:
        self.blocks = blocks
        self._names = names
        # Read only, so that the system sets no memory aside for what is not written.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        arena = mmap.mmap(-1, blocks * PAGE_BYTES, flags=flags, prot=mmap.PROT_READ)
        self.source = ArenaSource(memoryview(arena))
        layout = Layout(
            model_id="model",
            dtype="bfloat16",
            block_tokens=16,
            layer_bytes=(PAGE_BYTES // LAYERS,) * LAYERS,
        )
        self.store = self.source.store
        self.namespace = self.store.open_namespace("pool", layout)
        self.policy = self.namespace.pool.policy
        # One object for all: checksums are counted by their own.
        self.checksums = bytes(self.namespace.geometry.layer_count * CHECKSUM_BYTES)

    def key(self, number: int) -> bytes:
        """The key of a block: a new object each time, as out of a frame."""
        return self._names[number * KEY_BYTES : (number + 1) * KEY_BYTES]

    def session(self, number: int) -> list[bytes]:
        """Keys of a prefix; its blocks were put between those of all other sessions."""
        sessions = self.blocks // PREFIX_KEYS
        first = number % sessions
        return [self.key(first + at * sessions) for at in range(PREFIX_KEYS)]

    def put(self, first: int, last: int, progress: Progress, label: str) -> float:
        """Put blocks `[first, last)` of the names; seconds that the longest put took."""
        store, namespace, checksums = self.store, self.namespace, self.checksums
        longest_s = 0.0
        for begin in range(first, last, PUT_BLOCKS):
            began_at = time.perf_counter()
            slots = []
            for number in range(begin, min(begin + PUT_BLOCKS, last)):
                slot = store.reserve(namespace)
                assert slot, "nothing is pinned here, so there is always space"
                store.publish(namespace, self.key(number), slot, checksums)
                slots.append(slot)
            store.enqueue(namespace, slots)
            longest_s = max(longest_s, time.perf_counter() - began_at)
            progress(label, begin - first, last - first)
        return longest_s

    def checksums_bytes(self) -> int:
        """Bytes of the column that refers to checksums, and of nothing that it refers to."""
        return sys.getsizeof(self.store.index.checksums)

    def parts(self) -> dict[str, int]:
        """Bytes of each part of the index as its objects tell; checksums are no part of it."""
        store, policy = self.store, self.policy
        ghosts = [part for part in vars(policy).values() if isinstance(part, Ghosts)]
        slots = self.namespace.slots
        key = next(iter(slots))
        return {
            "columns of the index": _size(vars(store.index).values()) - self.checksums_bytes(),
            "extents of the allocator": _size(vars(store.allocator).values()),
            "lists of the eviction policy": _size(vars(policy).values()),
            "ghosts of the eviction policy": sum(_size(vars(part).values()) for part in ghosts),
            "table from key to slot": slots.size_bytes,
            "keys": len(slots) * sys.getsizeof(key),
        }


class Caller:
    """One client of a server, without a network: frames go in, replies come out.

    The sockets only stand for a connection; nothing is sent through them.
    """

    def __init__(self, server: Server) -> None:
        near, self._far = socket.socketpair()
        self._connection = ServerConnection(server, SocketStream(near, "unix", "here"), "here")
        server.connections.add(self._connection)
        hello = hello_message("engine-cost", Role.CLIENT, bytes(16), Channel.CONTROL)
        self.call(frame(FrameType.HELLO, 0, encode(hello)))

    def call(self, request: bytes) -> bytes:
        """The bytes of the reply to the bytes of a request."""
        protocol, left = self._connection.protocol, memoryview(request)
        while left:
            count = 0
            for view in protocol.reader.buffers():
                take = min(len(view), len(left))
                view[:take] = left[:take]
                left = left[take:]
                count += take
            protocol.receive(count)
        protocol.fill()
        reply = b"".join(protocol.writer.buffers())
        protocol.writer.sent(len(reply))
        return reply

    def close(self) -> None:
        """Let the sockets go; the server closes its own."""
        self._far.close()


def frame(type: FrameType, request_id: int, metadata: bytes) -> bytes:
    """A whole frame without payload."""
    return encode_header(type, request_id, metadata) + metadata


def _size(objects: Iterable[object]) -> int:
    """Bytes of containers, without what they refer to."""
    return sum(map(sys.getsizeof, objects))


__all__ = ["KEY_BYTES", "LAYERS", "PREFIX_KEYS", "PUT_BLOCKS", "Bed", "Caller", "Progress", "frame"]
