"""One queue pair with its accounts: what is posted, what waits, and whose it is.

::

    add ──▶ waiting ──post──▶ outstanding ──completion of the last request──▶ Payload.completed
                                   └──────────failure: flushed, closed──────▶ Payload.lost

Requests complete in the order in which they were posted, and only some of them say so: a
completion with id n tells that all up to n are done. Ids count the requests of a queue pair.
"""

from __future__ import annotations

import abc
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.errors import TransportError
from kvstore.transport.verbs import QueuePair, QueueSetup, Rail, VerbsError, Work

if TYPE_CHECKING:
    from kvstore.transport.rdma_end import RdmaEnd

_log = logging.getLogger(__name__)

# Work requests on one queue pair: at 16 KiB each, which is a small layer, 8 MiB under way.
SENDS_MAX = 512
# Pieces that one request gathers: more make every entry of the send queue longer, and blocks
# that lie side by side are one piece anyway.
PIECES_MAX = 16
# News that a peer takes before it must be read: at 16 MiB a run, 4 GiB.
RECEIVES_MAX = 256
# Receives are posted again when so many are used up: one call into the device for all.
RECEIVES_BATCH = 32
# Bytes under way on one queue pair, from the first chunk beyond it on no more: at 400 Gbit/s
# 1.3 ms, in which an event loop comes round; and a CANCEL waits no longer. Each way, for fetches
# and puts do not share a direction of the link: or those of one kind could take all the room.
FLIGHT_BYTES_MAX = 64 * 1024 * 1024
# A scatter entry has 32 bits for its length, and devices of 1 GiB at least for a request.
WORK_BYTES_MAX = 1 << 30

#: `ibv_wc_status` of infiniband/verbs.h, in words.
STATUS_WORDS = {
    1: "a message is longer than what it meets",
    2: "the request cannot be executed",
    4: "local memory is not registered for it",
    5: "flushed after an earlier failure",
    7: "an answer that was not expected",
    8: "local memory was not to be written",
    9: "the peer refuses the request",
    10: "the peer's memory may not be reached: wrong key, out of range or not registered any more",
    11: "the peer could not do it",
    12: "the peer does not answer",
    13: "the peer takes no news",
    19: "the device has failed",
    20: "no answer within the time",
    21: "the device tells no more than that it failed",
}


def status_words(status: int) -> str:
    """How a completion ended, for people."""
    return f"{STATUS_WORDS.get(status, 'unknown failure')} (status {status})"


class Payload(abc.ABC):
    """Who has work on queue pairs: a fetch, or a put.

    It is called back by its end only. Within its own calls of `add` that is `lost` at most, where
    the queue pair fails there; the other calls come in a later turn of the loop then.
    """

    failure: Exception | None
    on_ready: Callable[[], None]

    @property
    @abc.abstractmethod
    def idle(self) -> bool:
        """Whether nothing of it is under way."""

    @abc.abstractmethod
    def completed(self, job: Job) -> None:
        """All requests of a job are done."""

    @abc.abstractmethod
    def lost(self, job: Job) -> None:
        """A job is not, and nothing touches its memory any more, unless it is `kept`."""

    @abc.abstractmethod
    def resume(self) -> None:
        """There is room again, for which it waited."""


class Job:
    """Requests that are one thing to their owner: a run of a fetch, or a block of a put.

    Attributes:
        key: The owner's number for it.
        length: Bytes.
        reads: How many READs the requests are; 0 if they are WRITEs.
        kept: Whether its local memory is to be used never again, for nobody can say whether the
            device is done with it.
        release: Called when nothing uses the local memory any more.
        last_id: Of the last request.
        place: Of the rail that it was given to; -1 before.
    """

    __slots__ = ("kept", "key", "last_id", "length", "owner", "place", "reads", "release")

    def __init__(
        self, owner: Payload, key: int, length: int, reads: int, release: Callable[[], None]
    ) -> None:
        self.owner = owner
        self.key = key
        self.length = length
        self.reads = reads
        self.release = release
        self.last_id = -1
        self.place = -1
        self.kept = False


class RdmaQueue:
    """See the module. Everything on the loop's thread.

    Args:
        pair: Owned from now on.
        place: Of the rail, in all tuples that have one entry a rail.
        clock: For `progress_at`.

    Attributes:
        end: Whose it is.
        ending: Whether it is given up: nothing new is posted.
        stuck: It could neither be flushed nor closed: nobody can say what its device still does.
        name: Rail and peer, for people.
        bytes_out, reads_out: Of all jobs that were added and are not done.
        read_bytes_out: Those of `bytes_out` that are read.
        progress_at: When something completed last, or there was nothing outstanding.
        next_id: Of the first request of the next job.
        jobs_max: Jobs under way at most: not more news than the peer has receives for.
    """

    __slots__ = (
        "_clock", "_jobs", "_posted", "_retired", "_used", "_waiting", "bytes_out", "closed",
        "end", "ending", "jobs_max", "name", "next_id", "pair", "pieces_max", "place",
        "progress_at", "read_bytes_out", "reads_max", "reads_out", "sends_max", "stuck",
        "work_bytes_max",
    )  # fmt: skip

    def __init__(
        self,
        end: RdmaEnd,
        pair: QueuePair,
        setup: QueueSetup,
        rail: Rail,
        place: int,
        clock: Callable[[], float],
    ) -> None:
        self.end = end
        self.pair = pair
        self.place = place
        self.name = f"{rail.name} to {end.peer}"
        self.closed = False
        self.ending = False
        self.stuck = False
        self.sends_max = setup.sends_max
        self.pieces_max = setup.pieces_max
        self.work_bytes_max = min(rail.message_bytes_max, WORK_BYTES_MAX)
        # Twice as many as are under way at once: the next ones are there when one ends.
        self.reads_max = 2 * rail.reads_max
        self.jobs_max = RECEIVES_MAX
        self.bytes_out = self.read_bytes_out = 0
        self.reads_out = 0
        self.next_id = 0
        self.progress_at = 0.0
        self._clock = clock
        self._jobs: deque[Job] = deque()
        self._waiting: deque[Work] = deque()
        self._posted = 0
        self._retired = 0
        self._used = 0  # receives that were not posted again

    @property
    def has_room(self) -> bool:
        """Whether a job that writes may be added: it need not fit."""
        return self.bytes_out - self.read_bytes_out < FLIGHT_BYTES_MAX and self._takes

    @property
    def has_room_for_reads(self) -> bool:
        """Whether a job that reads may be added: it need not fit."""
        return (
            self.read_bytes_out < FLIGHT_BYTES_MAX
            and self.reads_out < self.reads_max
            and self._takes
        )

    @property
    def _takes(self) -> bool:
        return (
            not self._waiting
            and self._posted - self._retired < self.sends_max
            and len(self._jobs) < self.jobs_max
        )

    @property
    def outstanding(self) -> bool:
        """Whether something is to complete."""
        return bool(self._jobs)

    def add(self, job: Job, works: Sequence[Work]) -> None:
        """Post the requests of a job, the last of which is signalled; what there is no room
        for follows when there is.

        Raises:
            VerbsError: The queue pair is of no use any more; the job is lost with the others.
        """
        if not self._jobs:
            self.progress_at = self._clock()
        count = len(works)
        self.next_id += count
        job.last_id = self.next_id - 1
        job.place = self.place
        self._jobs.append(job)
        self._count(job, 1)
        if not self._waiting and self._posted - self._retired + count <= self.sends_max:
            self._posted += count
            self.pair.post(works)
        else:
            self._waiting.extend(works)
            self._post_waiting()

    def retire(self, last_id: int) -> list[Job]:
        """All requests up to one are done: the jobs that are done with it."""
        self._retired = last_id + 1
        self.progress_at = self._clock()
        done = []
        jobs = self._jobs
        while jobs and jobs[0].last_id <= last_id:
            job = jobs.popleft()
            self._count(job, -1)
            done.append(job)
        return done

    def post_waiting(self) -> None:
        """Post what waits, as far as there is room.

        Raises:
            VerbsError: As of `add`.
        """
        if self._waiting:
            self._post_waiting()

    def received(self) -> None:
        """The peer's news has used up a receive.

        Raises:
            VerbsError: No more could be posted.
        """
        self.progress_at = self._clock()
        self._used += 1
        if self._used >= RECEIVES_BATCH and not self.ending:
            used, self._used = self._used, 0
            self.pair.post_receives(used)

    def stop(self) -> bool:
        """Take nothing of the peer any more; what has come is there to be polled. Whether it could
        be done: it cannot with a device that was removed, and before it is connected."""
        self.ending = True
        try:
            self.pair.flush()
        except VerbsError:
            return False
        return True

    def close(self) -> list[Job]:
        """Flush and close: when it returns, nothing is touched any more, unless it is `stuck`; the
        lost jobs."""
        self.closed = True
        self._waiting.clear()
        jobs, self._jobs = list(self._jobs), deque()
        self.bytes_out = self.read_bytes_out = self.reads_out = 0
        flushed = self.stop()
        try:
            self.pair.close()
        except TransportError as error:
            _log.error("rdma %s: closing the queue pair: %s", self.name, error)
            self.stuck = not flushed
        if self.stuck:
            for job in jobs:
                job.kept, job.release = True, _never
        return jobs

    def _count(self, job: Job, sign: int) -> None:
        self.bytes_out += sign * job.length
        if job.reads:
            self.reads_out += sign * job.reads
            self.read_bytes_out += sign * job.length

    def _post_waiting(self) -> None:
        waiting = self._waiting
        room = self.sends_max - (self._posted - self._retired)
        if room <= 0:
            return
        batch = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        if waiting and not batch[-1].signalled:
            # Nothing else would tell when there is room for the rest.
            batch[-1] = batch[-1]._replace(signalled=True)
        self._posted += len(batch)
        self.pair.post(batch)


def _never() -> None:
    pass


__all__ = ["RECEIVES_MAX", "SENDS_MAX", "Job", "Payload", "RdmaQueue", "status_words"]
