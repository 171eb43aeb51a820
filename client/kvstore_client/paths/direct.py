"""The path `direct`: storage to here. Through the agent of this node it is whatever path the
agent finds best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.messages import ServedBy
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath


class DirectPath(FetchPath):
    """Asks a daemon, receives into the caller's memory, verifies there."""

    name = "direct"
    way = ServedBy.DIRECT

    def terms(self, link: PeerLink, job: FetchJob, indices: Sequence[int]) -> dict[str, Any]:
        route = job.route
        if route.priority or route.hops:
            return {"priority": route.priority, "hops": route.hops}
        return {}


class AgentPath(FetchPath):
    """Asks the agent of this node, who takes the best way."""

    name = "agent"
    way = ServedBy.UNKNOWN  # the agent says it for each block

    def terms(self, link: PeerLink, job: FetchJob, indices: Sequence[int]) -> dict[str, Any]:
        route = job.route
        return {
            "priority": route.priority,
            "retain": route.retain,
            "decode_node": route.decode_node,
            "peer": route.peer,
            "wait_ms": route.wait_ms,
            "extents": job.extents(indices),
        }
