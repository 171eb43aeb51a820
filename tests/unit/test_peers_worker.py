"""What a peer's process does when it is asked: every byte is compared, and time adds up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from peers.base import Peer, PeerFailed, PeerMissing, private_memory
from peers.work import Work
from peers.worker import Watch, Worker

WORK = Work(block_bytes=64, batch=4, lanes=2, read_batches=6, write_batches=3)


class Shelf(Peer):
    """A store in a dict, which can be told to lie.

    Attributes:
        lies: Batches of which the first byte of the last block is not what was put.
        calls: What was done, in its order.
    """

    def __init__(self) -> None:
        super().__init__(WORK)
        self.lies: set[int] = set()
        self.calls: list[str] = []
        self.lacks = ""
        self._stored: dict[int, bytes] = {}

    async def open(self, folder: Path) -> None:
        self.memory = private_memory(self.work)
        self.versions = "a shelf"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        if batch not in self._stored:
            raise PeerFailed("not there")
        self.calls.append(f"get {batch}")
        into[:] = self._stored[batch]
        if batch in self.lies:
            into[3 * 64] ^= 255

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        assert batch not in self._stored, "a round forgets what the last one stored"
        self.calls.append(f"put {batch}")
        self._stored[batch] = bytes(source)

    async def forget(self, batches: Sequence[int]) -> None:
        self.calls.append(f"forget {list(batches)}")
        for batch in batches:
            del self._stored[batch]

    def settle(self) -> None:
        self.calls.append("settle")

    def missing(self) -> str:  # type: ignore[override]
        return self.lacks


async def opened() -> Worker:
    worker = Worker(Shelf(), Path())
    await worker.open()
    return worker


def shelf(worker: Worker) -> Shelf:
    assert isinstance(worker.peer, Shelf)
    return worker.peer


@pytest.mark.asyncio
async def test_all_is_stored_once_before_anything_is_measured() -> None:
    worker = Worker(Shelf(), Path())
    said = await worker.open()
    puts = [call for call in shelf(worker).calls if call.startswith("put")]
    assert sorted(puts) == [f"put {n}" for n in range(9)]
    assert said["versions"] == "a shelf"


@pytest.mark.asyncio
async def test_what_is_not_installed_is_said() -> None:
    worker = Worker(Shelf(), Path())
    shelf(worker).lacks = "a hammer"
    with pytest.raises(PeerMissing, match="a hammer"):
        await worker.open()


@pytest.mark.asyncio
async def test_everything_is_read_back_and_compared() -> None:
    worker = await opened()
    assert await worker.check() == {"checked": 36, "wrong": 0}
    shelf(worker).lies = {2, 7}  # one that is read and one that is written
    assert await worker.check() == {"checked": 36, "wrong": 2}


@pytest.mark.asyncio
async def test_memory_is_blanked_before_it_is_compared() -> None:
    worker = await opened()
    await worker.check()
    last = WORK.batches - 1
    # The right bytes lie there already; who reads nothing must not be taken to be right.
    shelf(worker).get = lambda lane, batch, into: None  # type: ignore[method-assign]
    assert worker.peer.memory.wrong(worker.peer.memory.lane(0), last) == 0
    assert (await worker.check())["wrong"] == 36


@pytest.mark.asyncio
@pytest.mark.parametrize("depth", [1, 2])
async def test_what_timed_reads_left_in_memory_is_compared(depth: int) -> None:
    worker = await opened()
    said = await worker.get(depth=depth, seconds=0.001, ramp_s=0.0)
    assert said["wrong"] == 0
    assert said["checked"] == 4 * depth
    shelf(worker).lies = set(range(6))
    said = await worker.get(depth=depth, seconds=0.001, ramp_s=0.0)
    assert said["wrong"] == depth


@pytest.mark.asyncio
async def test_reads_go_through_all_batches_in_the_order_of_the_work() -> None:
    worker = await opened()
    shelf(worker).calls.clear()
    said = await worker.get(depth=1, seconds=0.002, ramp_s=0.0)
    asked = [int(call.split()[1]) for call in shelf(worker).calls]
    wanted = WORK.order() * (len(asked) // 6 + 1)
    assert asked == wanted[: len(asked)]
    # A ramp of no time is one batch, as is the shortest part that counts.
    assert said["bytes"] == (len(asked) - 1) * WORK.batch_bytes
    assert len(asked) >= 2
    assert said["seconds"] > 0
    assert said["batch_ms"]["p50"] <= said["batch_ms"]["p99"]


@pytest.mark.asyncio
async def test_a_round_of_writes_stores_all_of_it_and_waits_until_it_is_there() -> None:
    worker = await opened()
    shelf(worker).calls.clear()
    said = await worker.put(depth=1, seconds=0.0)
    assert shelf(worker).calls == ["forget [6, 7, 8]", "put 6", "put 7", "put 8", "settle"]
    assert said["bytes"] == 3 * WORK.batch_bytes


@pytest.mark.asyncio
async def test_a_failure_of_one_lane_is_the_failure_of_all() -> None:
    worker = await opened()
    await shelf(worker).forget([0])
    with pytest.raises(PeerFailed, match="not there"):
        await worker.get(depth=2, seconds=60.0, ramp_s=60.0)


def test_a_watch_adds_what_was_between_begin_and_end() -> None:
    watch = Watch(Shelf())
    watch.begin()
    watch.end()
    first = watch.seconds
    assert first > 0
    watch.begin()
    watch.end()
    assert watch.seconds > first
    assert watch.server_s == 0
