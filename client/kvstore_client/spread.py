"""One fetch over all its ways: sends what the plan says, and moves blocks when a way is slow,
silent or lost.

::

    plan ──▶ lanes ──▶ shipments ──▶ pieces in the caller's memory
              │  ▲         │
              │  └─────────┤ a shipment failed: its blocks go the other way, then to the next owner
              │            │ it is silent, or late while another lane is idle: it is taken back
              └ a lane that is idle takes over what another has not sent yet

A *lane* is one way of this fetch: one peer by one path. What it has sent is a few shipments,
so that there is something to take over, and no more than about 100 ms of its rate is under way.

What is taken back lands in scratch memory from that moment on: over a byte stream the bytes
of the old attempt pass through our own reader, which knows them by their request id.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from kvstore.messages import FetchOutcome
from kvstore_client.jobs import FetchJob
from kvstore_client.link import KEY_METADATA_BYTES, PeerLink
from kvstore_client.paths.base import FetchPath, Shipment
from kvstore_client.places import place_bytes_of
from kvstore_client.selector import PathMeter

logger = logging.getLogger(__name__)

# What is under way on one path at a time.
WINDOW_S = 0.1
# A shipment: four in a window, but no smaller than what a request costs little for, nor
# larger than what should be lost when it must be sent again.
CHUNK_S = 0.025
CHUNK_BYTES_MIN = 1024 * 1024
CHUNK_BYTES_MAX = 32 * 1024 * 1024
# Of a lane of which no rate is known yet.
CHUNK_BYTES_FIRST = 4 * 1024 * 1024
# What must be saved before a block changes its lane: a request and its hop.
MOVE_S_MIN = 0.005
# A shipment that is under way is taken back when it takes so many times longer than expected,
# and is late by more than noise: its bytes so far were for nothing.
LATE_FACTOR = 3.0
LATE_S_MIN = 0.05
# Where lanes are not to take over, or nothing is known of their rate: of the time that a
# request has, so that the other path has as much.
LATE_SHARE = 0.4
# Nothing has come of a shipment: of a peer that says nothing else either, and of one that
# pushes load reports and may have much to do.
SILENT_S = 0.5
STALLED_S = 1.0
# Of the time that a request has; the other way needs some too.
STALLED_SHARE = 0.3
# Blocks that are looked at in a turn for what another lane may take over.
LOOKS_MAX = 256
# How often slow and silent lanes are looked for.
LOOK_S = 0.05

_FETCH_RANKS = (FetchOutcome.CORRUPT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE)


class Ways(Protocol):
    """What a spread may use; the cluster."""

    def daemon_way(self, owner: int) -> tuple[FetchPath, PeerLink, PathMeter]:
        """The way to a daemon."""

    def relay_way(self, node_id: str) -> tuple[FetchPath, PeerLink, PathMeter]:
        """The way by a relay."""

    def spare_relay(self, job: FetchJob) -> str:
        """Node id of a relay that can be used now; "" if there is none."""

    @property
    def copied(self) -> bool:
        """Whether each block is at both of its owners."""


class Lane:
    """One way of one fetch.

    Attributes:
        key: Index of the daemon, or node id of the relay.
        waiting: Blocks that are yet to be sent.
        under_way: Shipments.
        barren: For another lane, how many at the end of `waiting` it may not take over.
    """

    __slots__ = ("barren", "key", "link", "meter", "path", "under_way", "waiting")

    def __init__(self, key: int | str, path: FetchPath, link: PeerLink, meter: PathMeter) -> None:
        self.key = key
        self.path = path
        self.link = link
        self.meter = meter
        self.waiting: deque[int] = deque()
        self.under_way: dict[Shipment, asyncio.Task[None]] = {}
        self.barren: dict[int | str, int] = {}

    @property
    def relay(self) -> bool:
        """Whether it is the way by a relay."""
        return isinstance(self.key, str)

    @property
    def sent_bytes(self) -> int:
        """Bytes of this fetch that are under way."""
        return sum(one.size_bytes - one.arrived_bytes for one in self.under_way)


class Spread:
    """One fetch under way. On the loop's thread.

    Args:
        owners: Daemons of each block, best first.
        chunked: Whether to send in small shipments: with only one way there is nothing to
            take over.
        eager: Whether lanes that run dry take over from others. If not, only what fails, is
            silent or would come too late goes another way.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ways: Ways,
        job: FetchJob,
        owners: Sequence[tuple[int, ...]],
        chunked: bool,
        eager: bool = False,
    ) -> None:
        self._loop = loop
        self._ways = ways
        self._job = job
        self._owners = owners
        self._chunked = chunked
        self._eager = eager
        self._lanes: dict[int | str, Lane] = {}
        self._ranks = bytearray(len(owners))  # of the owner that is asked next
        self._relayed = bytearray(len(owners))  # no relay is tried any more
        self._worst: dict[int, FetchOutcome] = {}
        self._turn: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def send(self, indices: Sequence[int], relay: str = "") -> None:
        """Blocks that are to go by a relay, or to their owners; before `run`."""
        if relay:
            self._lane(relay).waiting.extend(indices)
            for index in indices:
                self._relayed[index] = 1
            return
        for index in indices:
            self._lane(self._owners[index][self._ranks[index]]).waiting.append(index)

    def fail(self, index: int, outcome: FetchOutcome) -> None:
        """A block cannot be asked for where it should be; before `run`."""
        self._failed(None, index, outcome)

    async def run(self) -> None:
        """Return when every block has its outcome, or the job has ended."""
        try:
            while True:
                if self._over():
                    # Before its own timer: what is under way must end as timed out.
                    self._job.time_out()
                    return
                alone = self._alone()
                if alone is not None:
                    await self._ship(*alone)  # the usual case costs no task
                    continue
                self._level()
                self._pump()
                if not any(lane.under_way for lane in self._lanes.values()):
                    if not any(lane.waiting for lane in self._lanes.values()):
                        return
                    continue
                await self._wait()
                self._look()
        finally:
            for lane in self._lanes.values():
                for task in list(lane.under_way.values()):
                    task.cancel()
            tasks = [task for lane in self._lanes.values() for task in lane.under_way.values()]
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)
            for lane in self._lanes.values():
                for shipment in lane.under_way:  # their tasks have not even begun
                    self._uncharge(lane, shipment)

    # --- sending ---------------------------------------------------------------------------

    def _lane(self, key: int | str) -> Lane:
        lane = self._lanes.get(key)
        if lane is None:
            ways = self._ways
            way = ways.relay_way(key) if isinstance(key, str) else ways.daemon_way(key)
            lane = self._lanes[key] = Lane(key, *way)
        return lane

    def _over(self) -> bool:
        return self._job.ended or self._loop.time() >= self._job.deadline_at

    def _alone(self) -> tuple[Lane, list[int]] | None:
        """The only thing that is to be sent, if it is one request."""
        found: Lane | None = None
        for lane in self._lanes.values():
            if lane.under_way or (lane.waiting and found is not None):
                return None
            if lane.waiting:
                found = lane
        if found is None or self._can_move(found):
            return None
        count = len(found.waiting)
        if count > self._keys_max(found) or (
            self._chunked and count * self._job.span_bytes > self._chunk_bytes(found)
        ):
            return None
        indices = self._take(found)
        if found.waiting:
            found.waiting.extendleft(reversed(indices))
            return None
        return found, indices

    def _can_move(self, lane: Lane) -> bool:
        """Whether its blocks could go another way when it is silent."""
        return lane.relay or self._other_way(lane, lane.waiting[0])

    def _other_way(self, lane: Lane, index: int) -> bool:
        if lane.relay:
            return True
        if not self._relayed[index] and self._ways.spare_relay(self._job):
            return True
        more = self._ranks[index] + 1 < len(self._owners[index])
        return more and self._ways.copied

    def _pump(self) -> None:
        """Send what the windows allow."""
        for lane in list(self._lanes.values()):
            while lane.waiting and self._room(lane):
                shipment = self._shipment(lane, self._take(lane))
                # At once: the window must know of it before the next one is looked at.
                self._charge(lane, shipment)
                task = self._loop.create_task(self._run(lane, shipment))
                lane.under_way[shipment] = task

    def _room(self, lane: Lane) -> bool:
        if not lane.under_way or not self._chunked:
            return True
        chunk_bytes = self._chunk_bytes(lane)
        window_bytes = max(2 * chunk_bytes, WINDOW_S * lane.meter.seen_Bps)
        return lane.meter.inflight_bytes + chunk_bytes <= window_bytes or (
            lane.sent_bytes < chunk_bytes
        )

    def _chunk_bytes(self, lane: Lane) -> int:
        rate_Bps = lane.meter.seen_Bps
        if not rate_Bps:
            return CHUNK_BYTES_FIRST
        return int(min(max(CHUNK_S * rate_Bps, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX))

    def _keys_max(self, lane: Lane) -> int:
        """Blocks of one request, which says where their memory is if the peer can reach it."""
        place_bytes = place_bytes_of(self._job.memory[0]) if lane.link.memory else 0
        return lane.link.keys_max(KEY_METADATA_BYTES + place_bytes)

    def _take(self, lane: Lane) -> list[int]:
        """The next blocks of a lane that go in one request."""
        count = self._keys_max(lane)
        if self._chunked:
            count = min(count, max(1, self._chunk_bytes(lane) // self._job.span_bytes))
        waiting, first_missing = lane.waiting, self._job.first_missing
        layer = first_missing(waiting[0])
        indices: list[int] = []
        while waiting and len(indices) < count and first_missing(waiting[0]) == layer:
            indices.append(waiting.popleft())
        return indices

    def _shipment(self, lane: Lane, indices: Sequence[int]) -> Shipment:
        def on_failed(index: int, outcome: FetchOutcome) -> None:
            self._failed(lane, index, outcome)

        def on_bytes(size_bytes: int) -> None:
            lane.meter.arrived(self._loop.time(), size_bytes)

        return Shipment(self._loop, lane.path, lane.link, self._job, indices, on_failed, on_bytes)

    async def _ship(self, lane: Lane, indices: Sequence[int]) -> None:
        shipment = self._shipment(lane, indices)
        shipment.on_known = partial(self._expect_end, lane, shipment, STALLED_S)
        self._charge(lane, shipment)
        try:
            await self._run(lane, shipment)
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _expect_end(self, lane: Lane, shipment: Shipment, after_s: float) -> None:
        """Nobody looks after the only shipment, but for what it says when all blocks are here."""
        if self._timer is None:
            self._timer = self._loop.call_later(after_s, self._end, lane, shipment)

    def _end(self, lane: Lane, shipment: Shipment) -> None:
        self._timer = None
        moved_at = max(shipment.moved_at, lane.link.fetched_at)
        left_s = STALLED_S - (self._loop.time() - moved_at)
        if shipment.ended:
            return
        if left_s > 0.0:
            self._expect_end(lane, shipment, left_s)  # it works in order, for others at present
            return
        lane.link.failed(shipment.begun_at)
        shipment.take_back(lambda index: None)

    def _charge(self, lane: Lane, shipment: Shipment) -> None:
        """The bytes of a shipment are under way from now on; `_run` takes them off again."""
        meter = lane.meter
        meter.sent(self._loop.time(), shipment.size_bytes)
        rate_Bps = self._rate_Bps(lane) or self._likely_Bps()
        if rate_Bps:
            # Behind all that is under way on the same link, whoever asked for it.
            shipment.expected_s = meter.inflight_bytes / rate_Bps

    def _uncharge(self, lane: Lane, shipment: Shipment) -> None:
        lane.meter.gone(self._loop.time(), shipment.size_bytes - shipment.arrived_bytes)

    async def _run(self, lane: Lane, shipment: Shipment) -> None:
        link, job = lane.link, self._job
        try:
            async with link.fetch_slots:
                if self._over() or shipment.ended:
                    return
                refusal = link.refusal(job.namespace)
                if refusal is None and link.allow():
                    await shipment.run()
                else:
                    job.add_error(refusal or link.unavailable())
                    for index in shipment.indices:
                        self._failed(lane, index, FetchOutcome.UNAVAILABLE)
            # Without the slot: a peer that hangs must not keep all of them.
            await shipment.freed()
        except Exception as error:
            # Nobody awaits this task, and the blocks must not be lost with it.
            logger.exception("internal error in a shipment of %s", link.peer)
            job.add_error(error)
            shipment.take_back(lambda index: self._failed(lane, index, FetchOutcome.UNAVAILABLE))
        finally:
            self._uncharge(lane, shipment)
            lane.under_way.pop(shipment, None)
            self._wake()

    # --- failing ---------------------------------------------------------------------------

    def _failed(self, lane: Lane | None, index: int, outcome: FetchOutcome) -> None:
        """A block did not come by a lane: another way, the next owner, or its end."""
        job = self._job
        known = self._worst.get(index)
        if lane is None or not lane.relay:
            # What storage itself says, not what a relay does.
            self._worst[index] = outcome if known is None else worse(known, outcome)
        if job.ended:
            return
        if lane is not None and lane.relay:
            self._put_back(index, self._owners[index][self._ranks[index]])
            return
        if outcome in (FetchOutcome.UNAVAILABLE, FetchOutcome.TIMEOUT):
            relay = "" if self._relayed[index] else self._ways.spare_relay(job)
            if relay:
                self._relayed[index] = 1
                self._put_back(index, relay)
                # If it fails there too, it is the next owner's turn; but not where the first is
                # only busy and alone has the block: that would make a miss of a late hit.
                if outcome is FetchOutcome.UNAVAILABLE or self._ways.copied:
                    self._ranks[index] = min(self._ranks[index] + 1, len(self._owners[index]) - 1)
                return
        if self._ranks[index] + 1 < len(self._owners[index]):
            self._ranks[index] += 1
            self._put_back(index, self._owners[index][self._ranks[index]])
        else:
            job.block_failed(index, self._worst[index])

    def _put_back(self, index: int, key: int | str) -> None:
        lane = self._lane(key)
        lane.waiting.append(index)
        lane.barren.clear()

    # --- moving ----------------------------------------------------------------------------

    def _rate_Bps(self, lane: Lane) -> float:
        """What a lane brings a second; lanes of daemons share the link of this node."""
        rate_Bps = lane.meter.seen_Bps
        if lane.relay:
            return rate_Bps
        busy = sum(
            1
            for one in self._lanes.values()
            if not one.relay and (one.waiting or one.under_way or one is lane)
        )
        return rate_Bps / busy

    def _likely_Bps(self) -> float:
        """Of a lane of which nothing is known: what the others have shown."""
        return max((lane.meter.seen_Bps for lane in self._lanes.values()), default=0.0)

    def _left_s(self, lane: Lane) -> float:
        """How long until a lane has brought all that it has."""
        rate_Bps = self._rate_Bps(lane)
        left_bytes = lane.sent_bytes + len(lane.waiting) * self._job.span_bytes
        if not left_bytes:
            return 0.0
        return left_bytes / rate_Bps if rate_Bps else math.inf

    def _level(self) -> None:
        """Let lanes that run dry take over what others have not sent yet."""
        if not self._eager or len(self._lanes) < 2:
            return
        for thief in list(self._lanes.values()):
            if thief.waiting or len(thief.under_way) > 1 or not self._rate_Bps(thief):
                continue
            if not thief.link.usable:
                continue
            victims = [
                lane
                for lane in self._lanes.values()
                if lane is not thief and lane.waiting and lane.relay != thief.relay
            ]
            if victims:
                self._steal(thief, max(victims, key=self._left_s))

    def _steal(self, thief: Lane, victim: Lane) -> None:
        thief_Bps, victim_Bps = self._rate_Bps(thief), self._rate_Bps(victim)
        saved_s = self._left_s(victim) - self._left_s(thief)
        if saved_s < MOVE_S_MIN:
            return
        if victim_Bps:
            # Both end together when what is moved takes as long here as it would have there.
            size_bytes = saved_s / (1 / thief_Bps + 1 / victim_Bps)
        else:
            size_bytes = len(victim.waiting) * self._job.span_bytes / 2
        waiting = victim.waiting
        count = min(int(size_bytes // self._job.span_bytes), len(waiting))
        # Behind those of which it is known: while a block waits nothing changes for it.
        barren = min(victim.barren.get(thief.key, 0), len(waiting))
        waiting.rotate(barren)
        kept: list[int] = []
        moved = 0
        for _ in range(min(LOOKS_MAX, len(waiting) - barren)):
            if moved == count:
                break
            index = waiting.pop()
            if self._may_go(thief, index):
                thief.waiting.appendleft(index)
                self._relayed[index] |= thief.relay
                moved += 1
            else:
                kept.append(index)
        waiting.extend(reversed(kept))
        waiting.rotate(-barren)
        if moved:
            # Their counts include what has gone, or what is here no more.
            victim.barren.clear()
            thief.barren.clear()
        victim.barren[thief.key] = barren + len(kept)

    def _may_go(self, lane: Lane, index: int) -> bool:
        if lane.relay:
            return not self._relayed[index]
        return self._owners[index][self._ranks[index]] == lane.key

    def _look(self) -> None:
        """Take back what is silent, and what is late while another lane is idle."""
        now = self._loop.time()
        for lane in list(self._lanes.values()):
            for shipment in list(lane.under_way):
                if shipment.ended:
                    continue  # its memory is not free yet
                if self._silent(lane, shipment, now):
                    self._blame(lane, shipment)
                    self._take_back(shipment, partial(self._try_other, lane))
                elif self._late(lane, shipment, now):
                    self._take_back(shipment, partial(self._move, lane))

    def _try_other(self, lane: Lane, index: int) -> None:
        if self._other_way(lane, index):
            self._failed(lane, index, FetchOutcome.TIMEOUT)
        else:
            self._put_back(index, lane.key)

    def _take_back(self, shipment: Shipment, then: Callable[[int], None]) -> None:
        """Have its blocks come again, the layers that are not here."""
        self._job.moved_count += shipment.take_back(then)

    def _blame(self, lane: Lane, shipment: Shipment) -> None:
        """A shipment was silent: what that says of the peer."""
        if lane.relay and lane.link.fetched_at <= shipment.begun_at:
            # It may well push reports: a path that passes small packets only looks like that.
            lane.link.failed(shipment.begun_at)
        else:
            lane.link.timed_out(shipment.begun_at)

    def _silent(self, lane: Lane, shipment: Shipment, now: float) -> bool:
        limit_s = SILENT_S if lane.link.silent_s(now) >= SILENT_S else STALLED_S
        # Whoever brings bytes of other requests works in order.
        moved_at = max(shipment.moved_at, lane.link.fetched_at)
        if now - moved_at < min(limit_s, STALLED_SHARE * self._job.deadline_s):
            return False
        pending = shipment.pending()
        # With all blocks here only the last word is missing, and nobody needs to wait for it.
        return not pending or any(self._other_way(lane, index) for index in pending)

    def _late(self, lane: Lane, shipment: Shipment, now: float) -> bool:
        """Whether a shipment is overdue while the other path is idle and would be in time."""
        age_s = now - shipment.begun_at
        limit_s = LATE_SHARE * self._job.deadline_s
        if self._eager and shipment.expected_s:
            limit_s = min(limit_s, LATE_S_MIN + LATE_FACTOR * shipment.expected_s)
        if age_s < limit_s:
            return False
        others = [one for one in self._lanes.values() if one.relay != lane.relay]
        if any(one.waiting or one.under_way for one in others):
            return False
        for index in shipment.pending():
            key = self._other(lane, index)
            if key is not None:
                break
        else:
            return False
        ways = self._ways
        _, link, meter = ways.relay_way(key) if isinstance(key, str) else ways.daemon_way(key)
        here_Bps = shipment.arrived_bytes / age_s
        return link.usable and (not meter.seen_Bps or meter.seen_Bps > here_Bps)

    def _other(self, lane: Lane, index: int) -> int | str | None:
        """The lane to which a block goes when it is taken from a lane; None if there is none."""
        if lane.relay:
            return self._owners[index][self._ranks[index]]
        return None if self._relayed[index] else self._ways.spare_relay(self._job) or None

    def _move(self, lane: Lane, index: int) -> None:
        key = self._other(lane, index)
        if isinstance(key, str):
            self._relayed[index] = 1
        self._put_back(index, lane.key if key is None else key)

    # --- waiting ---------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Until a shipment has ended, or it is time to look again."""
        self._turn = self._loop.create_future()
        timer = self._loop.call_later(LOOK_S, self._wake)
        try:
            await self._turn
        finally:
            timer.cancel()
            self._turn = None

    def _wake(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)


def worse(known: FetchOutcome, outcome: FetchOutcome) -> FetchOutcome:
    """What to say of a block that failed at two daemons."""
    for rank in _FETCH_RANKS:
        if rank in (known, outcome):
            return rank
    return FetchOutcome.MISS
