"""What waits for a way of a fetch, in which order it goes, and whose layers come by several."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from kvstore.messages import FetchOutcome
from kvstore.transfer import PENDING
from kvstore_client.handles import FetchHandle
from kvstore_client.jobs import FetchJob
from kvstore_client.lanes import Lane, Part
from kvstore_client.namespaces import Namespace
from kvstore_client.paths.base import Shipment
from kvstore_client.placement import PlacedKeys
from kvstore_client.selector import PathMeter
from kvstore_client.selector.gain import GainMeter
from kvstore_client.spread import Spread, Ways
from tests.support.engine import key, layout

# Four groups of two layers.
SIZES = (10, 20, 30, 40, 50, 60, 70, 80)
OFFSETS = (0, 10, 30, 60, 100, 150, 210, 280, 360)
LAYERS = range(len(SIZES))
GROUP = 2
MISS, HIT = FetchOutcome.MISS, FetchOutcome.HIT
UNAVAILABLE = FetchOutcome.UNAVAILABLE


def lane(name: int | str = 0) -> Lane:
    """A lane in which nothing waits."""
    nothing: Any = None
    return Lane(name, nothing, nothing, PathMeter(GainMeter(), ""), OFFSETS)


def make_job(count: int, group: int = GROUP) -> FetchJob:
    """A fetch of some blocks."""
    keys = [key(number) for number in range(count)]
    memory = [memoryview(bytearray(OFFSETS[-1])) for _ in keys]
    space = Namespace("pool", layout(*SIZES))
    job = FetchJob(space, PlacedKeys(keys, ()), memory, LAYERS, group, 0.0, 60.0)
    job.handle = FetchHandle(60.0, job.cancel, len(SIZES))
    return job


# --- what waits in a lane ------------------------------------------------------------------


def test_blocks_go_in_order_and_their_bytes_are_known() -> None:
    one = lane()
    one.add(range(5), 0, 8)
    assert one.waiting_bytes == 5 * 360
    assert one.uniform
    assert one.take(2) == [0, 1]
    assert one.waiting_bytes == 3 * 360
    assert one.take(9) == [2, 3, 4]
    assert one.waiting_bytes == 0
    assert one.uniform


def test_one_request_is_about_the_same_layers() -> None:
    one = lane()
    one.add(range(2), 0, 8)
    one.add(range(2, 4), 2, 8)
    one.put((4, 2, 4))
    assert not one.uniform
    assert [one.take(9) for _ in range(3)] == [[0, 1], [2, 3], [4]]


def test_what_comes_back_goes_before_later_layers() -> None:
    one = lane()
    one.add(range(2), 2, 8)
    for index in (7, 9):
        one.put((index, 0, 2))
    one.put((8, 4, 8))
    one.sort()
    assert [part[0] for part in one.waiting] == [7, 9, 0, 1, 8]
    assert one.waiting_bytes == 2 * 330 + 2 * 30 + 260


def test_what_does_not_go_there_any_more_is_gone() -> None:
    one = lane()
    one.add(range(6), 0, 8)
    seen: list[Part] = []

    def fits(part: Part) -> bool:
        seen.append(part)
        return part[0] % 2 == 0

    assert one.take(2, fits) == [0, 2]
    assert seen == [(0, 0, 8), (1, 0, 8), (2, 0, 8)]
    assert one.waiting_bytes == 3 * 360


def test_another_lane_gets_bytes_from_the_end() -> None:
    one, other = lane(0), lane("relay")
    one.add(range(3), 2, 8)  # 330 bytes each
    one.add(range(3, 6), 6, 8)  # 150 bytes each
    assert one.give(other, 150 + 150 + 149, 99, lambda index: True) == 2
    assert [part[0] for part in other.waiting] == [4, 5]
    assert (one.waiting_bytes, other.waiting_bytes) == (3 * 330 + 150, 300)
    # What may not go is looked at once.
    asked: list[int] = []

    def never(index: int) -> bool:
        asked.append(index)
        return False

    assert one.give(other, 1e9, 99, never) == 0
    assert one.give(other, 1e9, 99, never) == 0
    assert asked == [3, 2, 1, 0]
    assert [part[0] for part in one.waiting] == [0, 1, 2, 3]


# --- groups of a block by several requests -------------------------------------------------


def test_groups_of_a_block_may_come_in_any_order() -> None:
    job = make_job(2)
    job.piece_arrived(0, 2)
    assert job.handle.layers_ready == 0
    assert job.first_missing(0, 0) == 0
    assert job.first_missing(0, 4) == 6
    for index, group in ((0, 0), (1, 0), (1, 1), (0, 3)):
        job.piece_arrived(index, group)
    assert job.handle.layers_ready == 2
    assert job.pending() == [0, 1]
    job.piece_arrived(0, 1)
    assert job.handle.layers_ready == 4
    assert job.pending() == [1]
    job.block_failed(1, MISS)
    assert job.handle.layers_ready == len(SIZES)
    assert list(job.outcomes) == [HIT, MISS]
    assert not job.handle.wait_layer(4)
    assert job.handle.wait_layer(3)


def test_a_request_writes_its_own_layers_only() -> None:
    job = make_job(1)
    transfer = job.transfer([0], range(2, 6), lambda index, outcome: None)
    (memory,) = transfer.memory
    assert isinstance(memory, memoryview)
    assert memory.nbytes == 30 + 40 + 50 + 60
    memory[0], memory[-1] = 1, 2
    whole = job.memory[0]
    assert isinstance(whole, memoryview)
    assert (whole[OFFSETS[2]], whole[OFFSETS[6] - 1]) == (1, 2)


def test_groups_end_where_they_did_whatever_is_asked_for() -> None:
    job = make_job(1)
    assert [job.group_end(layer) for layer in LAYERS] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert make_job(1, 3).group_end(7) == 8
    assert make_job(1, 0).group_end(3) == 8


# --- what a spread makes of that -----------------------------------------------------------


class Link:
    """A peer that takes all."""

    memory = None
    usable = True

    def __init__(self, name: str) -> None:
        self.peer = name

    def keys_max(self, each_bytes: int) -> int:
        """Keys of one request."""
        return 1000


class AllWays(Ways):
    """Two daemons and a relay; what is sent goes nowhere."""

    copied = False
    relay = "relay"

    def __init__(self) -> None:
        self.ways: dict[int | str, Any] = {
            name: (None, Link(str(name)), PathMeter(GainMeter(), name if name == "relay" else ""))
            for name in (0, 1, "relay")
        }
        for _, _, meter in self.ways.values():
            meter.observed_Bps = 1e4  # so that a few bytes are worth a move

    def daemon_way(self, owner: int) -> Any:
        return self.ways[owner]

    def relay_way(self, node_id: str) -> Any:
        return self.ways[node_id]

    def spare_relay(self, job: Any) -> str:
        return self.relay


class Bed:
    """A spread of some blocks, of whose requests a test says what becomes.

    Args:
        chunk: Bytes of a shipment.
    """

    def __init__(
        self, count: int, chunk: int, monkeypatch: pytest.MonkeyPatch, owners: Sequence[int] = (0,)
    ) -> None:
        for name in ("CHUNK_BYTES_MIN", "CHUNK_BYTES_MAX"):
            monkeypatch.setattr(f"kvstore_client.spread.{name}", chunk)
        self.job, self.ways = make_job(count), AllWays()
        loop = asyncio.get_running_loop()
        owned = [tuple(owners)] * count
        self.spread = Spread(loop, self.ways, self.job, owned, chunked=True, eager=True)

    def next(self, way: int | str = 0) -> Shipment:
        """The next shipment by a way."""
        found = self.spread._next(self.spread._lane(way))
        assert found is not None
        return found

    def all(self, way: int | str = 0) -> list[tuple[Sequence[int], range]]:
        """What all shipments by a way are about."""
        made, waiting = [], self.spread._lane(way).waiting
        while waiting:
            one = self.spread._next(self.spread._lane(way))
            if one is not None:
                made.append((one.indices, one.layers))
        return made

    def fail(self, shipment: Shipment, outcome: FetchOutcome) -> None:
        """All that a shipment is about fails."""
        for index in shipment.indices:
            shipment._on_failed(index, outcome)

    def end(self, shipment: Shipment) -> None:
        """As when the task of a shipment has ended."""
        for index in shipment.indices:
            self.spread._landed(shipment, index)


@pytest.mark.asyncio
async def test_a_lane_sends_a_group_of_all_its_blocks_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(5, 140, monkeypatch)  # groups of 30, 70, 110 and 150 bytes
    bed.spread.send(range(5))
    assert bed.spread._lane(0).waiting_bytes == 5 * 360
    assert bed.all() == [
        ([0, 1, 2, 3], range(2)),
        # The last of a group alone takes another one along.
        ([4], range(4)),
        ([0, 1], range(2, 4)),
        ([2, 3], range(2, 4)),
        *(([index], range(4, 6)) for index in (4, 0, 1, 2, 3)),
        *(([index], range(6, 8)) for index in (4, 0, 1, 2, 3)),
    ]
    assert bed.spread._lane(0).waiting_bytes == 0


@pytest.mark.asyncio
async def test_a_miss_stops_what_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(4, 60, monkeypatch)
    bed.spread.send(range(4))
    first = bed.next()
    assert (first.indices, first.layers) == ([0, 1], range(2))
    first._on_failed(1, MISS)
    bed.end(first)
    assert list(bed.job.outcomes)[1] == MISS
    assert 1 not in [index for indices, _ in bed.all() for index in indices]


@pytest.mark.asyncio
async def test_a_block_has_failed_when_nobody_writes_its_other_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(1, 30, monkeypatch)
    ends: list[tuple[int, int]] = []
    bed.job.on_block = lambda index, outcome: ends.append((index, outcome))
    bed.spread.send(range(1))
    first, second, third = bed.next(), bed.next(), bed.next()
    assert [one.layers for one in (first, second, third)] == [range(2), range(2, 4), range(4, 6)]
    bed.fail(first, MISS)
    bed.end(first)
    assert not ends
    assert bed.all() == []
    bed.fail(third, MISS)
    assert not ends
    bed.job.piece_arrived(0, 1)  # what was on its way comes
    assert not ends
    bed.end(second)
    assert ends == [(0, MISS)]
    bed.end(third)
    assert ends == [(0, MISS)]


@pytest.mark.asyncio
async def test_all_layers_go_the_other_way_once_one_of_them_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(2, 60, monkeypatch)
    bed.spread.send(range(2))
    first, second = bed.next(), bed.next()
    assert [(one.indices, one.layers) for one in (first, second)] == [
        ([0, 1], range(2)),
        ([0], range(2, 4)),
    ]
    bed.fail(first, UNAVAILABLE)
    bed.fail(second, UNAVAILABLE)
    assert bed.all(0) == []
    made = bed.all("relay")
    asked = sorted(
        (index, layer) for indices, layers in made for index in indices for layer in layers
    )
    assert asked == [(index, layer) for index in range(2) for layer in LAYERS]
    assert made[0][1].start == 0
    assert not bed.job.ended


@pytest.mark.asyncio
async def test_what_was_taken_over_goes_by_who_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(2, 60, monkeypatch)
    bed.spread.send(range(2), "relay")
    assert bed.next("relay").indices == [0, 1]
    bed.spread._steal(bed.spread._lane(0), bed.spread._lane("relay"))
    assert {index for indices, _ in bed.all(0) for index in indices} == {1}
    assert {index for indices, _ in bed.all("relay") for index in indices} == {0}


@pytest.mark.asyncio
async def test_what_was_taken_over_does_not_come_back_when_the_rest_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(2, 60, monkeypatch)
    bed.spread.send(range(2), "relay")
    first = bed.next("relay")
    assert first.indices == [0, 1]
    bed.spread._steal(bed.spread._lane(0), bed.spread._lane("relay"))
    moved = [part[0] for part in bed.spread._lane(0).waiting]
    assert moved == [1]
    bed.fail(first, UNAVAILABLE)
    assert bed.all("relay") == []
    asked = sorted(
        (index, layer) for indices, layers in bed.all(0) for index in indices for layer in layers
    )
    assert asked == [(index, layer) for index in range(2) for layer in LAYERS]


class Chance:
    """What becomes of requests, by chance; and what must be true at each moment."""

    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self.draws = bed, random.Random(seed)
        self.under_way: list[tuple[Lane, Shipment]] = []
        self.ends: Counter[int] = Counter()
        self.arrived: Counter[tuple[int, int]] = Counter()
        bed.job.on_block = lambda index, outcome: self.ends.update((index,))

    def send(self) -> None:
        """A shipment more, of a lane where something waits."""
        spread = self.bed.spread
        spread._level()
        lanes = [lane for lane in spread._lanes.values() if lane.waiting]
        if lanes:
            lane = self.draws.choice(lanes)
            shipment = spread._next(lane)
            if shipment is not None:
                self.under_way.append((lane, shipment))
        self.check()

    def check(self) -> None:
        """No layer of a block is on its way twice, nor waits once it is here or on its way."""
        spread, job = self.bed.spread, self.bed.job
        coming: Counter[tuple[int, int]] = Counter()
        for _, shipment in self.under_way:
            for index in shipment.pending():
                first = job.first_missing(index, shipment.layers.start)
                coming.update((index, layer) for layer in range(first, shipment.layers.stop))
        for lane in spread._lanes.values():
            assert lane.waiting_bytes == sum(map(lane.part_bytes, lane.waiting))
            for index, first, last in lane.waiting:
                if job.outcomes[index] == PENDING and index not in spread._lost:
                    coming.update((index, layer) for layer in range(first, last))
        assert set(coming.values()) <= {1}
        for index in job.pending():
            missing = {layer for layer in LAYERS if not self.arrived[index, layer // GROUP]}
            named = {layer for number, layer in coming if number == index}
            assert named <= missing
            assert named == missing or index in spread._lost

    def happen(self) -> None:
        """Something becomes of a shipment: a group comes, a block fails, it is taken back, ends."""
        lane, shipment = one = self.draws.choice(self.under_way)
        transfer, pending = shipment._transfer, shipment.pending()
        what = self.draws.random()
        if not pending or what < 0.1:
            self.under_way.remove(one)
            transfer.fail_rest(UNAVAILABLE)
            self.bed.spread._all_landed(shipment)
            return
        index = self.draws.choice(pending)
        if what < 0.75:
            job = self.bed.job
            group = (job.first_missing(index, shipment.layers.start)) // GROUP
            assert job.outcomes[index] == PENDING, "nobody writes where a block has failed"
            self.arrived[index, group] += 1
            position = list(shipment.indices).index(index)
            transfer._group_done(position, group - shipment.layers.start // GROUP)
        elif what < 0.9:
            outcome = self.draws.choice([MISS, UNAVAILABLE, FetchOutcome.CORRUPT])
            transfer._fail(list(shipment.indices).index(index), outcome)
        else:
            self.under_way.remove(one)
            then = self.draws.choice([self.bed.spread._try_other, self.bed.spread._move])
            self.bed.spread._take_back(lane, shipment, then)
            self.bed.spread._all_landed(shipment)


@pytest.mark.asyncio
@pytest.mark.parametrize("copied", [False, True])
async def test_whatever_happens_each_block_ends_once(
    copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: Counter[int] = Counter()
    for seed in range(10):
        bed = Bed(12, 300, monkeypatch, owners=(0, 1))
        monkeypatch.setattr(AllWays, "copied", copied)
        bed.spread.send(range(5))
        bed.spread.send(range(5, 12), "relay")
        chance = Chance(bed, seed)
        while bed.job.pending():
            if chance.draws.random() < 0.4 or not chance.under_way:
                chance.send()
            else:
                chance.happen()
        assert chance.ends == dict.fromkeys(range(12), 1)
        assert set(chance.arrived.values()) <= {1}
        assert bed.job.handle.layers_ready == len(SIZES)
        outcomes.update(bed.job.outcomes)
    assert 0 < outcomes[HIT] < outcomes.total()


@pytest.mark.asyncio
async def test_misses_of_two_requests_in_turn_cost_few_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 100
    bed = Bed(count, 110 * count, monkeypatch, owners=(0, 1))
    bed.ways.relay = ""
    bed.spread.send(range(count))
    both = bed.next(), bed.next()
    for index in range(count):
        for one in both:
            if index in one.indices:
                one._on_failed(index, MISS)
    bed.all(0)
    assert 0 < len(bed.all(1)) < 20


@pytest.mark.asyncio
async def test_what_a_relay_gives_back_keeps_the_order_of_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(12, 110 * 12, monkeypatch)
    bed.spread.send(range(6))
    bed.spread.send(range(6, 12), "relay")
    bed.next(0)
    bed.fail(bed.next("relay"), UNAVAILABLE)
    starts = [layers.start for _, layers in bed.all(0)]
    assert len(starts) > 1
    assert starts == sorted(starts)


@pytest.mark.asyncio
async def test_block_that_is_nowhere_does_not_wait_for_a_silent_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed(1, 30, monkeypatch)
    bed.ways.relay = ""
    bed.spread.send(range(1))
    first, second = bed.next(), bed.next()
    lane0 = bed.spread._lane(0)
    monkeypatch.setattr(lane0.link, "silent_s", lambda now: 99.0, raising=False)
    monkeypatch.setattr(lane0.link, "fetched_at", 0.0, raising=False)
    bed.fail(first, MISS)
    bed.end(first)
    assert 0 in bed.spread._lost
    assert bed.spread._silent(lane0, second, second.moved_at + 50.0)
