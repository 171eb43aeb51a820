"""What is known of nodes, as tables for people: nodes, links, queues, disks, counters. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from kvstore.loadreport import DiskLoad, Freshness, LinkLoad, LoadReport, RequesterLoad
from kvstore.messages import Role, Status
from kvstore.units import format_size_bytes
from kvstore_client.ctl.counter_rows import CounterRow, agent_rows, daemon_rows
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
from kvstore_client.selector import STORAGE_LINK

# Columns of the bar in the table of links: a step is 5 %.
BAR_COLUMNS = 20
# Who waits longest is what matters; --json has them all.
QUEUES_SHOWN_MAX = 20

# The rows of a table of counters, from the counters of all its nodes.
RowsOf = Callable[[Sequence[Mapping[str, int]]], Iterator[CounterRow]]


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
        """Payload that it sends to others."""
        return sum(link.sent_Bps for link in self._outgoing)

    @property
    def queued_bytes(self) -> int:
        """Payload that others wait for."""
        return sum(link.queued_bytes for link in self._outgoing)

    @property
    def _outgoing(self) -> list[LinkLoad]:
        """Its links without that to storage, by which an agent gets what it sends later."""
        links = self.report.links if self.report else ()
        return [link for link in links if link.name != STORAGE_LINK]

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
    header = ["NODE", "STATE", "ROLE", "VERSION", "UP", "MEMORY", "CONNECTIONS", "SESSIONS"]
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
    header = ["NODE", "STATE", "AGE", "REPORT", "SENT", "QUEUED", "REQUESTS", "MEMORY", "ENDPOINT"]
    return table(header, rows, right=("AGE", "SENT", "QUEUED", "REQUESTS"))


def links(nodes: Sequence[Node]) -> Section:
    """A row a link: its rate as a bar against its capacity, and its queue."""
    rows = [
        [node.name, link.name, *_load(link), format_size_bytes(link.queued_bytes)]
        for node, report in _reports(nodes)
        for link in report.links
    ]
    header = ["NODE", "LINK", "LOAD", "RATE", "CAPACITY", "QUEUED"]
    return table(header, rows, right=("RATE", "CAPACITY", "QUEUED")) if rows else []


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


def pools(nodes: Sequence[Node]) -> Section:
    """A row an agent: what its memory holds at this moment, and for whom."""
    rows = []
    for node, _ in _reports(nodes):
        if node.status is None or node.role is not Role.AGENT:
            continue
        count = node.status.counters.get
        rows.append(
            [
                node.name,
                str(count("held_blocks", 0)),
                str(count("pinned_blocks", 0)),
                str(count("retained_blocks", 0)),
                format_size_bytes(count("leased_bytes", 0)),
                _memory(node),
                str(count("fills_under_way", 0)),
            ]
        )
    header = ["NODE", "HELD", "PINNED", "KEPT", "LEASED", "MEMORY", "FILLS"]
    right = ("HELD", "PINNED", "KEPT", "LEASED", "FILLS")
    return table(header, rows, right=right) if rows else []


def counters(nodes: Sequence[Node], columns: int | None = None) -> Section:
    """What nodes have counted since they started, side by side: daemons, then agents.

    Args:
        columns: Width of the screen: further nodes go below; None for no end.
    """
    answered = [node for node in nodes if node.status]
    agents = [node for node in answered if node.role is Role.AGENT]
    daemons = [node for node in answered if node.role is not Role.AGENT]
    lines: Section = []
    for alike, rows in ((daemons, daemon_rows), (agents, agent_rows)):
        while alike:
            count = len(alike) if columns is None else _nodes_that_fit(alike, columns, rows)
            shown, alike = alike[:count], alike[count:]
            lines += ([""] if lines else []) + _counters(shown, rows)
    return lines


def _nodes_that_fit(nodes: Sequence[Node], columns: int, rows: RowsOf) -> int:
    for count in range(len(nodes), 1, -1):
        if max(map(width, _counters(nodes[:count], rows))) <= columns:
            return count
    return 1


def _counters(nodes: Sequence[Node], rows: RowsOf) -> Section:
    every = [node.status.counters for node in nodes if node.status]
    cells = [
        [row.label, *(row.show(found.get(row.name, 0)) for found in every)] for row in rows(every)
    ]
    names = [node.name for node in nodes]
    return table(["SINCE THE START", *names], cells, right=names)


def _memory(node: Node) -> str:
    """How full it is. What an agent holds goes when others need the room, as far as nobody uses
    it: it is no more than a cache of what storage has."""
    if not node.report or not node.total_bytes:
        return "-"
    total = format_size_bytes(node.total_bytes)
    if node.role is Role.AGENT:
        return f"pool: {format_size_bytes(node.report.buffers.free_bytes)} of {total} reclaimable"
    share = format_share(node.used_bytes, node.total_bytes)
    return f"arena: {format_size_bytes(node.used_bytes)} of {total} ({share})"


def _reports(nodes: Sequence[Node]) -> Iterator[tuple[Node, LoadReport]]:
    """Nodes that have reported, each process once: it may listen at several endpoints."""
    seen: set[bytes] = set()
    for node in nodes:
        if node.report and node.report.boot_id not in seen:
            seen.add(node.report.boot_id)
            yield node, node.report
