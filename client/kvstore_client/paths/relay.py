"""The path `relay`: storage to another node's agent to here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.messages import FetchSource, ServedBy
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath


class RelayPath(FetchPath):
    """Asks an agent, who reads by its own storage link; verifies here, behind the last hop.

    Only the request's own decode node is asked to keep the blocks: no other needs them.
    """

    name = "relay"
    way = ServedBy.RELAY

    def terms(self, link: PeerLink, job: FetchJob, indices: Sequence[int]) -> dict[str, Any]:
        route = job.route
        retained = route.retain is not None and link.peer == route.decode_node
        return {
            "source": FetchSource.RELAY,
            "priority": route.priority,
            "hops": route.hops,
            "retain": route.retain if retained else None,
            "extents": job.extents(indices),
        }
