"""Makes and pushes the load reports of a server: the shell around `kvstore.loadreport`.

One sample of all connections serves every DONE and every subscriber for 20 ms: walking over
a thousand connections for each reply would cost more than the reply.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from kvstore.loadreport import (
    PUSH_GAP_S,
    PUSH_INTERVAL_S,
    LinkLoad,
    LoadReport,
    ReportSchedule,
    RequesterLoad,
    RequesterTable,
)
from kvstore.messages import encode
from kvstore.rates import CapacityEstimator, RateEstimator

if TYPE_CHECKING:
    from kvstore.serving import Server, ServerConnection

# Gets an encoded load report: one encoding serves all who want it.
Push = Callable[[bytes], None]

_GAP_MS = round(PUSH_GAP_S * 1e3)
_INTERVAL_MS = round(PUSH_INTERVAL_S * 1e3)


class _Link:
    """What is known of one listener's link."""

    __slots__ = ("busy", "capacity", "queued_bytes", "rate", "sent_bytes")

    def __init__(self) -> None:
        self.rate = RateEstimator()
        self.capacity = CapacityEstimator()
        self.sent_bytes = 0  # since the last sample
        self.queued_bytes = 0
        self.busy = False

    def sample(self, now: float, elapsed_s: float, queued_bytes: int) -> None:
        self.rate.add(now, self.sent_bytes)
        # Bytes that waited at both ends of the time are taken to have waited throughout.
        self.capacity.add(elapsed_s, self.sent_bytes, self.busy and queued_bytes > 0)
        self.busy = queued_bytes > 0
        self.queued_bytes = queued_bytes
        self.sent_bytes = 0

    def load(self, now: float, name: str) -> LinkLoad:
        """As of the last sample."""
        rate_Bps, capacity_Bps = self.rate.rate_Bps(now), self.capacity.capacity_Bps
        return LinkLoad(
            name=name,
            # What is seen can be carried, also where the link is never busy for a whole window.
            capacity_Bps=round(max(capacity_Bps, rate_Bps)) if capacity_Bps else 0,
            sent_Bps=round(rate_Bps),
            queued_bytes=self.queued_bytes,
        )


class _Subscribers:
    """Those who want a report at least every `interval_ms`."""

    __slots__ = ("interval_ms", "pushes", "schedule")

    def __init__(self, interval_ms: int) -> None:
        self.interval_ms = interval_ms
        self.schedule = ReportSchedule(interval_ms / 1e3)
        self.pushes: set[Push] = set()


class LoadReporter:
    """Samples a server's queues, and tells those who asked. On the server's loop.

    Args:
        server: Its connections, source and state are what reports tell of. It calls `touch`
            whenever a request begins or ends.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._links: dict[str, _Link] = {}
        self._requesters = RequesterTable()
        self._waiting_nodes: set[str] = set()
        self._seq = 0
        self._sampled_at = server.loop.time()
        self._report: LoadReport | None = None
        # By interval, which is rounded to one of a few: a change is told to each of them.
        self._subscribers: dict[int, _Subscribers] = {}
        # Keeps samples and the source's upkeep going while nobody has subscribed.
        self._add_subscribers(_INTERVAL_MS)
        self._timer_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def make(self) -> LoadReport:
        """The load at this moment, at most 20 ms old."""
        now = self._server.loop.time()
        if self._report is None or now - self._sampled_at >= PUSH_GAP_S:
            self._report = self._sample(now)
        return self._report

    def touch(self) -> None:
        """Something that a report says has changed."""
        for group in self._subscribers.values():
            group.schedule.changed()
        self._arm()

    def state_changed(self) -> None:
        """What the node says of itself has changed: subscribers hear of it at once, and not
        only after the gap, since a node that drains may be gone by then."""
        self._push(list(self._subscribers.values()))

    def subscribe(self, push: Push, interval_ms: int) -> None:
        """Call `push` with an encoded report at least every `interval_ms`, and soon after
        changes."""
        rounded_ms = _GAP_MS
        while 2 * rounded_ms <= interval_ms:
            rounded_ms *= 2
        if _INTERVAL_MS <= interval_ms < 2 * _INTERVAL_MS:
            rounded_ms = _INTERVAL_MS
        group = self._subscribers.get(rounded_ms) or self._add_subscribers(rounded_ms)
        group.pushes.add(push)
        group.schedule.changed()
        self._arm()

    def unsubscribe(self, push: Push) -> None:
        """Forget a subscriber."""
        for interval_ms, group in list(self._subscribers.items()):
            group.pushes.discard(push)
            if not group.pushes and interval_ms != _INTERVAL_MS:
                del self._subscribers[interval_ms]

    def account(self, connection: ServerConnection) -> None:
        """Count what a connection has sent since the last sample; it may be closing."""
        link = self._links.setdefault(connection.link, _Link())
        link.sent_bytes += connection.take_sent_bytes()

    def close(self) -> None:
        """Push no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._subscribers.clear()

    # --- sampling --------------------------------------------------------------------------

    def _sample(self, now: float) -> LoadReport:
        server = self._server
        elapsed_s, self._sampled_at = now - self._sampled_at, now
        queued: defaultdict[str, int] = defaultdict(int)
        nodes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for connection in server.connections:
            self.account(connection)
            size_bytes = connection.protocol.fetch_queued_bytes
            queued[connection.link] += size_bytes
            count = connection.protocol.request_count
            if connection.session is not None and (size_bytes or count):
                node = nodes[connection.session.node_id]
                node[0] += size_bytes
                node[1] += count
        for endpoint in server.endpoints:
            self._links.setdefault(str(endpoint), _Link())
        for name, link in self._links.items():
            link.sample(now, elapsed_s, queued[name])
        for node_id in self._waiting_nodes - nodes.keys():
            self._requesters.set(now, RequesterLoad(node_id=node_id))
        for node_id, (size_bytes, count) in nodes.items():
            load = RequesterLoad(node_id=node_id, queued_bytes=size_bytes, inflight_requests=count)
            self._requesters.set(now, load)
        self._waiting_nodes = set(nodes)
        self._seq += 1
        relay = server.source.relay_load()
        return LoadReport(
            node_id=server.options.node_id,
            boot_id=server.boot_id,
            seq=self._seq,
            interval_ms=_INTERVAL_MS,
            state=server.state,
            links=tuple(link.load(now, name) for name, link in self._links.items())
            + server.source.links(),
            requesters=self._requesters.select(now),
            disk=server.source.disk_load(),
            buffers=server.source.buffer_load(),
            relay_queued_bytes=relay.queued_bytes,
            willing=relay.willing,
        )

    # --- pushing ---------------------------------------------------------------------------

    def _add_subscribers(self, interval_ms: int) -> _Subscribers:
        group = self._subscribers[interval_ms] = _Subscribers(interval_ms)
        return group

    def _arm(self) -> None:
        if not self._subscribers:
            return
        due_at = min(group.schedule.due_at for group in self._subscribers.values())
        if self._timer is not None:
            if self._timer_at <= due_at:
                return
            self._timer.cancel()
        self._timer_at = due_at
        self._timer = self._server.loop.call_at(due_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._server.loop.time()
        due = [group for group in self._subscribers.values() if group.schedule.due(now)]
        if due:
            self._push(due)
        else:  # a loop may wake us a moment early
            self._arm()

    def _push(self, groups: list[_Subscribers]) -> None:
        """Push to all of these what is so now: a sample of before the change would be
        believed until the next push."""
        now = self._server.loop.time()
        for group in groups:
            group.schedule.pushed(now)
        try:
            made = self._report = self._sample(now)
            for group in groups:
                if not group.pushes:
                    continue
                report = made
                if group.interval_ms != _INTERVAL_MS:
                    report = msgspec.structs.replace(made, interval_ms=group.interval_ms)
                encoded = encode(report)
                for push in list(group.pushes):
                    push(encoded)
        finally:
            self._arm()
