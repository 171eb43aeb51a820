"""Load reports: a typed, numbered statement of a node's queues and rates."""

from __future__ import annotations

import enum

import msgspec

# Bounds a report to a few KiB; with more nodes than this waiting, the longest queues matter.
REQUESTERS_MAX = 64


class NodeState(enum.StrEnum):
    """What a node says of itself."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    DEGRADED = "DEGRADED"


class LinkLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One network link of a node, seen from the node.

    Attributes:
        name: The listener's endpoint ("tcp://0.0.0.0:7450").
        capacity_Bps: Configured, else the highest rate seen while busy; 0 is unknown.
        sent_Bps: Rate of payload sent, an exponentially weighted average.
        queued_bytes: Accepted from requests and not yet handed to the operating system.
    """

    name: str
    capacity_Bps: int = 0
    sent_Bps: int = 0
    queued_bytes: int = 0


class RequesterLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one requesting node has waiting here: the read queue of its storage NIC."""

    node_id: str
    queued_bytes: int = 0
    inflight_requests: int = 0


class DiskLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Disk queues and service times; all zero on a node without a disk tier."""

    queued_bytes: int = 0
    read_Bps: int = 0
    service_ms_p50: float = 0.0
    service_ms_p99: float = 0.0


class BufferLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Registered memory: bytes free, and bytes in all."""

    free_bytes: int = 0
    total_bytes: int = 0


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a selector, a router or an operator may know of a node.

    Attributes:
        node_id: The node's name, stable over restarts.
        boot_id: Random for each start of the process; a new one means queues began anew.
        seq: Grows by one with each report of a boot.
        interval_ms: The sender promises the next report within this time.
        state: See `NodeState`.
        links, disk, buffers: Loads of its parts.
        requesters: Requesting nodes whose queue changed since the last report, at most
            `REQUESTERS_MAX`; one whose queue became empty is named once with zeros.
        relay_queued_bytes: Agents only: bytes accepted for relaying and not yet sent on.
        willing: Agents only: whether new relay work is welcome.
    """

    node_id: str
    boot_id: bytes
    seq: int
    interval_ms: int
    state: NodeState
    links: tuple[LinkLoad, ...] = ()
    requesters: tuple[RequesterLoad, ...] = ()
    disk: DiskLoad = DiskLoad()
    buffers: BufferLoad = BufferLoad()
    relay_queued_bytes: int = 0
    willing: bool = False
