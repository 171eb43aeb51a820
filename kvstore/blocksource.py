"""The seam between the server shell and what it serves.

`kvstore.serving` speaks the protocol; a `BlockSource` answers it. `kvstored` serves the
storage engine, `kvagent` serves buffers that it fills from other nodes.

Thread rule: every method is called on the server's loop and must return at once. What takes
time (a disk, another node) is begun and later reported through `on_ready` / `on_decided`.

Data flows by *pull*: the server asks a fetch for its next chunk when the connection can take
more, so that a slow reader holds no more than a connection's window of pinned blocks.
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from kvstore.errors import Unsupported
from kvstore.layout import Layout, PieceMap
from kvstore.loadreport import BufferLoad, DiskLoad, LinkLoad
from kvstore.messages import (
    AckLevel,
    Claim,
    ClaimReply,
    Fetch,
    FetchOutcome,
    LookupReply,
    NamespaceInfo,
    Pool,
    PoolInfo,
    Put,
    PutOutcome,
)

AnswerT = TypeVar("AnswerT")
#: An answer, or the promise of one where other nodes have to be asked for it.
Answer: TypeAlias = AnswerT | Awaitable[AnswerT]

# What travels beside the payload of a chunk must fit into the metadata of its frame (1 MiB), with
# room for 4,096 indices of failed keys. Layers of a few bytes have more checksums than payload.
CHECKSUM_BYTES_PER_CHUNK_MAX = 512 * 1024


class Asker:
    """Who asks: one client with all its connections.

    Attributes:
        node_id: As it introduced itself.
        local: Whether it is on this host, by the socket that it came over.
        namespaces: Ids of those that were opened for it.
    """

    def __init__(self, node_id: str, local: bool = False) -> None:
        self.node_id = node_id
        self.local = local
        self.namespaces: set[bytes] = set()


class RelayLoad(NamedTuple):
    """For the load report of an agent: bytes accepted for other nodes and not yet sent on, and
    whether more are welcome."""

    queued_bytes: int = 0
    willing: bool = False


class Chunk(NamedTuple):
    """Payload for one DATA frame.

    Attributes:
        piece: Number of the piece that the first byte belongs to.
        piece_offset: Where in that piece the first byte belongs.
        buffers: The bytes, from here on through consecutive pieces. They stay valid and
            unchanged until `release` is called.
        length: Sum of the lengths of `buffers`.
        checksums: Layer checksums of every piece of which the first byte is in this chunk, at
            most `CHECKSUM_BYTES_PER_CHUNK_MAX`.
        release: Called once, when the transport has let go of the buffers (all sent, or the
            connection is gone).
        failed: Indices of keys that were found missing since the last chunk, as early news.
            A chunk may consist of nothing else (`length` 0).
        places: Where in the memory of this process each buffer begins, counted from the memory's
            first byte; only of streams that were asked to `locate`, and can.
    """

    piece: int
    piece_offset: int
    buffers: list[memoryview]
    length: int
    checksums: bytes
    release: Callable[[], None]
    failed: tuple[int, ...] = ()
    places: Sequence[int] = ()


class FetchStream(abc.ABC):
    """One fetch being answered. Created by `BlockSource.fetch`; the server pulls."""

    #: Set by the server; the stream calls it when `next_chunk` may give something again.
    on_ready: Callable[[], None]
    #: Set by the server before it asks for the first chunk: whether `Chunk.places` are wanted.
    locate = False

    @abc.abstractmethod
    def next_chunk(self, bytes_max: int) -> Chunk | None:
        """The next payload, of at most `bytes_max` bytes.

        None means nothing is ready: because the stream is `finished`, or because blocks are
        still on their way, in which case `on_ready` will be called.
        """

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether every block has an outcome and every byte was given out as a chunk."""

    @property
    @abc.abstractmethod
    def queued_bytes(self) -> int:
        """Bytes not yet given out, as far as known."""

    @abc.abstractmethod
    def stop(self, outcome: FetchOutcome) -> None:
        """End early: blocks that are not finished get `outcome`, and nothing more is given
        out. Chunks given out before keep their buffers until released."""

    @abc.abstractmethod
    def outcomes(self) -> bytes:
        """One `FetchOutcome` a key. Call when finished."""

    @abc.abstractmethod
    def tiers(self) -> bytes:
        """One `Tier` a key. Call when finished."""

    def served_by(self) -> bytes:
        """One `ServedBy` a key, or nothing where all are of this node's own store. Call when
        finished."""
        return b""

    def errors(self) -> Sequence[Exception]:
        """What went wrong at other nodes. Call when finished."""
        return ()

    def plan(self) -> str:
        """Why blocks came which way, for people. Call when finished."""
        return ""


class PutStream(abc.ABC):
    """One put being taken. Created by `BlockSource.put`; the server feeds it.

    The life of a block: announced → refused (it has an outcome) or *reserved* by
    `reserve` → its bytes are received into `target` → `received` → it has an outcome.
    """

    #: Set by the server; the stream calls it when outcomes were decided outside of a call.
    on_decided: Callable[[], None]

    @abc.abstractmethod
    def reserve(self, bytes_max: int) -> list[int]:
        """Decide on more of the announced blocks, in their order: reserve space of at most
        `bytes_max` bytes for those that need some, up to the first that finds no room in it.

        Returns:
            Indices of the blocks that the client shall send. Blocks that are there already,
            or find no space, get their outcome instead and are not among them.
        """

    @abc.abstractmethod
    def target(self, index: int) -> memoryview | None:
        """Where the bytes of a reserved block are to be written; None if it is not reserved
        (never was, already received, or the put was stopped)."""

    @abc.abstractmethod
    def received(self, index: int) -> None:
        """All bytes of a reserved block are in place: verify and store it."""

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether every block has an outcome."""

    @property
    @abc.abstractmethod
    def reserved_bytes(self) -> int:
        """Bytes reserved and not yet received."""

    @abc.abstractmethod
    def stop(self, outcome: PutOutcome) -> None:
        """End early: blocks that are not finished get `outcome`, reservations end.

        The server calls it only when nothing is being received into a target any more."""

    @abc.abstractmethod
    def outcomes(self) -> bytes:
        """One `PutOutcome` a key. Call when finished."""

    def errors(self) -> Sequence[Exception]:
        """What went wrong at other nodes. Call when finished."""
        return ()


def lookup_reply(found: tuple[bytes, int] | LookupReply) -> LookupReply:
    """What a source has found, as it travels."""
    if isinstance(found, LookupReply):
        return found
    return LookupReply(bitmap=found[0], lease=found[1])


class BlockSource(abc.ABC):
    """Answers lookup, fetch and put for keys.

    All methods raise `kvstore.errors.UnknownNamespace` for a namespace that is not open. An
    `Answer` that is awaited may raise what the method may.
    """

    @abc.abstractmethod
    def open_namespace(self, pool: str, layout: Layout, asker: Asker) -> Answer[NamespaceInfo]:
        """Find or open the namespace (and the generation) of a pool and a layout.

        Raises:
            LocalProtocolError: The layout or the name of the pool is impossible.
            LayoutMismatch: The pool is pinned to another layout; names the field.
            PermissionDenied: Whoever asks has no right on the pool.
            LimitExceeded: Too many namespaces.
        """

    @abc.abstractmethod
    def namespaces(self, pool: str) -> list[NamespaceInfo]:
        """The open namespaces of one pool, or of all when `pool` is empty."""

    @abc.abstractmethod
    def administer_pool(self, request: Pool) -> list[PoolInfo]:
        """List, pin, unpin, retire, or set the capacity of a pool."""

    @abc.abstractmethod
    def layer_bytes(self, namespace: bytes) -> tuple[int, ...]:
        """Bytes of each layer block in a namespace."""

    @abc.abstractmethod
    def lookup(
        self,
        namespaces: Sequence[bytes],
        keys: Sequence[bytes],
        lease_ms: int,
        owner: Asker,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> Answer[tuple[bytes, int] | LookupReply]:
        """Which keys are stored in all of `namespaces`?

        Args:
            lease_ms: With a value above 0, the blocks of the leading run of hits are leased.
            owner: Whose lease it is; `owner_gone(owner)` ends all of them.
            extents: Where they lie, as in `kvstore.messages.Lookup`.

        Returns:
            Bitmap, least significant bit first, and the number of the lease (0: none); or the
            whole reply, of who has more to say.
        """

    @abc.abstractmethod
    def fetch(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        asker: Asker,
        request: Fetch,
    ) -> FetchStream:
        """Begin to answer a fetch.

        Raises:
            Busy: There is no room for it now.
            RefusedError: The source does not give out blocks in the way that is asked for.
        """

    @abc.abstractmethod
    def put(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        checksums: bytes,
        ack: AckLevel,
        asker: Asker,
        request: Put,
    ) -> PutStream:
        """Begin to take a put.

        Args:
            checksums: All layer checksums of all blocks, as in `kvstore.messages.Put`; the
                server has checked their number.
        """

    @abc.abstractmethod
    def delete(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        asker: Asker,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> Answer[bytes]:
        """Remove blocks; one byte a key, 1 if it was there."""

    @abc.abstractmethod
    def release(self, leases: Sequence[int], owner: Asker) -> Answer[list[bool]]:
        """Give leases back; for each, whether it had held until now."""

    def claim(self, request: Claim, owner: Asker) -> ClaimReply:
        """An engine takes over what was retained for a request.

        Raises:
            Unsupported: This is no agent.
        """
        raise Unsupported("nothing is retained here: only the agent of a node does that")

    @abc.abstractmethod
    def check(self, namespace: bytes, keys: Sequence[bytes]) -> bytes:
        """Verify stored blocks now and drop the bad ones; one byte a key, 1 if dropped."""

    @abc.abstractmethod
    def owner_gone(self, owner: Asker) -> None:
        """A session ended: everything that it held is given back."""

    @abc.abstractmethod
    def buffer_load(self) -> BufferLoad:
        """For the load report."""

    @abc.abstractmethod
    def disk_load(self) -> DiskLoad:
        """For the load report."""

    def links(self) -> tuple[LinkLoad, ...]:
        """Links beside the listeners, for the load report."""
        return ()

    def relay_load(self) -> RelayLoad:
        """For the load report of an agent."""
        return RelayLoad()

    @property
    def degraded(self) -> bool:
        """Whether the node serves less than it should, for the load report."""
        return False

    @abc.abstractmethod
    def counters(self) -> dict[str, int]:
        """Everything the source has counted, by name; also used as metrics."""
