"""Clusters in network namespaces with rate-limited links, on one machine."""

from __future__ import annotations

from kvstore_bench.shaped.namespaces import InterfaceCounters, ShapingUnavailable
from kvstore_bench.shaped.network import (
    COMPUTE,
    MBIT,
    STORAGE,
    Link,
    NodePlan,
    ShapedNetwork,
    cluster_plans,
)
from kvstore_bench.shaped.nodes import AGENT_PORT, DAEMON_PORT, Node, NodeFailed

__all__ = [
    "AGENT_PORT",
    "COMPUTE",
    "DAEMON_PORT",
    "MBIT",
    "STORAGE",
    "InterfaceCounters",
    "Link",
    "Node",
    "NodeFailed",
    "NodePlan",
    "ShapedNetwork",
    "ShapingUnavailable",
    "cluster_plans",
]
