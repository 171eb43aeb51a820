"""One side of one session: a queue pair on each rail, and what travels on them.

::

    passive (client)                                active (server)
    addresses() ──────────── RAILS ───────────────▶ connect(peer)
    connect(peer) ◀───────── RAILS, its reply ───── addresses()
    on_run(run) ◀═══════════ WRITE WITH IMMEDIATE ═ fetch_sink(...)
    registered memory ══════ READ ════════════════▶ put_puller(...)

The active side does all the work; the passive one takes news, and learns of nothing else: that
the peer is gone, or has given a queue pair up, comes by the control connection.

Queue pair i of the one side talks to queue pair i of the other. One that has failed is closed,
and what it carried is lost; the others go on. It does not come back: a new end has new ones.

The passive side connects last. Where it can connect some of its queue pairs and not all, the
other side does not know and would use them all: so that end is none, and the next one to this
peer is made without those rails.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvstore.errors import LocalProtocolError, TransportError
from kvstore.layout import PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.memorymessages import RailAddress, Rails
from kvstore.transport.rdma_fetch import RdmaSink
from kvstore.transport.rdma_memory import Registrations
from kvstore.transport.rdma_put import RdmaPuller
from kvstore.transport.rdma_queue import RECEIVES_MAX, Job, Payload, RdmaQueue, status_words
from kvstore.transport.verbs import Completion, QueueAddress, VerbsClosed, VerbsError, Work

if TYPE_CHECKING:
    from kvstore.transport.rdma import RdmaNode

_RUN_MAX = 0xFFFFFFFF
_MTU_BYTES_MAX = 4096
# Queue pairs that were not connected by then are not tried: an address that nobody answers for
# takes a second of the loop, and the peer says how many there are.
CONNECT_S = 1.5


class RailsUnreached(TransportError):
    """Some rails could not be connected, and others could: a new end is made of those."""


class RdmaEnd:
    """See the module; made by `RdmaNode.end`. Everything on the loop's thread.

    Attributes:
        peer: Who is at the other side, for people.
        active: Which side it is.
        queues: Those that work.
        memory: All that is registered here.
        failed: Why nothing can be carried any more; None while something can.
        left_out: Why rails that the peer has could not be connected.
        stuck: Whether a queue pair could neither be flushed nor closed: even after `close` nobody
            can say what its device does with the memory.
        on_run: Passive side: called with the number of each run that has come.
        on_failed: Called in a later turn of the loop with the error of each queue pair that
            fails, once for each.
    """

    def __init__(
        self,
        node: RdmaNode,
        peer: str,
        active: bool,
        place_count: int,
        memory: Registrations,
    ) -> None:
        self.peer = peer
        self.active = active
        self.queues: list[RdmaQueue] = []
        self.memory = memory
        self.failed: TransportError | None = None
        self.closed = False
        self.stuck = False
        self.left_out: list[str] = []
        self.on_run: Callable[[int], None] = _ignore_run
        self.on_failed: Callable[[Exception], None] = _ignore_error
        self._node = node
        self._place_count = place_count
        self._connected = False
        self._run = 0
        # Payloads that wait for room, in order; and those with a job done in this batch.
        self._waiting: dict[Payload, None] = {}
        self._moved: dict[Payload, None] = {}
        self._payloads: weakref.WeakSet[Payload] = weakref.WeakSet()

    # --- set-up ----------------------------------------------------------------------------

    def addresses(self) -> Rails:
        """Where our queue pairs are: one place a rail; after `connect` one a place of the peer.

        Raises:
            VerbsClosed: It is closed.
            TransportError: All queue pairs have failed.
        """
        self._check()
        rails = [RailAddress()] * self._place_count
        mtu_bytes_max = self._node.options.mtu_bytes or _MTU_BYTES_MAX
        for queue in self.queues:
            number, psn, gid, lid, mtu_bytes = queue.pair.address()
            if queue.place < len(rails):
                rails[queue.place] = RailAddress(
                    number=number,
                    psn=psn,
                    gid=gid,
                    lid=lid,
                    mtu_bytes=min(mtu_bytes, mtu_bytes_max),
                )
        return Rails(rails=tuple(rails), receives=RECEIVES_MAX)

    def connect(self, peer: Rails) -> None:
        """Connect each queue pair to that of the peer in the same place.

        Raises:
            VerbsClosed: It is closed.
            LocalProtocolError: It is connected.
            TransportError: None could be connected; says why. All are closed then.
            RailsUnreached: Passive side: some could not, and so all are closed; see the module.
        """
        self._check()
        if self._connected:
            raise LocalProtocolError(f"rdma to {self.peer}: connected twice")
        self._connected = True
        self._place_count = len(peer.rails)
        reasons: list[str] = []
        unreached: list[int] = []
        untried: list[int] = []
        clock = self._node.loop.time
        late = clock() + CONNECT_S
        for queue in list(self.queues):
            at = peer.rails[queue.place] if queue.place < len(peer.rails) else RailAddress()
            if not at.number:
                self._drop(queue)
                reasons.append(f"{queue.name}: the peer has no queue pair")
                continue
            queue.jobs_max = min(queue.jobs_max, peer.receives)
            if clock() >= late:
                self._drop(queue)
                self.left_out.append(f"{queue.name}: the others have taken {CONNECT_S:g} s")
                untried.append(queue.place)
                continue
            try:
                self._node.connect(
                    queue, QueueAddress(at.number, at.psn, at.gid, at.lid, at.mtu_bytes)
                )
            except VerbsError as error:
                self._drop(queue)
                self.left_out.append(f"{queue.name}: {error}")
                unreached.append(queue.place)
        reasons += self.left_out
        if not self.queues:
            self._node.take_in(self.peer)
            self.failed = TransportError(
                f"rdma to {self.peer}: no rail could be connected: {'; '.join(reasons)}"
            )
            raise self.failed
        if self.left_out and not self.active:
            # The next end tries those that there was no time for, if it would come any further.
            self._node.leave_out(self.peer, unreached or untried)
            for queue in self.queues:
                self._drop(queue)
            self.failed = RailsUnreached(
                f"rdma to {self.peer}: a rail could not be connected, and is left out for now:"
                f" {'; '.join(self.left_out)}"
            )
            raise self.failed

    # --- what travels ------------------------------------------------------------------------

    def fetch_sink(self, memory_map: MemoryMap, pieces: PieceMap) -> RdmaSink:
        """What brings a fetch into its asker's memory.

        Raises:
            LimitExceeded: A region of it has no key for one of the rails.
            TransportError: No queue pair is left; or the end is closed.
        """
        self._check_active()
        sink = RdmaSink(self, memory_map, pieces)
        self._payloads.add(sink)
        return sink

    def put_puller(self, memory_map: MemoryMap, pieces: PieceMap) -> RdmaPuller:
        """What takes the blocks of a put out of its asker's memory; raises as `fetch_sink`.

        Args:
            pieces: Whole blocks: order=block, all layers.
        """
        self._check_active()
        puller = RdmaPuller(self, memory_map, pieces)
        self._payloads.add(puller)
        return puller

    def close(self) -> None:
        """Close all queue pairs: when it returns, nothing is touched on behalf of this session,
        what was under way is lost, and its memory was released. Who had something under way,
        or waited for room, is called back (`on_ready`) before it returns.

        Harmless when called again.
        """
        if self.closed:
            return
        self.closed = True
        if self.failed is None:
            self.failed = TransportError(f"rdma to {self.peer}: closed")
        told = {*self._waiting, *(one for one in self._payloads if not one.idle)}
        self._waiting.clear()
        self._moved.clear()
        jobs = [job for queue in self.queues for job in self._drop(queue)]
        self._node.forget(self)
        for payload in self._payloads:
            if payload.failure is None:
                payload.failure = self.failed
        for job in jobs:
            self._call(job.owner.lost, job)
        for payload in told:
            self._call(payload.on_ready)

    # --- what payloads call ------------------------------------------------------------------

    def roomy(self, for_reads: bool = False) -> RdmaQueue | None:
        """The queue pair with room that has the fewest bytes under way; None if none has."""
        best = None
        for queue in self.queues:
            room = queue.has_room_for_reads if for_reads else queue.has_room
            if room and (best is None or queue.bytes_out < best.bytes_out):
                best = queue
        return best

    def least_loaded(self) -> RdmaQueue | None:
        """The queue pair with the fewest bytes under way; None if all have failed."""
        return min(self.queues, key=lambda queue: queue.bytes_out, default=None)

    def next_run(self) -> int:
        """A number for a run: none that is under way has it."""
        self._run = self._run + 1 if self._run < _RUN_MAX else 1
        return self._run

    def wait_for_room(self, payload: Payload) -> None:
        """Have it resumed when there may be room."""
        self._waiting[payload] = None

    def add(self, queue: RdmaQueue, job: Job, works: Sequence[Work]) -> None:
        """Post work; if that fails, the queue pair has failed, and the job is lost with it."""
        try:
            queue.add(job, works)
        except VerbsError as error:
            self.fail(queue, TransportError(f"rdma {queue.name}: {error}"))

    def fail_payload(self, payload: Payload, error: Exception) -> None:
        """Nothing more of it can be carried; it is told in a later turn of the loop."""
        if payload.failure is None:
            payload.failure = error
        self._node.loop.call_soon(_tell, payload)

    # --- what the node calls -----------------------------------------------------------------

    def on_completion(self, queue: RdmaQueue, completion: Completion) -> None:
        """Something has completed on one of the queue pairs."""
        if completion.status:
            reason = status_words(completion.status)
            self.fail(queue, TransportError(f"rdma {queue.name}: {reason}"))
            return
        if not completion.received:
            self._complete(queue.retire(completion.id))
        try:
            if completion.received:
                queue.received()
            elif not queue.closed:  # by who was just told
                queue.post_waiting()
        except VerbsError as error:
            self.fail(queue, TransportError(f"rdma {queue.name}: {error}"))
        if completion.received:
            self.on_run(completion.immediate)

    def settle(self) -> None:
        """A batch of completions was looked at: call back who waits for what it has changed."""
        moved, self._moved = self._moved, {}
        calls: list[Callable[[], None]] = []
        if self._waiting and (self.roomy() or self.roomy(for_reads=True)):
            waiting, self._waiting = self._waiting, {}
            calls += [payload.resume for payload in waiting]
        calls += [partial(_tell_idle, payload) for payload in moved]
        for call in calls:
            self._call(call)

    def fail(self, queue: RdmaQueue, error: TransportError) -> None:
        """Give a queue pair up. What it carried is lost, and its memory is released. Of what has
        come on the passive side the news are taken before: the peer counts it as moved."""
        if queue.ending:
            return
        if not self.active:
            queue.stop()
            self._node.take_news(queue)
            if queue.closed:  # by who took them
                return
        jobs = self._drop(queue)
        loop = self._node.loop
        told = dict.fromkeys(job.owner for job in jobs)
        if not self.queues:
            self.failed = error
            told.update(dict.fromkeys(self._payloads))
            self._waiting.clear()
        for payload in told:
            if payload.failure is None:
                payload.failure = error
            loop.call_soon(_tell, payload)
        loop.call_soon(self._tell_failed, error)
        for job in jobs:
            self._call(job.owner.lost, job)

    # --- inside ----------------------------------------------------------------------------

    def _complete(self, jobs: Sequence[Job]) -> None:
        moved = self._moved
        for job in jobs:
            moved[job.owner] = None
            self._call(job.owner.completed, job)

    def _call(self, call: Callable[..., None], *arguments: object) -> None:
        """One request's mistake is not to cost the others of its session their memory."""
        try:
            call(*arguments)
        except Exception as error:
            self._node.report(self, error)

    def _drop(self, queue: RdmaQueue) -> list[Job]:
        self.queues = [one for one in self.queues if one is not queue]
        self._node.drop(queue)
        jobs = queue.close()
        self.stuck = self.stuck or queue.stuck
        return jobs

    def _tell_failed(self, error: Exception) -> None:
        if not self.closed:
            self.on_failed(error)

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed(f"rdma to {self.peer}: closed")
        if self.failed is not None:
            raise TransportError(str(self.failed)) from self.failed

    def _check_active(self) -> None:
        self._check()
        if not self.active or not self._connected:
            state = "passive side" if not self.active else "not connected"
            raise LocalProtocolError(f"rdma to {self.peer}: no payload is moved from here: {state}")


def _tell(payload: Payload) -> None:
    payload.on_ready()


def _tell_idle(payload: Payload) -> None:
    if payload.idle:
        payload.on_ready()


def _ignore_run(run: int) -> None:
    pass


def _ignore_error(error: Exception) -> None:
    pass


__all__ = ["RailsUnreached", "RdmaEnd"]
