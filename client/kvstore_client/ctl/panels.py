"""What is known of nodes, as tables for people: nodes, links, queues, disks, counters. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvstore.loadreport import DiskLoad, Freshness, LinkLoad, LoadReport, RequesterLoad
from kvstore.messages import FetchOutcome, PutOutcome, Role, Status
from kvstore.units import format_size_bytes
from kvstore_client.ctl.tables import (
    bar,
    format_age,
    format_duration,
    format_rate,
    format_share,
    printable,
    table,
    width,
)

# Columns of the bar in the table of links: a step is 5 %.
BAR_COLUMNS = 20
# Who waits longest is what matters; --json has them all.
QUEUES_SHOWN_MAX = 20


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the node behind one endpoint.

    Attributes:
        endpoint: As the operator wrote it, in its normal form.
        error: Why nothing (new) is heard; empty while all is well.
        node_id: What it calls itself; empty if it never said.
        role: What it is, if it said.
        report: Its newest load report.
        requesters: All queues that are not empty, put together from several reports.
        age_s: Since the report arrived.
        freshness: How far the report may be believed.
        status: Its answer to STATUS, where it was asked.
    """

    endpoint: str
    error: str = ""
    node_id: str = ""
    role: Role | None = None
    report: LoadReport | None = None
    requesters: tuple[RequesterLoad, ...] = ()
    age_s: float = math.inf
    freshness: Freshness = Freshness.STALE
    status: Status | None = None

    @property
    def name(self) -> str:
        """What to call it in a table."""
        return self.node_id or self.endpoint

    @property
    def state(self) -> str:
        """What it says of itself, or that it says nothing."""
        if self.error:
            return "down"
        return str(self.report.state) if self.report else "connecting"

    @property
    def sent_Bps(self) -> int:
        """Payload that all its links send."""
        return sum(link.sent_Bps for link in self.report.links) if self.report else 0

    @property
    def queued_bytes(self) -> int:
        """Payload that waits at all its links."""
        return sum(link.queued_bytes for link in self.report.links) if self.report else 0

    @property
    def used_bytes(self) -> int:
        """Memory in use."""
        buffers = self.report.buffers if self.report else None
        return buffers.total_bytes - buffers.free_bytes if buffers else 0

    @property
    def total_bytes(self) -> int:
        """Memory in all."""
        return self.report.buffers.total_bytes if self.report else 0


Section = list[str]


def errors(nodes: Sequence[Node]) -> Section:
    """Why endpoints do not answer, a line each."""
    return [printable(node.error) for node in nodes if node.error]


def status_nodes(nodes: Sequence[Node]) -> Section:
    """A row a node, from its answer to STATUS."""
    rows = []
    for node in nodes:
        status = node.status
        if status is None:
            rows.append([node.name, node.state, "-", "-", "-", "-", "-", "-", node.endpoint])
            continue
        rows.append(
            [
                node.name,
                node.state,
                str(status.role),
                status.version,
                format_duration(status.uptime_s),
                _memory(node),
                str(status.counters.get("connections", 0)),
                str(status.counters.get("sessions", 0)),
                node.endpoint,
            ]
        )
    header = ["NODE", "STATE", "ROLE", "VERSION", "UP", "ARENA", "CONNECTIONS", "SESSIONS"]
    return table([*header, "ENDPOINT"], rows, right=("UP", "CONNECTIONS", "SESSIONS"))


def live_nodes(nodes: Sequence[Node]) -> Section:
    """A row a node, from its load reports."""
    rows = [
        [
            node.name,
            node.state,
            format_age(node.age_s) if node.report else "-",
            str(node.freshness) if node.report else "-",
            format_rate(node.sent_Bps) if node.report else "-",
            format_size_bytes(node.queued_bytes) if node.report else "-",
            str(sum(load.inflight_requests for load in node.requesters)) if node.report else "-",
            _memory(node),
            node.endpoint,
        ]
        for node in nodes
    ]
    header = ["NODE", "STATE", "AGE", "REPORT", "SENT", "QUEUED", "REQUESTS", "ARENA", "ENDPOINT"]
    return table(header, rows, right=("AGE", "SENT", "QUEUED", "REQUESTS"))


def links(nodes: Sequence[Node]) -> Section:
    """A row a link: its rate as a bar against its capacity, and its queue."""
    rows = [
        [node.name, link.name, *_load(link), format_size_bytes(link.queued_bytes)]
        for node, report in _reports(nodes)
        for link in report.links
    ]
    header = ["NODE", "LINK", "LOAD", "SENT", "CAPACITY", "QUEUED"]
    return table(header, rows, right=("SENT", "CAPACITY", "QUEUED")) if rows else []


def _load(link: LinkLoad) -> tuple[str, str, str]:
    if not link.capacity_Bps:
        # It has not been busy yet: nobody knows.
        return bar(0.0, BAR_COLUMNS) + "   ?", format_rate(link.sent_Bps), "unknown"
    share = link.sent_Bps / link.capacity_Bps
    percent = format_share(link.sent_Bps, link.capacity_Bps)
    return (
        f"{bar(share, BAR_COLUMNS)} {percent:>4}",
        format_rate(link.sent_Bps),
        format_rate(link.capacity_Bps),
    )


def queues(nodes: Sequence[Node]) -> Section:
    """Who waits for what at which node, the longest queue first."""
    waiting = [(load, node) for node, _ in _reports(nodes) for load in node.requesters]
    waiting.sort(key=lambda pair: (-pair[0].queued_bytes, -pair[0].inflight_requests))
    rows = [
        [
            load.node_id,
            node.name,
            format_size_bytes(load.queued_bytes),
            str(load.inflight_requests),
        ]
        for load, node in waiting[:QUEUES_SHOWN_MAX]
    ]
    if not rows:
        return []
    lines = table(
        ["REQUESTER", "AT NODE", "QUEUED", "REQUESTS"], rows, right=("QUEUED", "REQUESTS")
    )
    left = len(waiting) - len(rows)
    return [*lines, f"and {left} shorter ones"] if left else lines


def disks(nodes: Sequence[Node]) -> Section:
    """A row a node that has a disk tier at work."""
    rows = [
        [
            node.name,
            format_rate(report.disk.read_Bps),
            format_size_bytes(report.disk.queued_bytes),
            f"{report.disk.service_ms_p50:.2f}ms",
            f"{report.disk.service_ms_p99:.2f}ms",
        ]
        for node, report in _reports(nodes)
        if report.disk != DiskLoad()
    ]
    header = ["NODE", "DISK-READ", "DISK-QUEUED", "P50", "P99"]
    return table(header, rows, right=header[1:]) if rows else []


def relays(nodes: Sequence[Node]) -> Section:
    """A row an agent: what it carries for others."""
    rows = [
        [
            node.name,
            format_size_bytes(node.report.relay_queued_bytes),
            "yes" if node.report.willing else "no",
        ]
        for node in nodes
        if node.report and node.role is Role.AGENT
    ]
    return table(["NODE", "RELAY-QUEUED", "WILLING"], rows, right=("RELAY-QUEUED",)) if rows else []


def counters(nodes: Sequence[Node], columns: int | None = None) -> Section:
    """What nodes have counted since they started, side by side.

    Args:
        columns: Width of the screen: further nodes go below; None for no end.
    """
    answered = [node for node in nodes if node.status]
    lines: Section = []
    while answered:
        count = len(answered) if columns is None else _nodes_that_fit(answered, columns)
        shown, answered = answered[:count], answered[count:]
        lines += ([""] if lines else []) + _counters(shown)
    return lines


def _nodes_that_fit(nodes: Sequence[Node], columns: int) -> int:
    for count in range(len(nodes), 1, -1):
        if max(map(width, _counters(nodes[:count]))) <= columns:
            return count
    return 1


def _counters(nodes: Sequence[Node]) -> Section:
    every = [node.status.counters for node in nodes if node.status]
    rows = [
        [label, *(show(found.get(name, 0)) for found in every)]
        for label, name, show in _counter_rows(every)
    ]
    names = [node.name for node in nodes]
    return table(["SINCE THE START", *names], rows, right=names)


def _counter_rows(
    every: Sequence[dict[str, int]],
) -> Iterator[tuple[str, str, Callable[[int], str]]]:
    """Label, name and format of the counters that matter."""
    yield "lookup: keys", "lookup_keys", str
    yield "lookup: hits", "lookup_hits", str
    for fetched in FetchOutcome:
        yield f"fetch: {fetched.name}", f"fetch_blocks_{fetched.name.lower()}", str
    yield "fetch: bytes", "fetch_bytes", format_size_bytes
    for put in PutOutcome:
        yield f"put: {put.name}", f"put_blocks_{put.name.lower()}", str
    yield "put: bytes", "put_bytes", format_size_bytes
    yield "evicted: all", "blocks_evicted", str
    yield from _causes(every, "evicted", "blocks_evicted_")
    yield "deleted blocks", "blocks_deleted", str
    yield "checksum failures: readers' reports", "requests_corrupt_report", str
    yield "checksum failures: stored copies", "blocks_corrupt", str
    yield "checksum failures: arriving puts", "put_corrupt", str
    yield "refused: requests", "requests_refused", str
    yield from _causes(every, "refused", "requests_refused_")
    yield "refused: leases", "leases_refused", str
    yield "refused: connections", "connections_refused", str
    yield "requests past their deadline", "requests_timed_out", str
    yield "requests whose client has gone", "requests_abandoned", str
    yield "connections that stalled", "connections_stalled", str
    yield "connections that broke", "connections_broken", str


def _causes(
    every: Sequence[dict[str, int]], label: str, prefix: str
) -> Iterator[tuple[str, str, Callable[[int], str]]]:
    """Counters that split another one; nodes name the causes."""
    names = {name for found in every for name in found if name.startswith(prefix)}
    for name in sorted(names):
        yield f"{label}: {name.removeprefix(prefix)}", name, str


def _memory(node: Node) -> str:
    if not node.total_bytes:
        return "-"
    used, total = node.used_bytes, node.total_bytes
    return f"{format_size_bytes(used)} of {format_size_bytes(total)} ({format_share(used, total)})"


def _reports(nodes: Sequence[Node]) -> Iterator[tuple[Node, LoadReport]]:
    """Nodes that have reported, each process once: it may listen at several endpoints."""
    seen: set[bytes] = set()
    for node in nodes:
        if node.report and node.report.boot_id not in seen:
            seen.add(node.report.boot_id)
            yield node, node.report
