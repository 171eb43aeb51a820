"""The path `peer`: what another node's agent holds, or is about to hold, to here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.messages import FetchSource, ServedBy
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath


class PeerPath(FetchPath):
    """Asks an agent for what is in its memory; storage is never read for it."""

    name = "peer"
    way = ServedBy.PEER

    def terms(self, link: PeerLink, job: FetchJob, indices: Sequence[int]) -> dict[str, Any]:
        route = job.route
        return {
            "source": FetchSource.PEER,
            "priority": route.priority,
            "hops": route.hops,
            "retain": route.retain,
            "wait_ms": route.wait_ms,
        }
