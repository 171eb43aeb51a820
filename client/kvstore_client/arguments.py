"""What callers pass, checked and made into jobs before anything is sent. Any thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.errors import LocalProtocolError
from kvstore.layout import check_keys
from kvstore.messages import DEADLINE_MS_MAX, LEASE_MS_MAX, AckLevel, Order
from kvstore.transfer import check_memory
from kvstore_client.jobs import FetchJob, PutJob
from kvstore_client.namespaces import Namespace


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


def check_chain(keys: Sequence[bytes], first: int) -> Sequence[bytes]:
    """The keys that a call is about: those of the chain from `first` on.

    Raises:
        LocalProtocolError: A key of a wrong length or type, or `first` beyond the end.
    """
    if not 0 <= first <= len(keys):
        raise LocalProtocolError(f"first={first}: must be 0 to the {len(keys)} keys")
    check_keys(keys)
    return keys[first:]


def fetch_job(
    namespace: Namespace,
    keys: Sequence[bytes],
    into: object,
    layers: range | None,
    order: str,
    group_layers: int,
    now: float,
    deadline_s: float,
) -> FetchJob:
    """A job for a fetch of `keys`.

    Args:
        into: Memory of the layers asked for: one contiguous buffer a block, or a list of
            layer buffers a block, or one buffer whose first axis is the block.
        layers: Consecutive layers; None for all.
        group_layers: Layers that are published together with order=layer.
        now: Loop time.
    """
    geometry = namespace.geometry
    wanted = range(geometry.layer_count) if layers is None else layers
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= geometry.layer_count:
        raise LocalProtocolError(
            f"layers={layers}: must be consecutive and within range(0, {geometry.layer_count})"
        )
    if order not in list(Order):
        raise LocalProtocolError(f"order={order!r}: must be one of {', '.join(Order)}")
    if group_layers < 1:
        raise LocalProtocolError(f"group_layers={group_layers}: must be at least 1")
    sizes = geometry.layer_bytes[wanted.start : wanted.stop]
    memory = check_memory(into, len(keys), sizes, "into", writable=True)
    groups = min(group_layers, len(wanted)) if order == Order.LAYER else 0
    return FetchJob(namespace, keys, memory, wanted, groups, now, now + deadline_s)


def put_job(
    namespace: Namespace, keys: Sequence[bytes], blocks: object, now: float, deadline_s: float
) -> PutJob:
    """A job for a put of `keys`; `blocks` is memory of all layers, as in `fetch_job`."""
    sizes = namespace.geometry.layer_bytes
    memory = check_memory(blocks, len(keys), sizes, "blocks", writable=False)
    return PutJob(namespace, keys, memory, now, now + deadline_s)
