"""What callers pass, checked and made into jobs before anything is sent. Any thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.errors import LocalProtocolError
from kvstore.layout import NAMESPACE_ID_BYTES, check_keys, check_pool
from kvstore.messages import (
    DEADLINE_MS_MAX,
    LEASE_MS_MAX,
    AckLevel,
    Order,
    Pool,
    PoolAction,
)
from kvstore.transfer import check_memory
from kvstore_client.jobs import FetchJob, PutJob
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import Chain

# What a count on the wire can hold.
CAPACITY_BYTES_MAX = 1 << 62


def check_deadline(deadline_s: float) -> float:
    """Seconds until the end of a request, 0 for one that is over.

    Raises:
        LocalProtocolError: Not a number, or longer than any peer waits.
    """
    if math.isnan(deadline_s) or deadline_s > DEADLINE_MS_MAX / 1e3:
        raise LocalProtocolError(f"deadline_s={deadline_s}: at most {DEADLINE_MS_MAX / 1e3:g}")
    return max(0.0, deadline_s)


def check_ack(ack: str) -> AckLevel:
    """The acknowledgement level of this name.

    Raises:
        LocalProtocolError: There is none.
    """
    if ack not in list(AckLevel):
        raise LocalProtocolError(f"ack={ack!r}: must be one of {', '.join(AckLevel)}")
    return AckLevel(ack)


def check_lease(lease_s: float) -> int:
    """Milliseconds of a lease, 0 for none.

    Raises:
        LocalProtocolError: Negative, or longer than any peer grants.
    """
    if not 0 <= lease_s <= LEASE_MS_MAX / 1e3:
        raise LocalProtocolError(f"lease_s={lease_s}: 0 to {LEASE_MS_MAX / 1e3:g}")
    return math.ceil(lease_s * 1e3)


def check_chain(keys: Sequence[bytes], first: int, linked: bool) -> Chain:
    """The blocks that a call is about, of a list that its caller may lengthen meanwhile.

    Raises:
        LocalProtocolError: A key of a wrong length or type, or `first` beyond the end.
    """
    keys = tuple(keys)
    if not 0 <= first <= len(keys):
        raise LocalProtocolError(f"first={first}: must be 0 to the {len(keys)} keys")
    check_keys(keys)
    return Chain(keys, first, linked)


def check_pool_request(
    action: PoolAction, pool: str = "", generation: bytes = b"", capacity_bytes: int = 0
) -> Pool:
    """A request about pools. LIST takes an empty name too, for all of them.

    Raises:
        LocalProtocolError: No pool has this name, no generation this id; a quota below zero.
    """
    if pool or action is not PoolAction.LIST:
        check_pool(pool)
    if action in (PoolAction.PIN, PoolAction.RETIRE) and (
        type(generation) is not bytes or len(generation) != NAMESPACE_ID_BYTES
    ):
        raise LocalProtocolError(
            f"generation={generation!r}: must be {NAMESPACE_ID_BYTES} bytes, as in GenerationInfo"
        )
    if not 0 <= capacity_bytes <= CAPACITY_BYTES_MAX:
        raise LocalProtocolError(f"capacity_bytes={capacity_bytes}: 0 to {CAPACITY_BYTES_MAX}")
    return Pool(action=action, pool=pool, generation=generation, capacity_bytes=capacity_bytes)


def fetch_job(
    namespace: Namespace,
    keys: Sequence[bytes],
    into: object,
    *,
    first: int,
    chain: bool,
    layers: range | None,
    order: str,
    group_layers: int,
    deadline_s: float,
    now: float,
) -> FetchJob:
    """A job for the arguments of `AsyncClient.fetch`; it has no handle yet.

    Args:
        now: Loop time.

    Raises:
        LocalProtocolError: An argument is wrong; names it and what was expected.
    """
    deadline_s = check_deadline(deadline_s)
    wanted = check_chain(keys, first, chain)
    geometry = namespace.geometry
    span = range(geometry.layer_count) if layers is None else layers
    if span.step != 1 or not 0 <= span.start < span.stop <= geometry.layer_count:
        raise LocalProtocolError(
            f"layers={layers}: must be consecutive and within range(0, {geometry.layer_count})"
        )
    if order not in list(Order):
        raise LocalProtocolError(f"order={order!r}: must be one of {', '.join(Order)}")
    if group_layers < 1:
        raise LocalProtocolError(f"group_layers={group_layers}: must be at least 1")
    sizes = geometry.layer_bytes[span.start : span.stop]
    memory = check_memory(into, len(wanted.wanted), sizes, "into", writable=True)
    groups = min(group_layers, len(span)) if order == Order.LAYER else 0
    return FetchJob(namespace, wanted, memory, span, groups, now, deadline_s)


def put_job(
    namespace: Namespace,
    keys: Sequence[bytes],
    blocks: object,
    *,
    first: int,
    chain: bool,
    deadline_s: float,
    now: float,
) -> PutJob:
    """A job for the arguments of `AsyncClient.put`; as `fetch_job`."""
    deadline_s = check_deadline(deadline_s)
    wanted = check_chain(keys, first, chain)
    sizes = namespace.geometry.layer_bytes
    memory = check_memory(blocks, len(wanted.wanted), sizes, "blocks", writable=False)
    return PutJob(namespace, wanted, memory, now, deadline_s)
