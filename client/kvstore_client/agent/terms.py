"""How a fetch is answered by an agent, as its source and its route say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.messages import FetchSource
from kvstore_client.agent.fills import FillKind
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.jobs import ANY_ROUTE, Route

# What a fetch may have taken up and not sent. Four requests of a relay, so that storage is
# never idle; 100 ms at 1.3 Gbit/s. Two blocks at least, or one would wait for the other.
WINDOW_BYTES = 16 * 1024 * 1024
# Of a fetch for an engine of this node. Its blocks are spread over several paths, each of
# which has 100 ms of its rate under way.
OWN_WINDOW_BYTES = 64 * 1024 * 1024
# A relay asks storage for this much at a time: requests are cheap at that size, and what is
# cancelled is soon gone.
RUN_BYTES = 4 * 1024 * 1024
# What goes by several paths is planned as a whole, as far as the window goes.
OWN_RUN_BYTES = OWN_WINDOW_BYTES


class FetchTerms(NamedTuple):
    """How a fetch is to be answered.

    Attributes:
        source: Where blocks that are not here may come from.
        deadline_at: Loop time until which the asker waits.
        wait_until: With source=peer: loop time until which blocks may still appear.
        route: How what is missing travels.
        peer_route: Which way is tried before that; None for none.
        retain: Told of blocks that are taken up, to keep them; None if they need not be kept.
    """

    source: FetchSource
    deadline_at: float
    wait_until: float = 0.0
    route: Route = ANY_ROUTE
    peer_route: Route | None = None
    retain: Callable[[Sequence[HeldBlock]], None] | None = None


class SourceTerms(NamedTuple):
    """What follows from the source of a fetch.

    Attributes:
        kind: What blocks that are missing are filled by.
        joined: The fills of others that it may wait for, up to this kind: no two nodes ever
            wait for each other.
        window_bytes, run_bytes: See `WINDOW_BYTES` and `RUN_BYTES`.
        counter: What counts the bytes that are given out.
    """

    kind: FillKind | None
    joined: FillKind
    window_bytes: int
    run_bytes: int
    counter: str


SOURCES = {
    FetchSource.ANY: SourceTerms(
        FillKind.ANY, FillKind.PEER, OWN_WINDOW_BYTES, OWN_RUN_BYTES, "own_bytes"
    ),
    FetchSource.RELAY: SourceTerms(
        FillKind.STORAGE, FillKind.STORAGE, WINDOW_BYTES, RUN_BYTES, "relay_bytes_out"
    ),
    FetchSource.PEER: SourceTerms(None, FillKind.ANY, WINDOW_BYTES, RUN_BYTES, "peer_bytes_out"),
}


__all__ = ["SOURCES", "FetchTerms", "SourceTerms"]
