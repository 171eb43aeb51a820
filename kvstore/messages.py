"""What travels in the metadata of frames: requests, replies and reports.

Encoding is MessagePack by the `msgpack` package with all its length limits set; decoding
goes through `msgspec.convert`, so that a value of a wrong type never reaches the code.
Fields are named on the wire; unknown ones are ignored, missing ones take their default, so
that a newer peer within the version window can add some.

Times travel as relative milliseconds: clocks of two hosts are never compared.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from kvstore.errors import RemoteProtocolError
from kvstore.fields import (
    ARRAY_ITEMS_MAX as ARRAY_ITEMS_MAX,
    DEADLINE_MS_MAX as DEADLINE_MS_MAX,
    ENDPOINT_MAX as ENDPOINT_MAX,
    KEYS_PER_REQUEST_MAX as KEYS_PER_REQUEST_MAX,
    LEASE_MS_MAX as LEASE_MS_MAX,
    LOOKUP_PROBES_MAX as LOOKUP_PROBES_MAX,
    NAMESPACES_PER_LOOKUP_MAX as NAMESPACES_PER_LOOKUP_MAX,
    NODE_ID_MAX as NODE_ID_MAX,
    REASON_MAX as REASON_MAX,
    REASONS_MAX as REASONS_MAX,
    REQUEST_NAME_MAX as REQUEST_NAME_MAX,
    Attempt as Attempt,
    Count as Count,
    DeadlineMs as DeadlineMs,
    Extents as Extents,
    Key as Key,
    Keys as Keys,
    Message as Message,
    NamespaceId as NamespaceId,
    Reason as Reason,
    Reasons as Reasons,
    RequestName as RequestName,
)
from kvstore.layout import Layout
from kvstore.loadreport import LoadReport
from kvstore.memorymessages import (
    RAILS_MAX,
    Map,
    Mapped,
    Memory,
    Rails,
    Renew,
    RenewReply,
    Share,
    Unshare,
)
from kvstore.wire import METADATA_BYTES_MAX, FrameType
from kvstore.words import (
    AckLevel as AckLevel,
    Channel as Channel,
    FetchOutcome as FetchOutcome,
    FetchSource as FetchSource,
    Order as Order,
    PutOutcome as PutOutcome,
    Role as Role,
    ServedBy as ServedBy,
    Tier as Tier,
)

# The encoder allocates this for each message, by itself 256 KiB, and more where it is needed.
ENCODE_BUFFER_BYTES = 1024
# Errors quote what a peer sent; the quotation of a megabyte helps nobody.
ERROR_TEXT_MAX = 1000


class Limits(Message, frozen=True, kw_only=True):
    """What a server takes at most; in WELCOME, so that clients split before they send."""

    keys_per_request: Annotated[int, Meta(ge=1, le=(1 << 62))] = KEYS_PER_REQUEST_MAX
    metadata_bytes: Annotated[int, Meta(ge=1024, le=(1 << 62))] = METADATA_BYTES_MAX
    in_flight_bytes: Count = 64 * 1024 * 1024
    deadline_ms: Count = DEADLINE_MS_MAX
    lease_ms: Count = LEASE_MS_MAX

    def within_ours(self) -> Limits:
        """What both sides take: a newer server may allow more than this build can send."""
        return msgspec.structs.replace(
            self,
            keys_per_request=min(self.keys_per_request, KEYS_PER_REQUEST_MAX),
            metadata_bytes=min(self.metadata_bytes, METADATA_BYTES_MAX),
            deadline_ms=min(self.deadline_ms, DEADLINE_MS_MAX),
            lease_ms=min(self.lease_ms, LEASE_MS_MAX),
        )


class Hello(Message, frozen=True, kw_only=True):
    """First frame of a client. `session` is 16 random bytes, equal on all its connections."""

    version_min: int
    version_max: int
    node_id: Annotated[str, Meta(min_length=1, max_length=NODE_ID_MAX)]
    role: Role
    session: Annotated[bytes, Meta(min_length=16, max_length=16)]
    channel: Channel
    capabilities: Annotated[
        tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=64)
    ] = ()
    token: Annotated[str, Meta(max_length=4096)] = ""


class Welcome(Message, frozen=True, kw_only=True):
    """The server's answer to HELLO.

    Attributes:
        capabilities: Ways into memory that it offers on this connection: `SHM`, `RDMA`, `VIEWS`
            of `kvstore.memorymessages`.
        host: What tells this host from others, "" if it has nothing to offer there.
        local: Its unix socket, for clients on this host.
    """

    version: int
    node_id: str
    boot_id: bytes
    role: Role
    capabilities: tuple[str, ...] = ()
    limits: Limits = Limits()
    host: Annotated[str, Meta(max_length=64)] = ""
    local: Annotated[str, Meta(max_length=ENDPOINT_MAX)] = ""


class OpenNamespace(Message, frozen=True, kw_only=True):
    """Asks for the namespace of a pool and a layout; opens a generation where there is none."""

    pool: Annotated[str, Meta(min_length=1, max_length=128)]
    layout: Layout


class NamespaceInfo(Message, frozen=True, kw_only=True):
    """One namespace as its server knows it."""

    namespace: NamespaceId
    pool: str
    generation: bytes
    layout: Layout
    block_count: int = 0
    used_bytes: int = 0


class ListNamespaces(Message, frozen=True, kw_only=True):
    """Asks for the namespaces of one pool, or of all when `pool` is empty."""

    pool: str = ""


class Namespaces(Message, frozen=True, kw_only=True):
    """Reply to OPEN_NAMESPACE (one entry) and NAMESPACES."""

    namespaces: tuple[NamespaceInfo, ...]


class Lookup(Message, frozen=True, kw_only=True):
    """Which of these keys are stored in *all* of the namespaces (one for each rank)?

    With `lease_ms` the blocks of the leading run of hits stay until the lease ends.
    """

    namespaces: Annotated[
        tuple[NamespaceId, ...], Meta(min_length=1, max_length=NAMESPACES_PER_LOOKUP_MAX)
    ]
    keys: Keys
    lease_ms: Annotated[int, Meta(ge=0, le=LEASE_MS_MAX)] = 0
    extents: Extents = ()


class LookupReply(Message, frozen=True, kw_only=True):
    """`bitmap` has a bit for each key, least significant first; `lease` 0 means none.

    An agent says which daemons did not answer, and which ones said no and why.
    """

    bitmap: bytes
    lease: int = 0
    unreachable: Annotated[
        tuple[Annotated[str, Meta(max_length=ENDPOINT_MAX)], ...], Meta(max_length=ARRAY_ITEMS_MAX)
    ] = ()
    refused: Annotated[
        tuple[tuple[Annotated[str, Meta(max_length=ENDPOINT_MAX)], Reason], ...],
        Meta(max_length=ARRAY_ITEMS_MAX),
    ] = ()


class Retain(Message, frozen=True, kw_only=True):
    """Asks an agent to keep the blocks of a fetch for an engine of its own node.

    Attributes:
        request: The engine's name of the request that the blocks belong to.
        attempt: Grows with each attempt at the request: a newer one ends what an older one
            has retained, and an older one retains nothing any more.
        lease_ms: How long they are kept for the engine's CLAIM.
    """

    request: RequestName
    attempt: Attempt = 0
    lease_ms: Annotated[int, Meta(ge=1, le=LEASE_MS_MAX)] = 10_000


class Fetch(Message, frozen=True, kw_only=True):
    """Asks for layers `[layer_first, layer_last)` of blocks; DATA frames and DONE answer.

    `group_layers` cuts the layers into groups for order=layer, 0 with order=block.
    `priority`: lower goes first among the requests of one connection. With `memory` the payload
    goes there by the way that the session has agreed on (RDMA, shared memory), and its DATA
    frames are only news of it.

    The rest is for agents; daemons ignore it.

    Attributes:
        source: See `FetchSource`.
        retain: Keep the blocks for an engine here; with source=any, for peers that pull them.
        decode_node: Node id of the agent that is the best relay, since its engine needs the
            bytes too; "" if it is not known.
        peer: Endpoint of another node's agent that holds, or is about to hold, what is not
            here; "" for none.
        wait_ms: How long blocks that are not here yet may still come (source=peer).
        hops: Nodes that have passed the request on. An agent takes none that has been passed
            on: one hop only.
    """

    namespace: NamespaceId
    keys: Keys
    layer_first: Annotated[int, Meta(ge=0, le=1024)]
    layer_last: Annotated[int, Meta(ge=1, le=1024)]
    group_layers: Annotated[int, Meta(ge=0, le=1024)] = 0
    deadline_ms: DeadlineMs
    priority: Annotated[int, Meta(ge=0, le=255)] = 0
    source: FetchSource = FetchSource.ANY
    retain: Retain | None = None
    decode_node: Annotated[str, Meta(max_length=NODE_ID_MAX)] = ""
    peer: Annotated[str, Meta(max_length=ENDPOINT_MAX)] = ""
    wait_ms: DeadlineMs = 0
    hops: Annotated[int, Meta(ge=0, le=255)] = 0
    extents: Extents = ()
    memory: Memory | None = None


class View(Message, frozen=True, kw_only=True):
    """Asks for blocks in the server's own memory, which MAP has made readable here: for local
    clients only. The reply comes when each block is there or has failed.

    Attributes:
        fetch: Which blocks, as a FETCH asks; its layers all of them, `group_layers` and `memory`
            without meaning.
        lease_ms: How long they stay as they are, until RELEASE; RENEW makes it longer.
        verify: Whether they are compared with their checksums first.
    """

    fetch: Fetch
    lease_ms: Annotated[int, Meta(ge=1, le=LEASE_MS_MAX)] = 10_000
    verify: bool = True


class ViewReply(Message, frozen=True, kw_only=True):
    """Where the blocks are.

    Attributes:
        done: As of a FETCH.
        offsets: For each key 8 bytes, little-endian: where the block begins in the mapped
            memory; without meaning for those that are no hit.
        lease: Keeps all of them; 0 if there is no hit.
        lease_ms: How long it holds: less than was asked for where the server grants no more.
        verify_us: What the comparison with the checksums took.
    """

    done: Done
    offsets: bytes
    lease: int = 0
    lease_ms: Count = 0
    verify_us: Count = 0


class Data(Message, frozen=True, kw_only=True):
    """Metadata of a DATA frame.

    Attributes:
        checksums: Layer checksums, 8 bytes each and little-endian, of every piece of which
            the first byte is in this frame, in order. Empty in a put (PUT announced them).
        failed: Indices of keys of which nothing (more) will come; DONE says why. Early news
            for a reader that waits for one layer of all blocks.
        corrupt: With the flag VERIFIED, indices of keys that do not match their checksums in
            the asker's memory.
        run: With the flag PLACED and above 0: the payload is there when the immediate of this
            number has come by RDMA, which may be before or after this frame.
    """

    checksums: bytes = b""
    failed: Annotated[tuple[int, ...], Meta(max_length=KEYS_PER_REQUEST_MAX)] = ()
    corrupt: Annotated[tuple[int, ...], Meta(max_length=KEYS_PER_REQUEST_MAX)] = ()
    run: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 0


class Done(Message, frozen=True, kw_only=True):
    """Ends a FETCH.

    Attributes:
        outcomes: One `FetchOutcome` a key, as bytes. HIT means that all of it was sent.
        tiers: One `Tier` a key, as bytes.
        served_by: One `ServedBy` a key, as bytes: an agent says how it got each block.
        errors: What went wrong behind the server, for people.
        plan: Why an agent took which way, for people.
        queued_us: From the arrival of the request until its first byte was sent.
        service_us: From then until the last.
        lost_runs: Runs of DATA frames whose payload will never come by RDMA.
        lost_rails: Places, in RAILS, of the queue pairs that were given up with such on them.
        report: The server's load at this moment.
    """

    outcomes: bytes
    tiers: bytes = b""
    served_by: bytes = b""
    errors: Reasons = ()
    plan: Annotated[str, Meta(max_length=ERROR_TEXT_MAX + 1)] = ""
    queued_us: Count = 0
    service_us: Count = 0
    lost_runs: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=0xFFFFFFFF)], ...], Meta(max_length=ARRAY_ITEMS_MAX)
    ] = ()
    lost_rails: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=RAILS_MAX - 1)], ...], Meta(max_length=RAILS_MAX)
    ] = ()
    report: LoadReport | None = None


class Put(Message, frozen=True, kw_only=True):
    """Announces blocks; WANT frames answer with those that shall be sent.

    Attributes:
        checksums: All layer checksums of all blocks, 8 bytes each, little-endian. Of an offer
            those of its layers.
        offer: To an agent: keep the blocks for peers that pull them, and store them nowhere.
        layer_first, layer_last: Layers of an offer; a block may be offered in several. Both 0
            for all, as it must be with what is to be stored.
        lease_ms: How long an offer is kept.
        retain: Of an offer: keep it as what is retained for this request instead, so that it ends
            when that is claimed and given back.
        memory: The server takes the bytes from there by itself; no WANT, no DATA.
    """

    namespace: NamespaceId
    keys: Keys
    checksums: bytes
    ack: AckLevel = AckLevel.MEMORY
    deadline_ms: DeadlineMs
    offer: bool = False
    layer_first: Annotated[int, Meta(ge=0, le=1024)] = 0
    layer_last: Annotated[int, Meta(ge=0, le=1024)] = 0
    lease_ms: Annotated[int, Meta(ge=0, le=LEASE_MS_MAX)] = 0
    retain: Retain | None = None
    extents: Extents = ()
    memory: Memory | None = None


class Want(Message, frozen=True, kw_only=True):
    """Blocks of a PUT that the server has reserved space for; may come several times."""

    indices: Annotated[tuple[int, ...], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]


class PutDone(Message, frozen=True, kw_only=True):
    """Ends a PUT. `outcomes`: one `PutOutcome` a key, as bytes; `errors` as in `Done`."""

    outcomes: bytes
    errors: Reasons = ()
    report: LoadReport | None = None


class Delete(Message, frozen=True, kw_only=True):
    """Removes blocks. Blocks that are leased or being sent go when they are free."""

    namespace: NamespaceId
    keys: Keys
    extents: Extents = ()


class DeleteReply(Message, frozen=True, kw_only=True):
    """`deleted`: one byte a key, 1 if it was there."""

    deleted: bytes


class Release(Message, frozen=True, kw_only=True):
    """Gives leases back."""

    leases: Annotated[tuple[int, ...], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]


class ReleaseReply(Message, frozen=True, kw_only=True):
    """`held`: for each lease, whether it had held until now."""

    held: tuple[bool, ...]


class Claim(Message, frozen=True, kw_only=True):
    """An engine takes over what the agent of its node has retained for a request.

    What is still on its way is claimed too. Repeated by the same engine it is answered alike,
    so that a lost answer costs nothing; claimed by one engine it is not found by another.
    """

    request: RequestName
    attempt: Attempt = 0
    lease_ms: Annotated[int, Meta(ge=1, le=LEASE_MS_MAX)] = 10_000


class ClaimReply(Message, frozen=True, kw_only=True):
    """What was claimed.

    Attributes:
        lease: Keeps the blocks until RELEASE or the end of its time; 0: nothing is retained
            for this request and attempt (it never was, its time is over, or it is taken).
        block_count: Blocks that are here or on their way.
        bytes: Of those that are here.
    """

    lease: int = 0
    block_count: Count = 0
    bytes: Count = 0


class Cancel(Message, frozen=True, kw_only=True):
    """Stops the request with this id of the same session; its DONE or PUT_DONE still comes."""

    request_id: Count


class CancelReply(Message, frozen=True, kw_only=True):
    """Whether the request was still known."""

    found: bool


class CorruptReport(Message, frozen=True, kw_only=True):
    """Tells a server that blocks it served failed verification; it checks its own copy."""

    namespace: NamespaceId
    keys: Keys


class CorruptReply(Message, frozen=True, kw_only=True):
    """`dropped`: one byte a key, 1 if the server's copy was bad and is gone."""

    dropped: bytes


class Subscribe(Message, frozen=True, kw_only=True):
    """Asks for LOAD_REPORT frames with this request's id on this connection, until it closes."""

    interval_ms: Annotated[int, Meta(ge=20, le=60_000)] = 200


class Empty(Message, frozen=True, kw_only=True):
    """Request or reply without content (PING, SUBSCRIBE reply, STATUS request)."""


class Status(Message, frozen=True, kw_only=True):
    """Reply to STATUS: what an operator sees of a node.

    Attributes:
        uptime_s: Seconds since the process started to serve.
        counters: Everything that has been counted since then, by name.
    """

    node_id: str
    version: str
    role: Role
    uptime_s: float
    report: LoadReport
    counters: dict[str, int] = msgspec.field(default_factory=dict)


class PoolAction(enum.StrEnum):
    """What `Pool` does."""

    LIST = "list"
    PIN = "pin"
    UNPIN = "unpin"
    RETIRE = "retire"
    SET_CAPACITY = "set-capacity"


class Pool(Message, frozen=True, kw_only=True):
    """Administers pools. `generation` is for PIN and RETIRE, `capacity_bytes` for the quota."""

    action: PoolAction
    pool: str = ""
    generation: bytes = b""
    capacity_bytes: Count = 0


class GenerationInfo(Message, frozen=True, kw_only=True):
    """One generation of a pool: one layout, ranks aside."""

    generation: bytes
    layout: Layout
    block_count: int = 0
    used_bytes: int = 0


class PoolInfo(Message, frozen=True, kw_only=True):
    """One pool. `capacity_bytes` 0 means no quota; `pinned` empty means none."""

    pool: str
    generations: tuple[GenerationInfo, ...]
    capacity_bytes: int = 0
    used_bytes: int = 0
    pinned: bytes = b""


class Pools(Message, frozen=True, kw_only=True):
    """Reply to POOL: the pools that it concerned, as they are now."""

    pools: tuple[PoolInfo, ...]


class Goaway(Message, frozen=True, kw_only=True):
    """The server takes no new requests; those under way finish."""

    reason: str = ""


class ErrorCode(enum.StrEnum):
    """Why a request was refused; each maps to one class of `kvstore.errors`."""

    PROTOCOL = "protocol"
    VERSION = "version"
    LAYOUT = "layout"
    NAMESPACE = "namespace"
    LIMIT = "limit"
    UNSUPPORTED = "unsupported"
    PERMISSION = "permission"
    DRAINING = "draining"
    BUSY = "busy"
    REFUSED = "refused"


class Error(Message, frozen=True, kw_only=True):
    """Refuses a request, or with request id 0 the connection. `field` names what is wrong."""

    code: ErrorCode
    message: str
    field: str = ""


def reasons(errors: Iterable[Exception]) -> tuple[str, ...]:
    """The first errors, each once and cut, as DONE and PUT_DONE tell them."""
    texts = dict.fromkeys(str(error)[:REASON_MAX] for error in errors)
    return tuple(itertools.islice(texts, REASONS_MAX))


def cut_text(text: str) -> str:
    """A text that a peer may have chosen, as long as errors quote it."""
    return text if len(text) <= ERROR_TEXT_MAX else text[:ERROR_TEXT_MAX] + "…"


#: What the metadata of each request holds. Types that are missing are answered with
#: ERROR "unsupported".
REQUESTS: dict[FrameType, type[Message]] = {
    FrameType.HELLO: Hello,
    FrameType.OPEN_NAMESPACE: OpenNamespace,
    FrameType.NAMESPACES: ListNamespaces,
    FrameType.LOOKUP: Lookup,
    FrameType.FETCH: Fetch,
    FrameType.DATA: Data,
    FrameType.PUT: Put,
    FrameType.DELETE: Delete,
    FrameType.RELEASE: Release,
    FrameType.CLAIM: Claim,
    FrameType.CANCEL: Cancel,
    FrameType.CORRUPT_REPORT: CorruptReport,
    FrameType.SUBSCRIBE: Subscribe,
    FrameType.STATUS: Empty,
    FrameType.PING: Empty,
    FrameType.POOL: Pool,
    FrameType.SHARE: Share,
    FrameType.UNSHARE: Unshare,
    FrameType.MAP: Map,
    FrameType.RAILS: Rails,
    FrameType.VIEW: View,
    FrameType.RENEW: Renew,
}

#: What the metadata of each frame from a server holds.
REPLIES: dict[FrameType, type[Message]] = {
    FrameType.WELCOME: Welcome,
    FrameType.OPEN_NAMESPACE: Namespaces,
    FrameType.NAMESPACES: Namespaces,
    FrameType.LOOKUP: LookupReply,
    FrameType.DATA: Data,
    FrameType.DONE: Done,
    FrameType.WANT: Want,
    FrameType.PUT_DONE: PutDone,
    FrameType.DELETE: DeleteReply,
    FrameType.RELEASE: ReleaseReply,
    FrameType.CLAIM: ClaimReply,
    FrameType.CANCEL: CancelReply,
    FrameType.CORRUPT_REPORT: CorruptReply,
    FrameType.SUBSCRIBE: Empty,
    FrameType.LOAD_REPORT: LoadReport,  # type: ignore[dict-item]
    FrameType.STATUS: Status,
    FrameType.PING: Empty,
    FrameType.POOL: Pools,
    FrameType.SHARE: Empty,
    FrameType.UNSHARE: Empty,
    FrameType.MAP: Mapped,
    FrameType.RAILS: Rails,
    FrameType.VIEW: ViewReply,
    FrameType.RENEW: RenewReply,
    FrameType.GOAWAY: Goaway,
    FrameType.ERROR: Error,
}

MessageT = TypeVar("MessageT", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """MessagePack of a message, for the metadata of a frame."""
    values = msgspec.to_builtins(message, builtin_types=(bytes,))
    packed: bytes = msgpack.packb(values, buf_size=ENCODE_BUFFER_BYTES)
    return packed


def decode(metadata: bytes | bytearray | memoryview, type: type[MessageT]) -> MessageT:
    """Decode and validate metadata.

    Raises:
        RemoteProtocolError: Not MessagePack, or not a `type`; says where.
    """
    return validate(unpack(metadata), type)


def unpack(metadata: bytes | bytearray | memoryview) -> Any:
    """MessagePack to Python values, with every length bounded.

    Raises:
        RemoteProtocolError: Not MessagePack.
    """
    length = len(metadata)
    if not length:
        return {}
    try:
        return msgpack.unpackb(
            metadata,
            raw=False,
            strict_map_key=True,
            max_bin_len=length,
            max_str_len=length,
            max_array_len=min(length, ARRAY_ITEMS_MAX),
            max_map_len=length,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(
            f"metadata of {length} bytes is not MessagePack: {error or type(error).__name__}"
        ) from error


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}: messages have none")


def validate(values: Any, type: type[MessageT]) -> MessageT:
    """Check unpacked values against a message type.

    Raises:
        RemoteProtocolError: Says which field is wrong and what was expected.
    """
    try:
        # MessagePack has bytes of its own: text in their place is no base64, but a mistake.
        return msgspec.convert(values, type, builtin_types=(bytes,))
    except (msgspec.ValidationError, OverflowError) as error:
        raise RemoteProtocolError(f"{type.__name__}: {cut_text(str(error))}") from error
