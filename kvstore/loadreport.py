"""Load reports: a typed, numbered statement of a node's queues and rates.

The sender asks `ReportSchedule` when to push and `RequesterTable` which queues to name; the
receiver keeps what it was told in a `ReportTable`, with its age.

Queues of requesters are soft state (D. Clark, "The Design Philosophy of the DARPA Internet
Protocols", SIGCOMM 1988): a changed one is named in every report for a while, any other now
and then, and a receiver forgets those it hears of no more. So no report needs to arrive, and
the same report serves every receiver.

Pure: `now` is in seconds of the caller's own monotonic clock; no time crosses the wire.
"""

from __future__ import annotations

import enum
import math

import msgspec

# Bounds a report to a few KiB; with more nodes than this waiting, the longest queues matter.
REQUESTERS_MAX = 64
# A changed queue is named in every report for this long: five pushes at the slowest, so
# that a receiver which misses one or two of them still knows within the second.
REQUESTER_CHANGED_S = 1.0
# An unchanged queue is named again after this long, for receivers that came later.
REQUESTER_REFRESH_S = 1.0
# It is then named in every report for longer than the usual interval of pushes, since one
# report goes to some receivers only (a reply, a push to those with another interval).
REQUESTER_NAMED_S = 0.25
# A receiver forgets a queue that was not named for five refreshes.
REQUESTER_FORGET_S = 5.0
# What a receiver remembers of one node: as many as a daemon accepts connections by default.
REQUESTERS_KNOWN_MAX = 1024

# A change is worth telling at most this often: 50 reports of some hundred bytes a second.
PUSH_GAP_S = 0.02
# A push at least this often, so that silence means something.
PUSH_INTERVAL_S = 0.2
# Two intervals: one report may be late or lost before a receiver begins to doubt.
FRESH_S_MAX = 0.4
# Five intervals: a queue of that age says nothing any more.
STALE_S_MIN = 1.0

# Node ids are what peers claim to be; this many bound the memory of a receiver, and are more
# than any fleet that one selector speaks to.
NODES_MAX = 4096


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
        requesters: Requesting nodes and their queues here, the longest first, at most
            `REQUESTERS_MAX`; changed ones mostly, and zeros for a queue that became empty.
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


class Freshness(enum.StrEnum):
    """How far a report may be believed."""

    FRESH = "fresh"
    WIDEN = "widen"
    """Somewhat old: the estimate made from it gets wider."""
    STALE = "stale"
    """Too old, or there was none: ranked behind every node with a fresh one."""


class ReportSchedule:
    """When a sender pushes: on a change at most every 20 ms, else every `interval_s`.

    Attributes:
        due_at: When the next push is due; the past for one that is due now.
    """

    __slots__ = ("_interval_s", "_pushed_at", "due_at")

    def __init__(self, interval_s: float = PUSH_INTERVAL_S) -> None:
        self._interval_s = max(interval_s, PUSH_GAP_S)
        self._pushed_at = -math.inf
        self.due_at = -math.inf

    def changed(self) -> None:
        """Something that a report says is no longer so."""
        self.due_at = self._pushed_at + PUSH_GAP_S

    def due(self, now: float) -> bool:
        """Whether a report shall be pushed now."""
        return now >= self.due_at

    def pushed(self, now: float) -> None:
        """A report with everything known at `now` was pushed."""
        self._pushed_at = now
        self.due_at = now + self._interval_s


class _Queue:
    __slots__ = ("changed_at", "load", "named_at")

    def __init__(self, load: RequesterLoad, now: float) -> None:
        self.load = load
        self.changed_at = now
        self.named_at = -math.inf


class RequesterTable:
    """What each requesting node has waiting here, and which of them a report names.

    Holds an entry a node with a queue, and for a second longer; the caller bounds their
    number by the connections that it accepts.
    """

    __slots__ = ("_queues",)

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def set(self, now: float, load: RequesterLoad) -> None:
        """The queue of `load.node_id` is now as `load` says; zeros for none."""
        queue = self._queues.get(load.node_id)
        if queue is None:
            if load.queued_bytes or load.inflight_requests:
                self._queues[load.node_id] = _Queue(load, now)
        elif queue.load != load:
            queue.load = load
            queue.changed_at = now

    def select(self, now: float) -> tuple[RequesterLoad, ...]:
        """The queues to name in a report made now, the longest first."""
        chosen: list[_Queue] = []
        for node_id, queue in list(self._queues.items()):
            changed = now - queue.changed_at <= REQUESTER_CHANGED_S
            empty = not (queue.load.queued_bytes or queue.load.inflight_requests)
            if empty and not changed:
                del self._queues[node_id]
            elif (
                changed
                or now - queue.named_at >= REQUESTER_REFRESH_S
                or now - queue.named_at <= REQUESTER_NAMED_S
            ):
                chosen.append(queue)
        chosen.sort(key=lambda q: (-q.load.queued_bytes, -q.load.inflight_requests, q.load.node_id))
        del chosen[REQUESTERS_MAX:]
        for queue in chosen:
            if now - queue.named_at > REQUESTER_NAMED_S:
                queue.named_at = now  # the first report of those that name it
        return tuple(queue.load for queue in chosen)


class _Known:
    __slots__ = ("arrived_at", "previous_boot_id", "report", "requesters")

    def __init__(self, report: LoadReport, previous_boot_id: bytes) -> None:
        self.report = report
        self.previous_boot_id = previous_boot_id
        self.arrived_at = -math.inf
        #: By node id: the queue, and when it was last named; the longest unnamed comes first.
        self.requesters: dict[str, tuple[RequesterLoad, float]] = {}

    def name_requesters(self, now: float, loads: tuple[RequesterLoad, ...]) -> None:
        for load in loads[:REQUESTERS_MAX]:
            self.requesters.pop(load.node_id, None)
            if load.queued_bytes or load.inflight_requests:
                self.requesters[load.node_id] = (load, now)
        while self.requesters:
            node_id, (_, named_at) = next(iter(self.requesters.items()))
            if (
                now - named_at <= REQUESTER_FORGET_S
                and len(self.requesters) <= REQUESTERS_KNOWN_MAX
            ):
                return
            del self.requesters[node_id]


class ReportTable:
    """The newest report of each node, as a receiver knows them. One thread."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def accept(self, now: float, report: LoadReport) -> bool:
        """Take a report that has arrived, unless a newer one is known.

        Reports of one node come by several connections and may overtake each other.

        Returns:
            Whether it was taken.
        """
        known = self._nodes.get(report.node_id)
        if known is None or known.report.boot_id != report.boot_id:
            if known is not None and known.previous_boot_id == report.boot_id:
                return False
            if known is None and len(self._nodes) >= NODES_MAX:
                oldest = min(self._nodes, key=lambda node_id: self._nodes[node_id].arrived_at)
                del self._nodes[oldest]
            previous = known.report.boot_id if known is not None else b""
            known = self._nodes[report.node_id] = _Known(report, previous)
        elif report.seq <= known.report.seq:
            return False
        known.report = report
        known.arrived_at = now
        known.name_requesters(now, report.requesters)
        return True

    def forget(self, node_id: str) -> None:
        """Nobody will ask for this node again."""
        self._nodes.pop(node_id, None)

    def report(self, node_id: str) -> LoadReport | None:
        """The newest report of a node."""
        known = self._nodes.get(node_id)
        return known.report if known is not None else None

    def requesters(self, node_id: str) -> tuple[RequesterLoad, ...]:
        """The queues at a node that are not empty, put together from its reports."""
        known = self._nodes.get(node_id)
        return tuple(load for load, _ in known.requesters.values()) if known is not None else ()

    def age(self, now: float, node_id: str) -> float:
        """Seconds since the newest report arrived; infinite if there is none."""
        known = self._nodes.get(node_id)
        return max(0.0, now - known.arrived_at) if known is not None else math.inf

    def freshness(self, now: float, node_id: str) -> Freshness:
        """How far the newest report may be believed."""
        age_s = self.age(now, node_id)
        if age_s <= FRESH_S_MAX:
            return Freshness.FRESH
        return Freshness.WIDEN if age_s <= STALE_S_MIN else Freshness.STALE
