"""How a cluster of daemons is used."""

from __future__ import annotations

import msgspec

from kvstore.messages import Role
from kvstore_client.selector import Policy
from kvstore_client.transports import AUTO


class ClusterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a client introduces itself and how long it waits.

    Attributes:
        node_id: Name of this node, the same for all clients on it.
        token: Credentials.
        copies: Daemons that get each block: 1, or 2 to survive the loss of one.
        connect_timeout_s: For connecting, and for requests without payload.
        seed: Of backoff, ramp-in and the selector; None draws one.
        relays: Endpoints of agents that may relay for this node.
        policy: How fetches are spread over the paths.
        role: How this node introduces itself.
        transport: What is to move payload; see `AsyncClient`.
        verify: Whether what comes is compared with its checksums.
    """

    node_id: str
    token: str = ""
    copies: int = 1
    connect_timeout_s: float = 1.0
    seed: int | None = None
    relays: tuple[str, ...] = ()
    policy: Policy = Policy.BALANCED
    role: Role = Role.CLIENT
    transport: str = AUTO
    verify: bool = True


__all__ = ["ClusterOptions"]
