"""What `kvctl` shows of nodes, for people and for programs."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec
import pytest

from kvstore.loadreport import (
    BufferLoad,
    DiskLoad,
    Freshness,
    LinkLoad,
    LoadReport,
    NodeState,
    RequesterLoad,
)
from kvstore.messages import FetchOutcome, PutOutcome, Role, Status
from kvstore_client.ctl import panels, status, top
from kvstore_client.ctl.documents import as_line, as_text, document, live_of, status_of
from kvstore_client.ctl.panels import QUEUES_SHOWN_MAX, Node
from kvstore_client.ctl.top_view import ORDERS, View, fit
from kvstore_client.selector import STORAGE_LINK

MIB = 1024 * 1024


def report(number: int = 0, **fields: Any) -> LoadReport:
    values: dict[str, Any] = {
        "node_id": f"node-{number}",
        "boot_id": bytes([number]) * 16,
        "seq": 1,
        "interval_ms": 200,
        "state": NodeState.READY,
        "links": (LinkLoad(name="tcp://127.0.0.1:7450"),),
        "buffers": BufferLoad(free_bytes=3 * MIB, total_bytes=4 * MIB),
        **fields,
    }
    return LoadReport(**values)


def node(number: int = 0, counters: dict[str, int] | None = None, **fields: Any) -> Node:
    made = report(number, **fields)
    return Node(
        endpoint=f"tcp://127.0.0.1:{7450 + number}",
        node_id=f"node-{number}",
        role=Role.DAEMON,
        report=made,
        requesters=made.requesters,
        age_s=0.1,
        freshness=Freshness.FRESH,
        status=Status(
            node_id=f"node-{number}",
            version="0.1.0",
            role=Role.DAEMON,
            uptime_s=90.0,
            report=made,
            counters=counters or {},
        ),
    )


def agent(counters: dict[str, int] | None = None, **fields: Any) -> Node:
    made = node(5, counters, **fields)
    assert made.status is not None
    said = msgspec.structs.replace(made.status, role=Role.AGENT)
    return msgspec.structs.replace(made, role=Role.AGENT, status=said)


DOWN = Node(endpoint="tcp://127.0.0.1:1", error="connect to tcp://127.0.0.1:1: refused")


def link(sent: int, queued: int = 0, capacity: int = 100 * MIB) -> tuple[LinkLoad, ...]:
    load = LinkLoad(name="l", sent_Bps=sent, queued_bytes=queued, capacity_Bps=capacity)
    return (load,)


def cell(lines: list[str], row: str, column: str) -> str:
    """A cell of a table, by the beginning of its row and the name of its column."""
    columns = re.split(r" {2,}", lines[0])
    (found,) = [line for line in lines if line.startswith(row)]
    return re.split(r" {2,}", found)[columns.index(column)]


def test_nodes_stand_side_by_side_and_those_that_are_down_say_why() -> None:
    nodes = [node(0, {"connections": 4, "sessions": 2}), DOWN]
    lines = panels.status_nodes(nodes)
    assert cell(lines, "node-0", "STATE") == "READY"
    assert cell(lines, "node-0", "ROLE") == "daemon"
    assert cell(lines, "node-0", "UP") == "1m 30s"
    assert cell(lines, "node-0", "MEMORY") == "arena: 1MiB of 4MiB (25%)"
    assert cell(lines, "node-0", "CONNECTIONS") == "4"
    assert cell(lines, "node-0", "SESSIONS") == "2"
    assert cell(lines, DOWN.endpoint, "STATE") == "down"
    assert panels.errors(nodes) == [DOWN.error]


def test_a_link_shows_its_rate_against_its_capacity() -> None:
    lines = panels.links([node(links=link(25 * MIB, 3 * MIB))])
    assert cell(lines, "node-0", "LOAD") == "[#####...............]"
    assert lines[1].split()[-4:] == ["25%", "25MiB/s", "100MiB/s", "3MiB"]


def test_a_link_that_was_never_busy_has_no_capacity() -> None:
    (_, line) = panels.links([node(links=link(MIB, capacity=0))])
    assert line.split()[-3:] == ["1MiB/s", "unknown", "0B"]


def test_the_longest_queues_come_first_and_the_others_are_counted() -> None:
    requesters = tuple(
        RequesterLoad(node_id=f"gpu-{n}", queued_bytes=n * MIB, inflight_requests=n)
        for n in range(1, QUEUES_SHOWN_MAX + 3)
    )
    header, first, *rest = panels.queues([node(requesters=requesters)])
    assert header.split() == ["REQUESTER", "AT", "NODE", "QUEUED", "REQUESTS"]
    assert first.split() == ["gpu-22", "node-0", "22MiB", "22"]
    assert len(rest) == QUEUES_SHOWN_MAX
    assert rest[-1] == "and 2 shorter ones"


def test_nothing_to_tell_has_no_heading() -> None:
    quiet = [node(links=())]
    for panel in (
        panels.links,
        panels.queues,
        panels.disks,
        panels.relays,
        panels.pools,
        panels.errors,
    ):
        assert panel(quiet) == []


def test_a_process_that_listens_twice_has_its_links_and_queues_once() -> None:
    loads = (RequesterLoad(node_id="gpu", queued_bytes=1, inflight_requests=1),)
    twice = [node(requesters=loads), node(requesters=loads)]
    assert len(panels.links(twice)) == 2
    assert len(panels.queues(twice)) == 2
    assert len(panels.status_nodes(twice)) == 3


def test_disks_and_relays_are_told_of_where_there_are_some() -> None:
    load = DiskLoad(queued_bytes=MIB, read_Bps=2 * MIB, service_ms_p50=0.5, service_ms_p99=9)
    assert panels.disks([node(disk=load)])[1].split() == [
        *("node-0", "2MiB/s", "1MiB", "0.50ms", "9.00ms")
    ]
    relay = agent(relay_queued_bytes=MIB, willing=True)
    assert panels.relays([node(), relay])[1:] == ["node-5          1MiB  yes"]


def test_counters_that_matter_stand_side_by_side() -> None:
    counted = {
        "fetch_blocks_hit": 12,
        "fetch_bytes": 3 * MIB,
        "put_blocks_stored": 7,
        "blocks_evicted": 5,
        "blocks_evicted_pool": 2,
        "blocks_evicted_arena": 3,
        "blocks_corrupt": 1,
        "requests_corrupt_report": 4,
        "requests_refused": 6,
        "requests_refused_limit": 5,
    }
    lines = panels.counters([node(0, counted), node(1), DOWN])
    table = {fields[0]: fields[1:] for fields in (re.split(r" {2,}", line) for line in lines)}
    assert table["SINCE THE START"] == ["node-0", "node-1"]
    assert table["fetch: HIT"] == ["12", "0"]
    assert table["fetch: bytes"] == ["3MiB", "0B"]
    assert table["put: STORED"] == ["7", "0"]
    assert table["evicted: all"] == ["5", "0"]
    assert table["evicted: pool"] == ["2", "0"]
    assert table["evicted: arena"] == ["3", "0"]
    assert table["checksum failures: stored copies"] == ["1", "0"]
    assert table["checksum failures: readers' reports"] == ["4", "0"]
    assert table["refused: requests"] == ["6", "0"]
    assert table["refused: limit"] == ["5", "0"]
    for fetched in FetchOutcome:
        assert f"fetch: {fetched.name}" in table
    for put in PutOutcome:
        assert f"put: {put.name}" in table


def test_an_agent_has_rows_of_its_own() -> None:
    counted = {
        "relay_requests": 1,
        "relay_blocks": 2,
        "relay_bytes_out": 3 * MIB,
        "relay_refused_busy": 4,
        "own_bytes": 5 * MIB,
        "storage_fetch_bytes_direct": 6 * MIB,
        "storage_fetch_bytes_relay": 7 * MIB,
        "relay_joined": 8,
        "relay_no_room": 9,
        "peer_requests": 10,
        "peer_bytes_out": 11 * MIB,
        "claims": 12,
        "claims_missed": 13,
        "retentions_expired": 14,
        "fetch_blocks_hit": 15,
        "requests_refused_busy": 16,
    }
    lines = panels.counters([node(0), agent(counted), node(1)])
    ends = lines.index("")
    assert re.split(r" {2,}", lines[0])[1:] == ["node-0", "node-1"]
    table = {
        fields[0]: fields[1:] for fields in (re.split(r" {2,}", line) for line in lines[ends + 1 :])
    }
    assert table["SINCE THE START"] == ["node-5"]
    assert table["relayed: requests"] == ["1"]
    assert table["relayed: blocks"] == ["2"]
    assert table["relayed: bytes out"] == ["3MiB"]
    assert table["relayed: refused, busy"] == ["4"]
    assert table["own loads: bytes"] == ["5MiB"]
    assert table["brought in: bytes direct"] == ["6MiB"]
    assert table["brought in: bytes by relays"] == ["7MiB"]
    assert table["joined: blocks that were coming"] == ["8"]
    assert table["no room: blocks"] == ["9"]
    assert table["peers: requests"] == ["10"]
    assert table["peers: bytes out"] == ["11MiB"]
    assert table["kept for engines: claims"] == ["12"]
    assert table["kept for engines: claims missed"] == ["13"]
    assert table["kept for engines: expired"] == ["14"]
    assert table["fetch: HIT"] == ["15"]
    assert table["refused: busy"] == ["16"]
    assert table["peers: blocks"] == ["0"]
    assert "lookup: keys" not in table
    assert "fetch: bytes" not in table


def test_the_pool_of_an_agent_is_no_arena() -> None:
    counted = {
        "held_blocks": 44,
        "pinned_blocks": 3,
        "retained_blocks": 2,
        "leased_bytes": MIB,
        "fills_under_way": 1,
    }
    lines = panels.pools([node(0), agent(counted), DOWN])
    assert [re.split(r" {2,}", line) for line in lines] == [
        ["NODE", "HELD", "PINNED", "KEPT", "LEASED", "MEMORY", "FILLS"],
        ["node-5", "44", "3", "2", "1MiB", "pool: 3MiB of 4MiB reclaimable", "1"],
    ]
    assert panels.pools([node(0), DOWN]) == []
    for panel in (panels.status_nodes, panels.live_nodes):
        shown = panel([node(0), agent()])
        assert cell(shown, "node-0", "MEMORY").startswith("arena: ")
        assert cell(shown, "node-5", "MEMORY") == "pool: 3MiB of 4MiB reclaimable"


def test_what_comes_to_an_agent_is_not_what_it_sends() -> None:
    storage = LinkLoad(name=STORAGE_LINK, sent_Bps=9 * MIB, queued_bytes=8 * MIB, capacity_Bps=1)
    carries = agent(links=(*link(2 * MIB, 3 * MIB), storage))
    assert (carries.sent_Bps, carries.queued_bytes) == (2 * MIB, 3 * MIB)
    assert len(panels.links([carries])) == 3


def test_counters_of_many_nodes_go_on_below_where_the_screen_ends() -> None:
    nodes = [node(number) for number in range(9)]
    lines = panels.counters(nodes, columns=80)
    assert max(map(len, lines)) <= 80
    headings = [line for line in lines if line.startswith("SINCE")]
    assert len(headings) > 1
    assert sum(line.count("node-") for line in headings) == 9
    # One node is shown also where it does not fit.
    assert len(panels.counters(nodes[:1], columns=3)) == len(panels.counters(nodes[:1]))


def test_orders_of_nodes() -> None:
    busy = node(1, links=link(9 * MIB, 1), buffers=BufferLoad(free_bytes=1, total_bytes=2))
    queued = node(0, links=link(1, 9 * MIB), buffers=BufferLoad(free_bytes=9, total_bytes=10))
    nodes = [DOWN, busy, queued]
    firsts = {order: View(order).sorted(nodes)[0] for order in ORDERS}
    assert firsts == {
        "endpoint": DOWN,
        "name": queued,
        "queue": queued,
        "sent": busy,
        "memory": busy,
        "age": DOWN,
    }
    for order in ORDERS:
        assert View(order, reverse=True).sorted(nodes) == View(order).sorted(nodes)[::-1]


def test_the_keys_lead_through_all_orders() -> None:
    view = View()
    seen = []
    for _ in ORDERS:
        seen.append(view.order)
        view.next_order()
    assert seen == list(ORDERS)
    assert view.order == seen[0]


def test_the_live_view_tells_age_and_freshness() -> None:
    stale = Node(
        endpoint="tcp://h:1",
        node_id="node-7",
        error="tcp://h:1: silent for 6.0 s",
        report=report(7, state=NodeState.DRAINING),
        age_s=6.0,
    )
    lines = View().lines([node(), stale, Node(endpoint="tcp://h:2")], "12:00:00")
    assert lines[0] == "kvctl top  12:00:00  nodes: 3, down: 1  order: endpoint"
    nodes = lines[2:6]
    assert cell(nodes, "node-0", "REPORT") == "fresh"
    assert cell(nodes, "node-0", "AGE") == "100ms"
    assert cell(nodes, "node-7", "STATE") == "down"
    assert cell(nodes, "node-7", "AGE") == "6.0s"
    assert cell(nodes, "node-7", "REPORT") == "stale"
    assert cell(nodes, "tcp://h:2", "STATE") == "connecting"
    assert stale.error in lines


def test_a_view_fits_its_screen_and_says_what_it_left_out() -> None:
    lines = [f"{number} {'x' * 90}" for number in range(50)]
    fitted = fit(lines, columns=40, rows=10)
    assert len(fitted) == 10
    assert max(map(len, fitted)) == 40
    assert fitted[-1].startswith("... 41 more lines")
    assert fit(lines, 200, 50) == lines
    assert fit(lines, 40, 0) == []


def names(value: object) -> set[str]:
    """Every name in a document, but for those that nodes choose for their counters."""
    found: set[str] = set()
    if isinstance(value, dict):
        for name, item in value.items():
            found |= {name} if name == "counters" else {name} | names(item)
    elif isinstance(value, list):
        for item in value:
            found |= names(item)
    return found


@pytest.mark.parametrize(
    ("describe", "epilog"), [(status_of, status.EPILOG), (live_of, top.EPILOG)]
)
def test_the_help_tells_every_name_of_the_json(describe: Any, epilog: str) -> None:
    loads = (RequesterLoad(node_id="gpu"),)
    made = document([describe(node(requesters=loads))], time=0.0)
    told = set(re.findall(r"\w+", epilog.partition("--json:")[2]))
    assert names(made) - told == set()


@pytest.mark.parametrize("describe", [status_of, live_of])
def test_json_has_every_field_whether_or_not_there_is_something_to_tell(describe: Any) -> None:
    known, unknown = describe(node(state=NodeState.DEGRADED)), describe(DOWN)
    assert list(known) == list(unknown)
    assert unknown["error"] == DOWN.error
    assert (unknown["report"], known["error"]) == (None, None)
    assert known["report"]["state"] == "DEGRADED"
    assert known["report"]["boot_id"] == "00" * 16
    assert known["report"]["links"] == [
        {"name": "tcp://127.0.0.1:7450", "capacity_Bps": 0, "sent_Bps": 0, "queued_bytes": 0}
    ]
    assert known["report"]["willing"] is False


def test_json_names_all_that_wait_and_not_only_those_of_the_last_report() -> None:
    waiting = (RequesterLoad(node_id="gpu", queued_bytes=5),)
    told = Node(endpoint="e", report=report(), requesters=waiting)
    made = live_of(told)["report"]
    assert made["requesters"] == [{"node_id": "gpu", "queued_bytes": 5, "inflight_requests": 0}]


def test_json_has_no_infinity() -> None:
    assert math.isinf(DOWN.age_s)
    made = document([live_of(DOWN)], time=1.5)
    assert json.loads(as_line(made)) == json.loads(as_text(made)) == made
    assert as_line(made).count("\n") == 1
    assert made["nodes"][0]["age_s"] is None
    assert made["format"] == 1
