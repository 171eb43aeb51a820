"""What callers pass, checked and made into jobs before anything is sent. Any thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError, LocalProtocolError
from kvstore.layout import NAMESPACE_ID_BYTES, check_keys, check_pool
from kvstore.messages import (
    DEADLINE_MS_MAX,
    LEASE_MS_MAX,
    NODE_ID_MAX,
    REQUEST_NAME_MAX,
    AckLevel,
    Order,
    Pool,
    PoolAction,
    Retain,
)
from kvstore.transfer import check_memory
from kvstore_client.jobs import ANY_ROUTE, FetchJob, Offer, PutJob, Route
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import Chain
from kvstore_client.transports import TRANSPORTS

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


def check_transport(transport: str) -> str:
    """What is to move payload.

    Raises:
        ConfigError: There is no such thing.
    """
    if transport not in TRANSPORTS:
        raise ConfigError("transport", transport, f"must be one of {', '.join(TRANSPORTS)}")
    return transport


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


def check_retain(retain_for: tuple[str, int] | None, retain_s: float) -> Retain | None:
    """What is to be kept for an engine.

    Raises:
        LocalProtocolError: No name, a negative attempt, or kept longer than any agent does.
    """
    if retain_for is None:
        return None
    if not isinstance(retain_for, tuple | list) or len(retain_for) != 2:
        raise LocalProtocolError(f"retain_for={retain_for!r}: must be (request, attempt)")
    request, attempt = check_request(*retain_for)
    return Retain(request=request, attempt=attempt, lease_ms=max(1, check_lease(retain_s)))


def check_offer(
    namespace: Namespace,
    layers: range | None,
    offer_s: float,
    retain_for: tuple[str, int] | None,
) -> Offer:
    """What is offered, for how long, and for which request of the engine.

    Raises:
        LocalProtocolError: As of the checks of each.
    """
    span, lease_ms = check_layers(namespace, layers), check_lease(offer_s)
    return Offer(span, lease_ms, check_retain(retain_for, offer_s))


def check_request(request: str, attempt: int) -> tuple[str, int]:
    """An engine's name of a request, and the number of its attempt.

    Raises:
        LocalProtocolError: No name, a longer one than any agent takes, a negative attempt.
    """
    if not _is_text(request) or not 1 <= len(request) <= REQUEST_NAME_MAX:
        raise LocalProtocolError(f"request={request!r}: 1 to {REQUEST_NAME_MAX} characters")
    if type(attempt) is not int or not 0 <= attempt <= CAPACITY_BYTES_MAX:
        raise LocalProtocolError(f"attempt={attempt}: 0 to {CAPACITY_BYTES_MAX}")
    return request, attempt


def _is_text(value: object) -> bool:
    """Whether a peer can be told; one that cannot read a request breaks the connection."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def check_layers(namespace: Namespace, layers: range | None) -> range:
    """Consecutive layers of the blocks of a namespace; all by default.

    Raises:
        LocalProtocolError: None, or not within the block.
    """
    count = namespace.geometry.layer_count
    span = range(count) if layers is None else layers
    if span.step != 1 or not 0 <= span.start < span.stop <= count:
        raise LocalProtocolError(
            f"layers={layers}: must be consecutive and within range(0, {count})"
        )
    return span


def fetch_route(
    decode_node: str, retain_for: tuple[str, int] | None, retain_s: float, peer: str, wait_s: float
) -> Route:
    """How the blocks of a fetch may travel, see `AsyncClient.fetch`.

    Raises:
        LocalProtocolError: An argument is wrong; names it and what was expected.
        ConfigError: `peer` is no endpoint.
    """
    if not (decode_node or retain_for or peer):
        return ANY_ROUTE
    if not _is_text(decode_node) or len(decode_node) > NODE_ID_MAX:
        raise LocalProtocolError(f"decode_node={decode_node!r}: at most {NODE_ID_MAX} characters")
    return Route(
        decode_node=decode_node,
        retain=check_retain(retain_for, retain_s),
        peer=str(parse_endpoint(peer, "peer")) if peer else "",
        wait_ms=math.ceil(check_deadline(wait_s) * 1e3),
    )


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
    route: Route = ANY_ROUTE,
) -> FetchJob:
    """A job for the arguments of `AsyncClient.fetch`; it has no handle yet.

    Args:
        now: Loop time.
        route: As `fetch_route` makes it.

    Raises:
        LocalProtocolError: An argument is wrong; names it and what was expected.
    """
    deadline_s = check_deadline(deadline_s)
    wanted = check_chain(keys, first, chain)
    span = check_layers(namespace, layers)
    if order not in list(Order):
        raise LocalProtocolError(f"order={order!r}: must be one of {', '.join(Order)}")
    if type(group_layers) is not int or group_layers < 1:
        raise LocalProtocolError(f"group_layers={group_layers}: must be at least 1")
    sizes = namespace.geometry.layer_bytes[span.start : span.stop]
    memory = check_memory(into, len(wanted.wanted), sizes, "into", writable=True)
    groups = min(group_layers, len(span)) if order == Order.LAYER else 0
    return FetchJob(namespace, wanted, memory, span, groups, now, deadline_s, route)


def put_job(
    namespace: Namespace,
    keys: Sequence[bytes],
    blocks: object,
    *,
    first: int,
    chain: bool,
    deadline_s: float,
    now: float,
    offer: Offer | None = None,
) -> PutJob:
    """A job for the arguments of `AsyncClient.put` or `offer`; as `fetch_job`."""
    deadline_s = check_deadline(deadline_s)
    wanted = check_chain(keys, first, chain)
    sizes = namespace.geometry.layer_bytes
    if offer is not None:
        sizes = sizes[offer.layers.start : offer.layers.stop]
    memory = check_memory(blocks, len(wanted.wanted), sizes, "blocks", writable=False)
    return PutJob(namespace, wanted, memory, now, deadline_s, offer)
