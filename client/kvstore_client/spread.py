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
With order=layer a shipment is a group of layers of many blocks, or a few groups of few, and a
lane sends a group of all its blocks before the next: layers of a block then come by several
requests, perhaps by several lanes.

What is taken back lands in scratch memory from that moment on: over a byte stream the bytes
of the old attempt pass through our own reader, which knows them by their request id.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Protocol

from kvstore.messages import FetchOutcome
from kvstore.transfer import PENDING
from kvstore_client.jobs import FetchJob
from kvstore_client.lanes import Lane, Part
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
        # Whether layers of a block may come by several requests at once.
        self._split = chunked and job.group_end(job.layers.start) < job.layers.stop
        self._lanes: dict[int | str, Lane] = {}
        self._way: list[int | str] = [owned[0] for owned in owners]  # by which lane the rest goes
        self._ranks = bytearray(len(owners))  # of the owner that is asked next
        self._relayed = bytearray(len(owners))  # no relay is tried any more
        self._worst: dict[int, FetchOutcome] = {}
        # With `_split`: which requests may still bring layers of a block, and blocks of which
        # others will not come, so that they have failed when those have ended.
        self._bringing: defaultdict[int, set[Shipment]] = defaultdict(set)
        self._lost: set[int] = set()
        self._strayed = False
        self._turn: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def send(self, indices: Sequence[int], relay: str = "") -> None:
        """Blocks that are to go by a relay, or to their owners; before `run`."""
        first, last = self._job.layers.start, self._job.layers.stop
        if relay:
            self._lane(relay).add(indices, first, last)
            for index in indices:
                self._relayed[index] = 1
                self._way[index] = relay
            return
        for owner, group in groupby(indices, lambda index: self._owners[index][0]):
            self._lane(owner).add(group, first, last)

    def fail(self, index: int, outcome: FetchOutcome) -> None:
        """A block cannot be asked for where it should be; before `run`."""
        layers = self._job.layers
        self._failed(None, (index, layers.start, layers.stop), outcome)

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
            offsets = self._job.namespace.geometry.offsets
            lane = self._lanes[key] = Lane(key, *self._way_by(key), offsets)
        return lane

    def _way_by(self, key: int | str) -> tuple[FetchPath, PeerLink, PathMeter]:
        ways = self._ways
        return ways.relay_way(key) if isinstance(key, str) else ways.daemon_way(key)

    def _over(self) -> bool:
        return self._job.ended or self._loop.time() >= self._job.deadline_at

    def _alone(self) -> tuple[Lane, Shipment] | None:
        """The only thing that is to be sent, if it is one request."""
        found: Lane | None = None
        for lane in self._lanes.values():
            if lane.under_way or (lane.waiting and found is not None):
                return None
            if lane.waiting:
                found = lane
        if found is None or self._can_move(found):
            return None
        if len(found.waiting) > self._keys_max(found) or (
            self._chunked and found.waiting_bytes > self._chunk_bytes(found)
        ):
            return None
        if not found.uniform or (self._split and self._worst):
            return None  # more than one request; or what waits may have to go elsewhere
        shipment = self._next(found)
        return (found, shipment) if shipment is not None else None

    def _can_move(self, lane: Lane) -> bool:
        """Whether its blocks could go another way when it is silent."""
        return lane.relay or self._other_way(lane, lane.waiting[0][0])

    def _other_way(self, lane: Lane, index: int) -> bool:
        if lane.relay or self._way[index] != lane.key:
            return True
        if not self._relayed[index] and self._ways.spare_relay(self._job):
            return True
        more = self._ranks[index] + 1 < len(self._owners[index])
        return more and self._ways.copied

    def _pump(self) -> None:
        """Send what the windows allow."""
        self._strayed = True
        while self._strayed:
            self._strayed = False
            for lane in list(self._lanes.values()):
                while lane.waiting and self._room(lane):
                    shipment = self._next(lane)
                    if shipment is None:
                        continue  # all that was looked at goes elsewhere
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

    def _next(self, lane: Lane) -> Shipment | None:
        """The next request of a lane; None if what was its next goes by others meanwhile."""
        job = self._job
        count = self._keys_max(lane)
        lane.sort()
        _, first, last = lane.waiting[0]
        if not self._chunked:
            return self._shipment(lane, lane.take(count), first, last)
        chunk_bytes = self._chunk_bytes(lane)
        until = min(last, job.group_end(first))
        count = min(count, max(1, chunk_bytes // job.size_bytes(first, until)))
        indices = lane.take(count, partial(self._goes_by, lane) if self._split else None)
        if not indices:
            return None
        if until < last and not (lane.waiting and lane.waiting[0][1] == first):
            # A group of so few blocks is not worth a request.
            size_bytes = chunk_bytes // len(indices)
            while until < last and job.size_bytes(first, job.group_end(until)) <= size_bytes:
                until = min(last, job.group_end(until))
        if until < last:
            lane.add(indices, until, last)
            lane.barren.clear()
        return self._shipment(lane, indices, first, until)

    def _goes_by(self, lane: Lane, part: Part) -> bool:
        """Whether what waits in a lane is to be sent there. If not, it is where it belongs now:
        other layers of its block have failed, or were taken over."""
        index = part[0]
        if index in self._lost or self._job.outcomes[index] != PENDING:
            return False
        way = self._way[index]
        if way == lane.key:
            return True
        self._put_back(part, way)
        self._strayed = True  # that lane may have been looked at already
        return False

    def _shipment(self, lane: Lane, indices: Sequence[int], first: int, last: int) -> Shipment:
        def on_failed(index: int, outcome: FetchOutcome) -> None:
            rest = self._rest(shipment, index)
            self._landed(shipment, index)
            self._failed(lane, rest, outcome)

        def on_bytes(size_bytes: int) -> None:
            lane.meter.arrived(self._loop.time(), size_bytes)

        shipment = Shipment(
            self._loop,
            lane.path,
            lane.link,
            self._job,
            indices,
            range(first, last),
            on_failed,
            on_bytes,
        )
        if self._split:
            for index in indices:
                self._bringing[index].add(shipment)
        return shipment

    def _rest(self, shipment: Shipment, index: int) -> Part:
        """What a shipment has not brought of a block."""
        layers = shipment.layers
        return index, self._job.first_missing(index, layers.start), layers.stop

    def _all_landed(self, shipment: Shipment) -> None:
        if self._split:
            for index in shipment.indices:
                self._landed(shipment, index)

    def _landed(self, shipment: Shipment, index: int) -> None:
        """A shipment brings no more of a block, and nobody writes there on its behalf."""
        if not self._split:
            return
        bringing = self._bringing[index]
        bringing.discard(shipment)
        if not bringing and index in self._lost:
            self._lost.discard(index)
            self._job.block_failed(index, self._worst[index])

    async def _ship(self, lane: Lane, shipment: Shipment) -> None:
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
                        rest = self._rest(shipment, index)
                        self._landed(shipment, index)
                        self._failed(lane, rest, FetchOutcome.UNAVAILABLE)
            # Without the slot: a peer that hangs must not keep all of them.
            await shipment.freed()
            self._all_landed(shipment)
        except Exception as error:
            # Nobody awaits this task, and the blocks must not be lost with it.
            logger.exception("internal error in a shipment of %s", link.peer)
            job.add_error(error)
            self._take_back(lane, shipment, self._unavailable)
            await shipment.freed()
            self._all_landed(shipment)
        finally:
            self._uncharge(lane, shipment)
            lane.under_way.pop(shipment, None)
            self._wake()

    # --- failing ---------------------------------------------------------------------------

    def _unavailable(self, lane: Lane, part: Part) -> None:
        self._failed(lane, part, FetchOutcome.UNAVAILABLE)

    def _failed(self, lane: Lane | None, part: Part, outcome: FetchOutcome) -> None:
        """A block did not come by a lane: another way, the next owner, or its end."""
        job, index = self._job, part[0]
        known = self._worst.get(index)
        if lane is None or not lane.relay:
            # What storage itself says, not what a relay does.
            self._worst[index] = outcome if known is None else worse(known, outcome)
        if job.ended:
            return
        if lane is not None and self._way[index] != lane.key:
            # Other layers of it have failed there before, or were taken over: the same way.
            self._put_back(part, self._way[index])
            return
        if lane is not None and lane.relay:
            self._put_back(part, self._owners[index][self._ranks[index]])
            return
        if outcome in (FetchOutcome.UNAVAILABLE, FetchOutcome.TIMEOUT):
            relay = "" if self._relayed[index] else self._ways.spare_relay(job)
            if relay:
                self._relayed[index] = 1
                self._put_back(part, relay)
                # If it fails there too, it is the next owner's turn; but not where the first is
                # only busy and alone has the block: that would make a miss of a late hit.
                if outcome is FetchOutcome.UNAVAILABLE or self._ways.copied:
                    self._ranks[index] = min(self._ranks[index] + 1, len(self._owners[index]) - 1)
                return
        if self._ranks[index] + 1 < len(self._owners[index]):
            self._ranks[index] += 1
            self._put_back(part, self._owners[index][self._ranks[index]])
        elif self._bringing.get(index):
            self._lost.add(index)  # the memory of a block that has failed is not written any more
        else:
            job.block_failed(index, self._worst[index])

    def _put_back(self, part: Part, key: int | str) -> None:
        """Let layers of a block, and what is not sent of its others, go by a lane."""
        index = part[0]
        if index in self._lost or self._job.outcomes[index] != PENDING:
            return  # nobody waits for it any more
        self._way[index] = key
        self._lane(key).put(part)

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
        left_bytes = lane.sent_bytes + lane.waiting_bytes
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
            size_bytes = victim.waiting_bytes / 2

        def may(index: int) -> bool:
            if not self._may_go(thief, index):
                return False
            self._relayed[index] |= thief.relay
            self._way[index] = thief.key
            return True

        victim.give(thief, size_bytes, LOOKS_MAX, may)

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
                    self._job.moved_count += self._take_back(lane, shipment, self._try_other)
                elif self._late(lane, shipment, now):
                    self._job.moved_count += self._take_back(lane, shipment, self._move)

    def _try_other(self, lane: Lane, part: Part) -> None:
        if self._other_way(lane, part[0]):
            self._failed(lane, part, FetchOutcome.TIMEOUT)
        else:
            self._put_back(part, lane.key)

    def _take_back(self, lane: Lane, shipment: Shipment, then: Callable[[Lane, Part], None]) -> int:
        """Have its blocks come again, the layers that are not here; how many blocks."""

        def free(index: int) -> None:
            rest = self._rest(shipment, index)
            self._landed(shipment, index)
            then(lane, rest)

        return shipment.take_back(free)

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
        pending = [index for index in shipment.pending() if index not in self._lost]
        # With all blocks here, or known to be nowhere, only the last word is missing, and nobody
        # needs to wait for it.
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
        known = self._lanes.get(key)
        link, meter = (known.link, known.meter) if known is not None else self._way_by(key)[1:]
        here_Bps = shipment.arrived_bytes / age_s
        return link.usable and (not meter.seen_Bps or meter.seen_Bps > here_Bps)

    def _other(self, lane: Lane, index: int) -> int | str | None:
        """The lane to which a block goes when it is taken from a lane; None if there is none."""
        if self._way[index] != lane.key:
            return self._way[index]  # its other layers have gone there
        if lane.relay:
            return self._owners[index][self._ranks[index]]
        return None if self._relayed[index] else self._ways.spare_relay(self._job) or None

    def _move(self, lane: Lane, part: Part) -> None:
        index = part[0]
        key = self._other(lane, index)
        if isinstance(key, str):
            self._relayed[index] = 1
        self._put_back(part, lane.key if key is None else key)

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
