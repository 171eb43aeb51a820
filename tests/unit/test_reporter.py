"""The shell around load reports: when it pushes and to whom, what it samples and how often.

The server is a stand-in with queues that a test sets; the clock is in the test's hands.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.blocksource import RelayLoad
from kvstore.endpoint import parse_endpoint
from kvstore.loadreport import (
    PUSH_GAP_S,
    PUSH_INTERVAL_S,
    BufferLoad,
    DiskLoad,
    LinkLoad,
    LoadReport,
    NodeState,
    ReportTable,
    RequesterLoad,
)
from kvstore.messages import decode
from kvstore.reporter import LoadReporter
from tests.support.loops import ManualLoop

LINK, OTHER_LINK = "tcp://127.0.0.1:7450", "unix://@store"
# Timers are never early by more than this, in sums of fractions of a second.
TINY_S = 1e-9
# After this long, a report that was made before is not used again.
AGED_S = 1.5 * PUSH_GAP_S


class Connection:
    """What a reporter sees of a connection, and how often it looks."""

    def __init__(self, server: Server, node_id: str | None = "engine", link: str = LINK) -> None:
        self.link = link
        self.session = SimpleNamespace(node_id=node_id) if node_id is not None else None
        self.protocol = self
        self.request_count = 0
        self.queued_bytes = 0
        self.unsampled_bytes = 0
        self._server = server
        server.connections.add(self)

    @property
    def fetch_queued_bytes(self) -> int:
        """As of a `ServerProtocol`."""
        self._server.looks += 1
        return self.queued_bytes

    def take_sent_bytes(self) -> int:
        """As of a `ServerConnection`."""
        sent, self.unsampled_bytes = self.unsampled_bytes, 0
        return sent

    def wait(self, size_bytes: int, requests: int = 1) -> None:
        """So much is queued now; the server says that something has changed."""
        self.queued_bytes, self.request_count = size_bytes, requests
        self._server.reporter.touch()


class Server:
    """What a reporter sees of a server.

    Attributes:
        looks: How often the queue of a connection was asked for.
        pushed: Loop time of each push to `listen`, and what was pushed.
    """

    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.connections: set[Connection] = set()
        self.endpoints = [parse_endpoint(LINK), parse_endpoint(OTHER_LINK)]
        self.options = SimpleNamespace(node_id="store-1")
        self.boot_id = bytes(range(16))
        self.state = NodeState.READY
        self.source: Any = self
        self.free_bytes = 10
        self.more_links: tuple[LinkLoad, ...] = ()
        self.relay = RelayLoad()
        self.looks = 0
        self.pushed: list[tuple[float, LoadReport]] = []
        self.reporter = LoadReporter(self)  # type: ignore[arg-type]
        self.started_at = self.loop.time()

    def buffer_load(self) -> BufferLoad:
        """As of a block source."""
        return BufferLoad(free_bytes=self.free_bytes, total_bytes=100)

    def disk_load(self) -> DiskLoad:
        """As of a block source."""
        return DiskLoad(queued_bytes=5)

    def links(self) -> tuple[LinkLoad, ...]:
        """As of a block source."""
        return self.more_links

    def relay_load(self) -> RelayLoad:
        """As of a block source."""
        return self.relay

    def listen(self, encoded: bytes) -> None:
        """A subscriber."""
        report = decode(encoded, LoadReport)
        self.pushed.append((self.loop.time() - self.started_at, report))

    @property
    def times(self) -> list[float]:
        """When there was a push, in seconds from the beginning."""
        return [at for at, _ in self.pushed]

    @property
    def newest(self) -> LoadReport:
        """What was pushed last."""
        return self.pushed[-1][1]


@pytest.fixture
def server() -> Server:
    """A server that has started and made its first sample."""
    made = Server()
    made.loop.advance(0.0)
    return made


@pytest.fixture
def subscribed(server: Server) -> Server:
    """A server with a subscriber at the usual interval that has had its first report."""
    server.reporter.subscribe(server.listen, 200)
    server.loop.advance(1.0)
    assert server.pushed
    server.pushed.clear()
    server.started_at = server.loop.time()
    return server


# --- what a report says --------------------------------------------------------------------


def test_report_says_who_what_and_how_much(server: Server) -> None:
    server.loop.advance(AGED_S)
    connection = Connection(server)
    connection.queued_bytes, connection.request_count = 1000, 2
    report = server.reporter.make()
    assert (report.node_id, report.boot_id) == ("store-1", server.boot_id)
    assert (report.state, report.interval_ms) == (NodeState.READY, 200)
    assert report.links == (LinkLoad(name=LINK, queued_bytes=1000), LinkLoad(name=OTHER_LINK))
    load = RequesterLoad(node_id="engine", queued_bytes=1000, inflight_requests=2)
    assert report.requesters == (load,)
    assert report.buffers == BufferLoad(free_bytes=10, total_bytes=100)
    assert report.disk == DiskLoad(queued_bytes=5)


def test_queues_add_up_by_node_and_by_link(server: Server) -> None:
    server.loop.advance(AGED_S)
    for node_id, link, size_bytes in [
        ("a", LINK, 1),
        ("a", OTHER_LINK, 10),
        ("b", LINK, 100),
        (None, LINK, 1000),  # has not introduced itself: queues count, its node is unknown
    ]:
        connection = Connection(server, node_id, link)
        connection.queued_bytes, connection.request_count = size_bytes, 1
    report = server.reporter.make()
    assert [link.queued_bytes for link in report.links] == [1101, 10]
    assert [
        (load.node_id, load.queued_bytes, load.inflight_requests) for load in report.requesters
    ] == [
        ("b", 100, 1),
        ("a", 11, 2),
    ]


def test_what_was_sent_counts_once_and_on_its_link(server: Server) -> None:
    connection = Connection(server)
    for _ in range(100):
        server.loop.advance(0.1)
        connection.unsampled_bytes += 1_000_000
    server.loop.advance(AGED_S)
    first, other = server.reporter.make().links
    assert first.sent_Bps == pytest.approx(10e6, rel=0.2)
    assert other.sent_Bps == 0
    server.loop.advance(20.0)
    assert server.reporter.make().links[0].sent_Bps == 0


def test_connection_that_closes_is_accounted_for_before_it_is_gone(server: Server) -> None:
    connection = Connection(server)
    connection.unsampled_bytes = 5_000_000
    server.reporter.account(connection)  # type: ignore[arg-type]
    server.connections.discard(connection)
    server.loop.advance(AGED_S)
    assert server.reporter.make().links[0].sent_Bps == pytest.approx(5e6, rel=0.05)


def test_capacity_is_what_a_busy_link_has_shown(server: Server) -> None:
    connection = Connection(server)
    idle = Connection(server, link=OTHER_LINK)
    connection.queued_bytes = 1
    for _ in range(50):
        server.loop.advance(0.2)
        connection.unsampled_bytes += 20_000_000
        idle.unsampled_bytes += 20_000_000
    connection.queued_bytes = 0
    server.loop.advance(1.0)  # the rate fades, and what the link has shown stays
    busy, other = server.reporter.make().links
    assert busy.capacity_Bps == pytest.approx(100e6, rel=0.05)
    assert other.capacity_Bps == 0, "a link that never had to wait has shown nothing"


def test_no_capacity_is_below_the_rate_that_is_seen(server: Server) -> None:
    connection = Connection(server)
    connection.queued_bytes = 1
    for _ in range(3):
        server.loop.advance(0.2)
        connection.unsampled_bytes += 1_000_000
        server.reporter.make()
    connection.queued_bytes = 0  # from now on bytes go at once, as fast as they come
    for _ in range(20):
        server.loop.advance(0.2)
        connection.unsampled_bytes += 20_000_000
        server.reporter.make()
    (link, _) = server.reporter.make().links
    assert link.sent_Bps == pytest.approx(100e6, rel=0.15)
    assert link.capacity_Bps == link.sent_Bps


def test_numbers_grow_by_one_a_report(server: Server) -> None:
    seqs = []
    for _ in range(10):
        server.loop.advance(AGED_S)
        seqs.append(server.reporter.make().seq)
    assert seqs == sorted(set(seqs))
    report = server.reporter.make()
    assert server.reporter.make() is report, "made anew although nothing could have changed"


# --- when it is pushed ---------------------------------------------------------------------


def test_subscriber_gets_a_report_at_once_and_then_every_interval(server: Server) -> None:
    server.loop.advance(1.0)
    server.reporter.subscribe(server.listen, 200)
    server.started_at = server.loop.time()
    server.loop.advance(2.0)
    first, second = server.times[:2]
    assert first <= PUSH_GAP_S + TINY_S
    assert second == pytest.approx(first + PUSH_INTERVAL_S)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert gaps == pytest.approx([PUSH_INTERVAL_S] * len(gaps))
    seqs = [report.seq for _, report in server.pushed]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_change_is_pushed_at_once_after_silence(subscribed: Server) -> None:
    # Just before the next push by interval would come, so that this cannot be it.
    subscribed.loop.advance(0.1)
    subscribed.pushed.clear()
    now = subscribed.loop.time() - subscribed.started_at
    Connection(subscribed).wait(1000)
    subscribed.loop.advance(PUSH_GAP_S)
    assert len(subscribed.pushed) == 1
    assert subscribed.times[0] <= now + PUSH_GAP_S
    assert subscribed.newest.requesters[0].queued_bytes == 1000


def test_changes_without_end_are_pushed_at_most_every_gap(subscribed: Server) -> None:
    connection = Connection(subscribed)
    for number in range(1000):
        connection.wait(number)
        subscribed.loop.advance(0.001)
    gaps = [b - a for a, b in zip(subscribed.times, subscribed.times[1:], strict=False)]
    assert min(gaps) >= PUSH_GAP_S - TINY_S
    assert max(gaps) <= PUSH_GAP_S + 0.001 + TINY_S
    subscribed.loop.advance(PUSH_GAP_S)
    assert subscribed.newest.requesters[0].queued_bytes == 999


def test_push_tells_what_is_so_now_although_a_reply_had_a_report_just_before(
    subscribed: Server,
) -> None:
    connection = Connection(subscribed)
    subscribed.loop.advance(0.1)
    reply = subscribed.reporter.make()
    subscribed.loop.advance(0.001)
    subscribed.pushed.clear()
    connection.wait(1000)
    subscribed.loop.advance(PUSH_GAP_S)
    assert [report.requesters[0].queued_bytes for _, report in subscribed.pushed] == [1000]
    assert subscribed.newest.seq > reply.seq


def test_every_push_is_news_to_who_has_had_all_before(subscribed: Server) -> None:
    """A receiver drops a number it knows, and with it the sign of life."""
    table = ReportTable()
    subscribed.reporter.subscribe(
        lambda encoded: taken.append(
            table.accept(subscribed.loop.time(), decode(encoded, LoadReport))
        ),
        20,
    )
    taken: list[bool] = []
    connection = Connection(subscribed)
    for number in range(300):
        subscribed.loop.advance(0.007)
        if number % 3 == 0:
            subscribed.reporter.make()  # for a reply to someone else
        if number % 7 == 0:
            connection.wait(number)
    assert len(taken) > 90
    assert all(taken)


def test_queue_appears_and_goes_to_zero(subscribed: Server) -> None:
    connection = Connection(subscribed)
    connection.wait(1000, 2)
    subscribed.loop.advance(PUSH_INTERVAL_S)
    assert subscribed.newest.requesters == (
        RequesterLoad(node_id="engine", queued_bytes=1000, inflight_requests=2),
    )
    connection.wait(0, 0)
    subscribed.loop.advance(PUSH_GAP_S)
    assert subscribed.newest.requesters == (RequesterLoad(node_id="engine"),)
    subscribed.loop.advance(5.0)
    assert subscribed.newest.requesters == ()


def test_queue_of_a_connection_that_is_gone_goes_to_zero(subscribed: Server) -> None:
    connection = Connection(subscribed)
    connection.wait(1000)
    subscribed.loop.advance(PUSH_INTERVAL_S)
    subscribed.connections.discard(connection)
    subscribed.reporter.touch()
    subscribed.loop.advance(PUSH_GAP_S)
    assert subscribed.newest.requesters == (RequesterLoad(node_id="engine"),)
    assert subscribed.newest.links[0].queued_bytes == 0


def test_draining_is_pushed_at_once_whatever_was_pushed_just_before(subscribed: Server) -> None:
    Connection(subscribed).wait(1000)
    subscribed.loop.advance(0.0)
    while not subscribed.pushed:
        subscribed.loop.advance(0.001)
    subscribed.pushed.clear()
    subscribed.state = NodeState.DRAINING
    subscribed.reporter.state_changed()
    # Not even a turn of the loop later: the server may be about to close everything.
    assert [report.state for _, report in subscribed.pushed] == [NodeState.DRAINING]
    assert subscribed.reporter.make().state is NodeState.DRAINING


# --- intervals and subscribers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked_ms", "given_ms"),
    [
        (20, 20),
        (39, 20),
        (40, 40),
        (199, 160),
        (200, 200),
        (399, 200),
        (400, 320),
        (60_000, 40_960),
    ],
)
def test_interval_is_never_longer_than_asked_for(
    server: Server, asked_ms: int, given_ms: int
) -> None:
    server.loop.advance(1.0)
    server.reporter.subscribe(server.listen, asked_ms)
    server.loop.advance(3 * given_ms / 1e3 + 0.1)
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert gaps[0] == pytest.approx(given_ms / 1e3)
    assert {report.interval_ms for _, report in server.pushed} == {given_ms}


def test_intervals_are_few_whatever_is_asked_for(server: Server) -> None:
    """A change costs something for each of them."""
    for asked_ms in range(20, 60_001, 13):
        server.reporter.subscribe(lambda report: None, asked_ms)
    calls = len(server.loop.pending)
    assert calls == 1
    # One sample a due interval: all are due at once after a change.
    server.loop.advance(1.0)
    server.looks = 0
    Connection(server).wait(1)
    server.loop.advance(PUSH_GAP_S)
    assert server.looks <= 13


def test_all_subscribers_of_an_interval_get_the_same_report(server: Server) -> None:
    got: list[list[bytes]] = [[], [], []]
    for reports in got:
        server.reporter.subscribe(reports.append, 200)
    server.loop.advance(1.0)
    assert len(got[0]) > 4
    assert got[0] == got[1] == got[2]
    assert all(a is b for a, b in zip(got[0], got[1], strict=True)), "encoded once for each"


def test_who_has_unsubscribed_hears_nothing(subscribed: Server) -> None:
    other: list[bytes] = []
    subscribed.reporter.subscribe(other.append, 40)
    subscribed.loop.advance(0.1)
    subscribed.reporter.unsubscribe(subscribed.listen)
    subscribed.reporter.unsubscribe(subscribed.listen)
    subscribed.pushed.clear()
    other.clear()
    subscribed.loop.advance(1.0)
    assert (subscribed.pushed, len(other)) == ([], 25)
    subscribed.reporter.unsubscribe(other.append)


def test_interval_that_nobody_wants_any_more_costs_nothing(server: Server) -> None:
    def push(encoded: bytes) -> None:
        """A subscriber."""

    Connection(server)
    server.reporter.subscribe(push, 20)
    server.loop.advance(1.0)
    server.reporter.unsubscribe(push)
    server.loop.advance(PUSH_GAP_S)
    server.looks = 0
    server.loop.advance(10.0)
    assert server.looks == pytest.approx(10.0 / PUSH_INTERVAL_S, abs=1)


def test_samples_go_on_without_subscribers(server: Server) -> None:
    """The source's upkeep and the rates hang on them."""
    Connection(server)
    server.loop.advance(10.0)
    assert server.looks == pytest.approx(10.0 / PUSH_INTERVAL_S, abs=1)


# --- what may go wrong ---------------------------------------------------------------------


def test_subscriber_with_a_mistake_does_not_end_the_reports(subscribed: Server) -> None:
    def wrong(encoded: bytes) -> None:
        raise ValueError("a mistake")

    subscribed.reporter.subscribe(wrong, 40)
    with pytest.raises(ValueError, match="a mistake"):
        subscribed.loop.advance(1.0)
    assert subscribed.loop.pending, "nothing is due any more"
    subscribed.reporter.unsubscribe(wrong)
    subscribed.pushed.clear()
    subscribed.loop.advance(1.0)
    assert len(subscribed.pushed) == 5


def test_source_with_a_mistake_does_not_end_the_reports_nor_spin(
    subscribed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> BufferLoad:
        raise ValueError("a mistake")

    monkeypatch.setattr(subscribed, "buffer_load", wrong)
    for _ in range(3):
        with pytest.raises(ValueError, match="a mistake"):
            subscribed.loop.advance(10.0)
        (due,) = subscribed.loop.pending
        assert due == pytest.approx(subscribed.loop.time() + PUSH_INTERVAL_S)
    monkeypatch.undo()
    subscribed.loop.advance(1.0)
    assert len(subscribed.pushed) >= 4


def test_loop_that_wakes_early_makes_no_report_and_loses_none(subscribed: Server) -> None:
    subscribed.loop.advance(0.05)
    subscribed.pushed.clear()
    (due,) = subscribed.loop.pending
    subscribed.looks = 0
    subscribed.reporter._tick()
    assert subscribed.pushed == []
    assert due in subscribed.loop.pending


def test_closed_reporter_pushes_nothing_and_can_still_be_told(subscribed: Server) -> None:
    subscribed.reporter.close()
    assert subscribed.loop.pending == []
    # Connections end after it, and say so.
    subscribed.reporter.touch()
    subscribed.reporter.unsubscribe(subscribed.listen)
    subscribed.reporter.state_changed()
    subscribed.loop.advance(10.0)
    assert subscribed.pushed == []
    assert subscribed.reporter.make().seq > 0


def test_numbers_are_whole_and_finite(server: Server) -> None:
    """A report travels as integers, whatever the estimators say."""
    connection = Connection(server)
    connection.queued_bytes = 1
    for _ in range(20):
        server.loop.advance(0.0)
        connection.unsampled_bytes += 1 << 40
        report = server.reporter.make()
    for link in report.links:
        assert isinstance(link.sent_Bps, int)
        assert math.isfinite(link.capacity_Bps)


# --- what it costs -------------------------------------------------------------------------


def test_a_thousand_idle_connections_are_looked_at_once_an_interval(server: Server) -> None:
    for _ in range(1000):
        Connection(server)
    server.loop.advance(PUSH_INTERVAL_S)
    server.looks = 0
    server.loop.advance(10.0)
    assert server.looks <= 1000 * (10.0 / PUSH_INTERVAL_S + 1)


def test_replies_share_a_sample(server: Server) -> None:
    for _ in range(100):
        Connection(server)
    server.loop.advance(PUSH_INTERVAL_S)
    server.looks = 0
    for _ in range(10_000):
        server.reporter.make()
        server.reporter.touch()
        server.loop.advance(0.0001)
    # One second: a sample for pushes and one for replies, each at most every gap.
    assert server.looks <= 2 * 100 * (1.0 / PUSH_GAP_S + 1)


def test_thousands_of_changes_move_the_timer_once(subscribed: Server) -> None:
    subscribed.loop.advance(0.05)
    before = len(subscribed.loop._timers)
    for _ in range(10_000):
        subscribed.reporter.touch()
    assert len(subscribed.loop._timers) <= before + 1


def test_what_an_agent_adds_is_in_the_report(server: Server) -> None:
    assert (server.reporter.make().relay_queued_bytes, server.reporter.make().willing) == (0, False)
    server.relay = RelayLoad(queued_bytes=7, willing=True)
    server.more_links = (LinkLoad(name="storage", queued_bytes=3),)
    server.loop.advance(1.0)
    report = server.reporter.make()
    assert (report.relay_queued_bytes, report.willing) == (7, True)
    assert report.links[-1] == LinkLoad(name="storage", queued_bytes=3)
    assert len(report.links) == 3
