"""`kvctl status`: what nodes say of themselves, side by side."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections.abc import Sequence
from typing import Any, TextIO

from kvstore.endpoint import Endpoint
from kvstore.errors import KVStoreError
from kvstore.loadreport import (
    PUSH_INTERVAL_S,
    REQUESTER_REFRESH_S,
    Freshness,
    LoadReport,
    ReportTable,
)
from kvstore_client.ctl import panels
from kvstore_client.ctl.connection import ControlConnection, open_connection, reason_text
from kvstore_client.ctl.documents import REPORT_NAMES, as_text, document, status_of
from kvstore_client.ctl.options import Common, Subparsers, add_command
from kvstore_client.ctl.panels import Node

# A report names queues that have changed, the others once a second: so long it takes to hear
# of all of them.
LISTEN_S = REQUESTER_REFRESH_S + PUSH_INTERVAL_S

EPILOG = f"""
Queues, rates and memory are those of the moment; counters run since the node has started. The
connection of kvctl is among those that a node counts. Where others are connected, kvctl listens
for {LISTEN_S:g} s, in which a node names all queues.

Rates and capacities are of payload sent; at the link "storage" of an agent, of what comes from
the daemons. A capacity is the highest rate that the link has shown while it was busy, or what it
shows now if that is more; it is unknown until it was busy.

Of a daemon, MEMORY says how much of the arena is in use, and "evicted" has a line a cause: pool
(its quota), arena (room for other blocks), window (room in one piece for a large block).

An agent has counters of its own: what it relayed for other nodes, loaded for engines of its
own, gave to peers that pulled, and kept for engines. "brought in" is what came over the network
into its pool, for whomever; "direct" includes what it relays. HELD are the blocks in its pool,
PINNED those in use now, KEPT those that are kept for engines and peers, and LEASED the bytes of
these; "reclaimable" is free, or can be as soon as there is need.

examples:
  kvctl status
  kvctl --endpoint tcp://10.0.0.7:7450 --endpoint tcp://10.0.0.8:7450 status
  kvctl --endpoint unix:///run/kvagent/agent.sock status
  kvctl status --json | jq -r '.nodes[] | select(.error) | .endpoint'

--json: format, time (seconds since 1970), and nodes [endpoint, error, node_id, version, role,
uptime_s, report, counters]. error is null for a node that has answered; of one that has not all
the rest is null. counters is an object of everything that the node counts, by name.
{REPORT_NAMES}

exit status: 0 all have answered; 1 one of them has not; 2 an option cannot be
"""


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Add `status` to the commands of `kvctl`."""
    parser = add_command(
        subparsers,
        "status",
        "state, memory, links, queues and counters of nodes",
        "Show what nodes say of themselves, and the counters that matter.",
        EPILOG,
    )
    parser.set_defaults(run=run)


async def run(common: Common, given: argparse.Namespace, output: TextIO) -> int:
    """Ask all nodes, and show their answers; the exit status."""
    nodes = await ask_all(common.endpoints, common.timeout_s)
    if common.json:
        text = as_text(document([status_of(node) for node in nodes], time=time.time()))
    else:
        columns = shutil.get_terminal_size().columns if output.isatty() else None
        text = as_tables(nodes, columns)
    output.write(text)
    return 1 if any(node.error for node in nodes) else 0


def as_tables(nodes: Sequence[Node], columns: int | None) -> str:
    """The answers for people; pure.

    Args:
        columns: Width of the screen, None for none.
    """
    sections = [
        panels.status_nodes(nodes),
        panels.errors(nodes),
        panels.links(nodes),
        panels.queues(nodes),
        panels.disks(nodes),
        panels.relays(nodes),
        panels.pools(nodes),
        panels.counters(nodes, columns),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


async def ask_all(
    endpoints: Sequence[Endpoint], timeout_s: float, listen_s: float = LISTEN_S
) -> list[Node]:
    """What each node says, or why it says nothing; in the order of `endpoints`."""
    return await asyncio.gather(*(_ask(end, timeout_s, listen_s) for end in endpoints))


async def _ask(endpoint: Endpoint, timeout_s: float, listen_s: float) -> Node:
    try:
        connection = await open_connection(endpoint, timeout_s)
        try:
            return await _ask_connected(connection, listen_s)
        finally:
            connection.close()
    except KVStoreError as error:
        return Node(endpoint=str(endpoint), error=reason_text(endpoint, error))


async def _ask_connected(connection: ControlConnection, listen_s: float) -> Node:
    loop = asyncio.get_running_loop()
    reports = ReportTable()

    def accept(report: LoadReport) -> None:
        reports.accept(loop.time(), report)

    status = await connection.status()
    accept(status.report)
    if status.counters.get("sessions", 0) > 1:  # else we are alone, and nobody waits
        await connection.subscribe(accept)
        await connection.end(listen_s)
    node_id = status.report.node_id
    return Node(
        endpoint=str(connection.endpoint),
        node_id=status.node_id,
        role=status.role,
        report=reports.report(node_id),
        requesters=reports.requesters(node_id),
        age_s=reports.age(loop.time(), node_id),
        freshness=Freshness.FRESH,
        status=status,
    )
