"""One sample of every message, for each direction: the rows of the table tests."""

from __future__ import annotations

import msgspec

from kvstore.layout import Layout
from kvstore.loadreport import (
    BufferLoad,
    DiskLoad,
    LinkLoad,
    LoadReport,
    NodeState,
    RequesterLoad,
)
from kvstore.messages import (
    AckLevel,
    Cancel,
    CancelReply,
    Channel,
    Claim,
    ClaimReply,
    CorruptReply,
    CorruptReport,
    Data,
    Delete,
    DeleteReply,
    Done,
    Empty,
    Error,
    ErrorCode,
    Fetch,
    FetchSource,
    GenerationInfo,
    Goaway,
    Hello,
    Limits,
    ListNamespaces,
    Lookup,
    LookupReply,
    NamespaceInfo,
    Namespaces,
    OpenNamespace,
    Pool,
    PoolAction,
    PoolInfo,
    Pools,
    Put,
    PutDone,
    Release,
    ReleaseReply,
    Retain,
    Role,
    Status,
    Subscribe,
    Want,
    Welcome,
)
from kvstore.wire import FrameType
from tests.support.engine import key
from tests.support.frames import NAMESPACE

KEYS = [key(number) for number in range(3)]
LAYOUT = Layout(
    model_id="model",
    dtype="bfloat16",
    block_tokens=16,
    layer_bytes=(40, 24, 100),
    weights_digest="d1",
    tp_rank=1,
    tp_size=2,
    extras=(("isa", "x86"), ("lora", "none")),
)
REPORT = LoadReport(
    node_id="server",
    boot_id=bytes(16),
    seq=7,
    interval_ms=200,
    state=NodeState.DRAINING,
    links=(LinkLoad(name="tcp://127.0.0.1:7450", capacity_Bps=10**10, queued_bytes=5),),
    requesters=(RequesterLoad(node_id="client", queued_bytes=3, inflight_requests=1),),
    disk=DiskLoad(service_ms_p50=0.5),
    buffers=BufferLoad(free_bytes=1, total_bytes=2),
    willing=True,
)

#: What a client sends, by type.
FROM_CLIENT: dict[FrameType, msgspec.Struct] = {
    FrameType.HELLO: Hello(
        version_min=1,
        version_max=3,
        node_id="client",
        role=Role.AGENT,
        session=bytes(range(16)),
        channel=Channel.CONTROL,
        capabilities=("relay",),
        token="secret",
    ),
    FrameType.OPEN_NAMESPACE: OpenNamespace(pool="pool", layout=LAYOUT),
    FrameType.NAMESPACES: ListNamespaces(pool="pool"),
    FrameType.LOOKUP: Lookup(namespaces=(NAMESPACE, bytes(32)), keys=KEYS, lease_ms=10_000),
    FrameType.FETCH: Fetch(
        namespace=NAMESPACE,
        keys=KEYS,
        layer_first=1,
        layer_last=3,
        group_layers=1,
        deadline_ms=5000,
        priority=9,
        source=FetchSource.RELAY,
        retain=Retain(request="r-1", attempt=2, lease_ms=9),
        decode_node="decode-1",
        peer="tcp://10.0.0.1:7460",
        wait_ms=100,
        hops=1,
        extents=((2, KEYS[0]), (1, bytes(64))),
    ),
    FrameType.DATA: Data(),
    FrameType.PUT: Put(
        namespace=NAMESPACE,
        keys=KEYS,
        checksums=bytes(range(72)),
        ack=AckLevel.SYNCED,
        deadline_ms=1,
        offer=True,
        layer_first=1,
        layer_last=3,
        lease_ms=1000,
    ),
    FrameType.DELETE: Delete(namespace=NAMESPACE, keys=KEYS),
    FrameType.RELEASE: Release(leases=(1, 1 << 40)),
    FrameType.CLAIM: Claim(request="r-1", attempt=2, lease_ms=60_000),
    FrameType.CANCEL: Cancel(request_id=1 << 60),
    FrameType.CORRUPT_REPORT: CorruptReport(namespace=NAMESPACE, keys=KEYS),
    FrameType.SUBSCRIBE: Subscribe(interval_ms=20),
    FrameType.STATUS: Empty(),
    FrameType.PING: Empty(),
    FrameType.POOL: Pool(
        action=PoolAction.SET_CAPACITY, pool="pool", generation=bytes(32), capacity_bytes=1 << 62
    ),
}

_INFO = NamespaceInfo(
    namespace=NAMESPACE,
    pool="pool",
    generation=bytes(32),
    layout=LAYOUT,
    block_count=3,
    used_bytes=492,
)

#: What a server sends, by type.
FROM_SERVER: dict[FrameType, msgspec.Struct] = {
    FrameType.WELCOME: Welcome(
        version=1,
        node_id="server",
        boot_id=bytes(range(16)),
        role=Role.DAEMON,
        capabilities=("arena",),
        limits=Limits(keys_per_request=100, in_flight_bytes=1 << 20),
    ),
    FrameType.OPEN_NAMESPACE: Namespaces(namespaces=(_INFO,)),
    FrameType.NAMESPACES: Namespaces(namespaces=()),
    FrameType.LOOKUP: LookupReply(bitmap=b"\x05", lease=9),
    FrameType.DATA: Data(checksums=bytes(range(24)), failed=(2,)),
    FrameType.DONE: Done(
        outcomes=b"\1\1\4",
        tiers=b"\0\0\0",
        served_by=b"\0\0\0",
        queued_us=1,
        service_us=2,
        report=REPORT,
    ),
    FrameType.WANT: Want(indices=(0, 2)),
    FrameType.PUT_DONE: PutDone(outcomes=b"\0\1\6", report=REPORT),
    FrameType.DELETE: DeleteReply(deleted=b"\1\0\1"),
    FrameType.RELEASE: ReleaseReply(held=(True, False)),
    FrameType.CLAIM: ClaimReply(lease=3, block_count=4096, bytes=1 << 40),
    FrameType.CANCEL: CancelReply(found=True),
    FrameType.CORRUPT_REPORT: CorruptReply(dropped=b"\0\0\1"),
    FrameType.SUBSCRIBE: Empty(),
    FrameType.LOAD_REPORT: REPORT,
    FrameType.STATUS: Status(
        node_id="server",
        version="0.1",
        role=Role.DAEMON,
        uptime_s=1.5,
        report=REPORT,
        counters={"fetch_hits": 3},
    ),
    FrameType.PING: Empty(),
    FrameType.POOL: Pools(
        pools=(
            PoolInfo(
                pool="pool",
                generations=(GenerationInfo(generation=bytes(32), layout=LAYOUT, block_count=1),),
                capacity_bytes=1 << 40,
                pinned=bytes(32),
            ),
        )
    ),
    FrameType.GOAWAY: Goaway(reason="shutting down"),
    FrameType.ERROR: Error(code=ErrorCode.LAYOUT, message="another dtype", field="dtype"),
}
