"""A queue pair's accounts: what is posted at once, what waits, what is done and what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.rdma_queue import (
    FLIGHT_BYTES_MAX,
    RECEIVES_BATCH,
    STATUS_WORDS,
    Job,
    Payload,
    RdmaQueue,
    status_words,
)
from kvstore.transport.verbs import (
    Opcode,
    QueueAddress,
    QueuePair,
    QueueSetup,
    QueueTuning,
    Rail,
    VerbsError,
    Work,
)

SETUP = QueueSetup(sends_max=4, receives_max=64, pieces_max=2)


class Recorder(QueuePair):
    """Keeps what is posted; each batch as (id, signalled)."""

    number = 7
    closed = False

    def __init__(self) -> None:
        self.posted: list[list[tuple[int, bool]]] = []
        self.receives: list[int] = []
        self.calls: list[str] = []
        self.refuses: set[str] = set()

    def address(self) -> QueueAddress:
        raise NotImplementedError

    def connect(self, peer: QueueAddress, tuning: QueueTuning) -> None:
        raise NotImplementedError

    def post(self, works: Sequence[Work]) -> None:
        self.posted.append([(work.id, work.signalled) for work in works])
        self._call("post")

    def post_receives(self, count: int) -> None:
        self.receives.append(count)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.refuses:
            raise VerbsError(f"{name}: refused")


class Clock:
    """Time, in the test's hands."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pair() -> Recorder:
    """A queue pair."""
    return Recorder()


@pytest.fixture
def clock() -> Clock:
    """A clock."""
    return Clock()


@pytest.fixture
def queue(pair: Recorder, clock: Clock) -> RdmaQueue:
    """Its accounts."""
    rail = SimpleNamespace(name="fake0:1", message_bytes_max=1 << 40, reads_max=3)
    end = SimpleNamespace(peer="client")
    return RdmaQueue(cast("RdmaEnd", end), pair, SETUP, cast("Rail", rail), 0, clock)


def add(queue: RdmaQueue, count: int, length: int = 10, reads: int = 0) -> Job:
    """A job of so many requests."""
    job = Job(cast("Payload", None), 0, length, reads, lambda: None)
    first = queue.next_id
    works = [
        Work(number, Opcode.WRITE, (), 0, 0, 0, number == first + count - 1)
        for number in range(first, first + count)
    ]
    queue.add(job, works)
    return job


def test_what_fits_is_posted_at_once_and_done_in_order(queue: RdmaQueue, pair: Recorder) -> None:
    first, second = add(queue, 1), add(queue, 3)
    assert pair.posted == [[(0, True)], [(1, False), (2, False), (3, True)]]
    assert queue.bytes_out == 20
    assert not queue.has_room
    assert queue.retire(0) == [first]
    assert queue.has_room
    assert queue.outstanding
    assert queue.retire(3) == [second]
    assert not queue.outstanding
    assert queue.bytes_out == 0


def test_one_completion_tells_of_all_before_it(queue: RdmaQueue) -> None:
    jobs = [add(queue, 1) for _ in range(3)]
    assert queue.retire(1) == jobs[:2]
    assert queue.retire(2) == jobs[2:]


def test_job_larger_than_the_room_is_posted_in_parts(queue: RdmaQueue, pair: Recorder) -> None:
    small, large = add(queue, 2), add(queue, 9)
    assert not queue.has_room
    assert pair.posted == [[(0, False), (1, True)], [(2, False), (3, True)]]
    later = add(queue, 1)  # comes after it, though it was asked for without room
    assert queue.retire(1) == [small]
    queue.post_waiting()
    assert pair.posted[2:] == [[(4, False), (5, True)]]
    assert queue.retire(3) == []
    queue.post_waiting()
    queue.post_waiting()
    assert pair.posted[3:] == [[(6, False), (7, True)]]
    assert queue.retire(7) == []
    queue.post_waiting()
    assert pair.posted[4:] == [[(8, False), (9, False), (10, True), (11, True)]]
    assert queue.retire(10) == [large]
    assert queue.retire(11) == [later]
    assert queue.has_room


def test_room_has_limits(queue: RdmaQueue) -> None:
    add(queue, 1, length=FLIGHT_BYTES_MAX - 1)
    assert queue.has_room
    add(queue, 1, length=1)
    assert not queue.has_room
    assert queue.has_room_for_reads  # the other way
    queue.retire(1)
    add(queue, 1, length=FLIGHT_BYTES_MAX - 1, reads=2)
    assert queue.has_room_for_reads
    assert queue.reads_out == 2
    add(queue, 1, length=1, reads=1)
    assert not queue.has_room_for_reads
    assert queue.has_room
    assert queue.bytes_out == queue.read_bytes_out == FLIGHT_BYTES_MAX
    queue.retire(3)
    assert queue.bytes_out == queue.read_bytes_out == queue.reads_out == 0
    add(queue, 1, reads=queue.reads_max)
    assert not queue.has_room_for_reads
    queue.retire(4)
    queue.jobs_max = 1
    assert queue.has_room
    add(queue, 1)
    assert not queue.has_room
    assert queue.reads_max == 6
    assert queue.work_bytes_max == 1 << 30


def test_progress_is_what_completes_and_not_what_is_added(queue: RdmaQueue, clock: Clock) -> None:
    add(queue, 1)
    assert queue.progress_at == 100.0
    clock.now = 101.0
    add(queue, 1)
    assert queue.progress_at == 100.0
    clock.now = 102.0
    queue.retire(0)
    assert queue.progress_at == 102.0


def test_receives_are_posted_again_many_at_a_time(queue: RdmaQueue, pair: Recorder) -> None:
    for _ in range(2 * RECEIVES_BATCH + 1):
        queue.received()
    assert pair.receives == [RECEIVES_BATCH] * 2


@pytest.mark.parametrize(
    ("refuses", "released"),
    [(set(), 2), ({"flush"}, 2), ({"close"}, 2), ({"flush", "close"}, 0)],
)
def test_close_flushes_and_gives_back_what_is_lost(
    queue: RdmaQueue, pair: Recorder, refuses: set[str], released: int
) -> None:
    count = []
    jobs = [add(queue, 3), add(queue, 3)]
    for job in jobs:
        job.release = lambda: count.append(1)
    pair.refuses = refuses
    assert queue.close() == jobs
    assert pair.calls[-2:] == ["flush", "close"]
    assert queue.closed
    assert not queue.outstanding
    queue.post_waiting()
    assert len(pair.posted) == 2
    for job in jobs:
        job.release()
    # Memory that may still be read or written is given to nobody.
    assert len(count) == released


def test_job_that_cannot_be_posted_is_lost_with_the_others(
    queue: RdmaQueue, pair: Recorder
) -> None:
    first = add(queue, 1)
    pair.refuses = {"post"}
    with pytest.raises(VerbsError, match="post: refused"):
        add(queue, 1)
    lost = queue.close()
    assert lost[0] is first
    assert len(lost) == 2


def test_statuses_are_words() -> None:
    assert status_words(12) == "the peer does not answer (status 12)"
    assert status_words(99) == "unknown failure (status 99)"
    assert 0 not in STATUS_WORDS
