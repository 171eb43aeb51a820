"""A client whose fetches all go by one relay: no policy of the product, but what measuring the
path `relay` by itself needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.errors import KVStoreError
from kvstore.loadreport import ReportTable
from kvstore_client import AsyncClient
from kvstore_client.selector import Inflight, Plan, PlannedRun, Policy, Request, Selector

# Of the client whose selector is replaced: it must use relays at all.
POLICY = Policy.ROUND_ROBIN


class _AllRelayed(Selector):
    """Sends every block by the first relay, whatever that costs."""

    __slots__ = ()

    def plan(
        self,
        request: Request,
        reports: ReportTable,
        inflight: Inflight,
        now: float,
        draws: Sequence[float],
    ) -> Plan:
        if not inflight.ring:
            return super().plan(request, reports, inflight, now, draws)
        relay = inflight.ring[0].node_id
        runs = [PlannedRun(span.first, span.last, span.daemon, relay) for span in request.spans]
        return Plan(runs, [], 0.0, "everything by the relay")


def relay_all(client: AsyncClient) -> None:
    """Let all fetches of a client that was started go by its relay.

    What a relay fails to bring, or brings much too late, comes directly, as ever: `Run.path`
    says so.

    Raises:
        KVStoreError: No relay has answered.
    """
    # There is no such policy to choose, so that its place is taken from outside. Were it not
    # there any more, another policy would be measured under this name.
    relays: Any = client.cluster.relays
    assert isinstance(relays._selector, Selector), "the selector is elsewhere now"
    relays._selector = _AllRelayed(POLICY)
    relay_known(client)


def relay_known(client: AsyncClient) -> None:
    """See that there is a relay at all, so that both paths are measured and not one.

    Raises:
        KVStoreError: None has answered.
    """
    relays = client.cluster.relays
    if not relays.inflight.ring:
        link = relays.links[0]
        raise KVStoreError(f"{link.endpoint}: no relay: {link.unavailable()}")


__all__ = ["POLICY", "relay_all", "relay_known"]
