"""What is believed of each path: from load reports as far as their age allows, and from what
this client saw itself.

::

    report                    belief
    up to 0.4 s old           its queues are taken as they are
    up to 1 s                 they may have grown by a second in each second since
    older, or none            the relay is used only where nothing else is left
    claims a rate             up to that of our own link; a faster one has to show it
    claims a queue            up to 5 s of work, and our own bytes come on top
    not willing, not READY    nothing new (DEGRADED: where nothing else is left)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.loadreport import FRESH_S_MAX, STALE_S_MIN, LoadReport, NodeState, ReportTable
from kvstore_client.selector.inflight import Daemon, Inflight, PathMeter

# The name under which an agent reports its own link to storage, beside its listeners.
STORAGE_LINK = "storage"
# Listeners of this scheme serve the agent's own node.
_LOCAL_SCHEME = "unix:"

# Before anything was seen or claimed. All paths begin alike, so that only the threshold of
# splitting depends on it: with it, 10 MB.
RATE_BPS_DEFAULT = 1e9
# The default deadline of a request: who has more waiting than this is simply full.
BACKLOG_S_MAX = 5.0
# A capacity is the highest rate that was seen: the link may do somewhat more.
CAPACITY_DOUBT = 1.25
# A relayed byte passes one more process and one more network.
HOP_S = 0.001
# What another relay must be quicker than the request's own decode node: bytes on the decode
# node stay there for its engine, all others it fetches again.
STRANGER_S = 0.01


class Belief(NamedTuple):
    """When a path can begin with new bytes, and how fast it is.

    Attributes:
        start_s: Until what waits there is through.
        rate_Bps: After that.
        queued_bytes: What waits there.
        relay: None for direct.
    """

    start_s: float
    rate_Bps: float
    queued_bytes: float
    relay: PathMeter | None = None


class ReadQueues:
    """Bytes that wait at all daemons together for each node: the queue of its storage link.

    Adding up a few hundred queues takes longer than everything else in a plan, so that the
    sum is kept until a report changes.
    """

    __slots__ = ("_seen", "_sums")

    def __init__(self) -> None:
        self._seen: list[LoadReport | None] = []
        self._sums: dict[str, int] = {}

    def update(self, now: float, reports: ReportTable, daemons: Sequence[Daemon]) -> dict[str, int]:
        """Bytes by node id; daemons with a stale report say nothing."""
        seen = [
            reports.report(daemon.node_id)
            if reports.age(now, daemon.node_id) <= STALE_S_MIN
            else None
            for daemon in daemons
        ]
        if len(seen) != len(self._seen) or any(
            report is not known for report, known in zip(seen, self._seen, strict=True)
        ):
            self._seen = seen
            sums: dict[str, int] = {}
            self._sums = sums
            for report in seen:
                if report is not None:
                    for load in reports.requesters(report.node_id):
                        sums[load.node_id] = sums.get(load.node_id, 0) + max(0, load.queued_bytes)
        return self._sums


def direct_belief(now: float, inflight: Inflight, queues: dict[str, int] | None) -> Belief:
    """Of this node's own storage link; arguments as in `relay_belief`."""
    meter = inflight.direct
    # A path that brought nothing at all divides by something.
    rate_Bps = max(1.0, meter.observed_Bps or RATE_BPS_DEFAULT)
    reported_bytes = queues.get(inflight.node_id, 0) if queues is not None else 0
    queued_bytes = _queued_bytes(now, meter, reported_bytes, rate_Bps)
    return Belief(queued_bytes / rate_Bps, rate_Bps, queued_bytes)


def relay_belief(
    now: float,
    meter: PathMeter,
    reports: ReportTable,
    queues: dict[str, int] | None,
    own_Bps: float,
    preferred: bool,
) -> Belief:
    """Of a relay: its storage link and its compute link as one pipe.

    Args:
        queues: Reported bytes that wait for each node; None believes no report of queues.
        own_Bps: Rate of this node's own storage link: what a relay is believed to have that
            has not shown what it has.
        preferred: Whether it is the request's decode node.
    """
    start_s = HOP_S if preferred else HOP_S + STRANGER_S
    report = reports.report(meter.node_id)
    reported_bytes = queues.get(meter.node_id, 0) if queues is not None else 0
    prior_Bps = own_Bps
    if report is not None:
        start_s += max(0.0, min(reports.age(now, meter.node_id), STALE_S_MIN) - FRESH_S_MAX)
        # All three tell of the same bytes at different places.
        reported_bytes = max(reported_bytes, report.relay_queued_bytes)
        for link in report.links:
            storage = link.name == STORAGE_LINK
            if storage or not link.name.startswith(_LOCAL_SCHEME):
                reported_bytes = max(reported_bytes, link.queued_bytes)
                if 0 < link.capacity_Bps < prior_Bps:
                    prior_Bps = link.capacity_Bps
    if queues is None:
        reported_bytes = 0
    rate_Bps = max(1.0, meter.rate_Bps(now, prior_Bps) * meter.share)
    queued_bytes = _queued_bytes(now, meter, reported_bytes, rate_Bps)
    return Belief(start_s + queued_bytes / rate_Bps, rate_Bps, queued_bytes, meter)


def storage_limit_Bps(report: LoadReport | None) -> float:
    """What a relay can bring a second from storage, as it says itself; infinite if it does not.

    A relay that says too little gets too little; one that says too much is believed what it
    has shown.
    """
    for link in report.links if report is not None else ():
        if link.name == STORAGE_LINK and link.capacity_Bps > 0:
            return link.capacity_Bps * CAPACITY_DOUBT
    return math.inf


def usable(now: float, meter: PathMeter, reports: ReportTable) -> int:
    """How good a relay is for new bytes: 2 like any other, 1 behind every other, 0 not at all."""
    if meter.share <= 0.0 or meter.stalled(now):
        return 0
    report = reports.report(meter.node_id)
    if report is None:
        return 1
    if not report.willing or report.state not in (NodeState.READY, NodeState.DEGRADED):
        return 0
    fresh = reports.age(now, meter.node_id) <= STALE_S_MIN
    return 2 if fresh and report.state is NodeState.READY else 1


def _queued_bytes(now: float, meter: PathMeter, reported_bytes: int, rate_Bps: float) -> float:
    """Our own bytes as they are now, and those of others as a report tells."""
    if not reported_bytes:
        return meter.inflight_bytes
    others = max(0, reported_bytes - meter.recent_bytes(now))
    return meter.inflight_bytes + min(others, BACKLOG_S_MAX * rate_Bps)
