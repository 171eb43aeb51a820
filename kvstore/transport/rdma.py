"""RDMA: payload that devices bring from the memory of one process into that of another.

::

    process           RdmaNode: rails (ports of devices), and what is registered on them
      session           RdmaEnd: one queue pair a rail
        fetch             RdmaSink: WRITE into the asker's memory, and news of each run
        put               RdmaPuller: READ out of it

    asker (passive)                                      server (active)
    its own region, keys in FETCH and PUT ◀═══ one-sided ═══▶ arena; no key of it is ever given

Requests, checksums and outcomes travel on the control connection. Rule: whatever the device or
the peer does, memory is released only after the queue pair that touched it is done with it, or
closed; and every wait has an end, `RdmaOptions.stall_s`.

What is here is shell: it polls when the event loop says that there are completions, and blocks
never. Everything is on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from functools import partial

from kvstore.errors import Busy, LimitExceeded, TransportError, TransportTimeout
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.rdma_memory import (
    REGISTRATIONS_MAX,
    Registration,
    Registrations,
    close_regions,
)
from kvstore.transport.rdma_options import RdmaOptions, check_rdma_options
from kvstore.transport.rdma_queue import (
    PIECES_MAX,
    RECEIVES_MAX,
    SENDS_MAX,
    RdmaQueue,
)
from kvstore.transport.rdma_rails import AbsentRail, place_rails
from kvstore.transport.rdma_reach import UNREACHED_S, Unreached
from kvstore.transport.shm import address_of
from kvstore.transport.verbs import (
    MemoryRegion,
    NoDevice,
    QueueAddress,
    QueueSetup,
    Rail,
    Verbs,
    VerbsClosed,
    VerbsError,
)

_log = logging.getLogger(__name__)

# Completions taken in one turn of the loop. One tells of 16 MiB at most, or of the last bytes of
# a block that was read; who hears of them verifies them at once: 8 ms for 16 MiB each.
_POLL_COUNT = 8
# The watch looks so many times while a queue pair may stall.
_LOOKS_PER_STALL = 4
# Who connects for longer has waited for the address of a peer, in the kernel.
_CONNECT_SLOW_S = 0.1
# READs that a queue pair of ours serves or asks for at once; devices have 16 and more.
_READS_MAX = 16


class _OpenRail:
    """A rail and what hangs on it.

    Attributes:
        queues: By number.
        reserved: Completions that can be under way.
        broken: Why it is of no use for good; "" while it is.
        fd: What the loop watches; -1 if it does not.
        due: Whether more completions are taken in the next turn of the loop anyway.
    """

    def __init__(self, rail: Rail, broken: str = "") -> None:
        self.rail = rail
        self.queues: dict[int, RdmaQueue] = {}
        self.reserved = 0
        self.broken = broken
        self.fd = -1
        self.due = False

    def reason(self) -> str:
        """Why it cannot be used now; "" if it can."""
        return self.broken or self.rail.failed()


class RdmaNode:
    """The rails of this process.

    Args:
        loop: Everything happens on it.
        options: Checked here.
        local_address: See `place_rails`.

    Attributes:
        loop, options: As given.
        left_out: Why rails could not be opened; they keep their places.

    Raises:
        ConfigError: An option cannot be.
        NoDevice, VerbsMissing, VerbsForbidden, VerbsError: No rail could be opened; says why.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        verbs: Verbs,
        options: RdmaOptions | None = None,
        local_address: str | None = None,
    ) -> None:
        self.loop = loop
        self.options = check_rdma_options(options or RdmaOptions())
        self.closed = False
        self.left_out: list[VerbsError] = []
        self._memory = Registrations()
        self._unreached = Unreached()
        self._polling = False
        # Queue pairs that stood still when the watch looked last.
        self._suspects: set[RdmaQueue] = set()
        self._ends: dict[RdmaEnd, None] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._rails: list[_OpenRail] = []
        for place, setup in enumerate(place_rails(verbs.devices(), self.options, local_address)):
            try:
                if isinstance(setup, NoDevice):
                    raise setup
                self._rails.append(_OpenRail(verbs.open(setup)))
            except VerbsError as error:
                self.left_out.append(error)
                self._rails.append(_OpenRail(AbsentRail(f"rail {place}", error), str(error)))
        if len(self.left_out) == len(self._rails):
            kinds = {type(error) for error in self.left_out}
            kind = kinds.pop() if len(kinds) == 1 else NoDevice
            raise kind("; ".join(map(str, self.left_out)))
        for reason in self.left_out:
            _log.warning("rdma: a rail is left out: %s", reason)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for rail in self._rails:
                if not rail.broken:
                    rail.fd = rail.rail.fileno()
                    loop.add_reader(rail.fd, partial(self._readable, rail))
            undo.pop_all()

    @property
    def rail_names(self) -> list[str]:
        """Names of the rails that could be opened, in their order."""
        return [one.rail.name for one in self._rails if not isinstance(one.rail, AbsentRail)]

    def failures(self) -> dict[str, str]:
        """Rails that are of no use now, and why."""
        self._check()
        reasons = {rail.rail.name: rail.reason() for rail in self._rails}
        return {name: reason for name, reason in reasons.items() if reason}

    # --- memory ----------------------------------------------------------------------------

    def register(
        self, view: memoryview, *, remote_write: bool = False, remote_read: bool = False
    ) -> Registration:
        """Register memory on all rails. It is pinned, which keeps the loop, and all threads of
        Python, from everything else: about 0.1 s for a GiB that was touched before, on each rail,
        and half a second more for one that was not. Do it when a process starts.

        Ownership: the view is held, and the memory stays in use, until `Registration.close`.

        Args:
            remote_write, remote_read: What peers that know its keys may do.

        Raises:
            VerbsForbidden: The limit on locked memory is too low; says it.
            VerbsError: The memory cannot be reached by a device.
            LimitExceeded: Too many registrations.
        """
        self._check()
        if len(self._memory) >= REGISTRATIONS_MAX:
            raise LimitExceeded(f"more than {REGISTRATIONS_MAX} registrations of memory")
        address = address_of(view)
        regions: list[MemoryRegion | None] = []
        try:
            for rail in self._rails:
                regions.append(
                    self._register(rail, address, view.nbytes, remote_write, remote_read)
                )
            if not any(regions):
                raise VerbsError(
                    f"register {view.nbytes} bytes: no rail is left: {self.failures()}"
                )
        except BaseException:
            with contextlib.suppress(VerbsError):
                close_regions(regions)
            raise
        registration = Registration(view, address, regions, self._memory.remove)
        self._memory.add(registration)
        return registration

    def find(self, address: int, length: int) -> Registration | None:
        """The registration that a range of addresses lies in; None if it lies in none."""
        return self._memory.find(address, length)

    # --- sessions --------------------------------------------------------------------------

    def end(self, peer: str, *, active: bool) -> RdmaEnd:
        """One side of a new session, with a queue pair on each rail that works.

        Args:
            peer: Who is at the other side, for people.
            active: Whether this side moves the payload.

        Raises:
            Busy: A rail has no room for the completions of one more.
            TransportError: No rail works; says why.
        """
        self._check()
        setup = QueueSetup(SENDS_MAX, 1, 1) if active else QueueSetup(1, RECEIVES_MAX, 1)
        end = RdmaEnd(self, peer, active, len(self._rails), self._memory)
        self._ends[end] = None
        reasons = []
        now = self.loop.time()
        try:
            for place, rail in enumerate(self._rails):
                try:
                    reason = rail.reason()
                    if not (active or reason) and self._unreached.lately(place, peer, now):
                        reason = f"{rail.rail.name}: it did not reach {peer} lately"
                    if not reason:
                        self._add_queue(end, rail, place, setup)
                except VerbsError as error:
                    reason = str(error)
                if reason:
                    reasons.append(reason)
        except BaseException:
            end.close()
            raise
        if not end.queues:
            end.close()
            self.take_in(peer)
            raise TransportError(f"rdma to {peer}: no rail works: {'; '.join(reasons)}")
        self._start_watch()
        return end

    def close(self) -> None:
        """Close ends, registrations and rails, in this order. Harmless when called again."""
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        with contextlib.ExitStack() as ending:
            # The last one first; all of them, even if one fails.
            for rail in self._rails:
                ending.callback(rail.rail.close)
                ending.callback(self._unwatch, rail)
            for registration in self._memory.all:
                ending.callback(registration.close)
            for end in list(self._ends):
                ending.callback(end.close)

    # --- what ends call ----------------------------------------------------------------------

    def connect(self, queue: RdmaQueue, peer: QueueAddress) -> None:
        """Connect a queue pair; raises as `QueuePair.connect`.

        The kernel waits a second for an address that nobody answers for, and holds Python's lock
        meanwhile, so that no thread would help: such a one is not tried again soon.
        """
        place, began_at = queue.place, self.loop.time()
        if self._unreached.lately(place, peer.gid, began_at):
            raise VerbsError(
                f"nobody has answered for {peer.gid} within the last {UNREACHED_S:g} s"
            )
        rail = self._rails[place].rail
        mtu_bytes = min(peer.mtu_bytes, self.options.mtu_bytes or peer.mtu_bytes)
        tuning = self.options.tuning(min(rail.reads_max, _READS_MAX))
        try:
            queue.pair.connect(peer._replace(mtu_bytes=mtu_bytes), tuning)
        except VerbsError:
            now = self.loop.time()
            if now >= began_at + _CONNECT_SLOW_S:
                self._unreached.note(place, peer.gid, now)
            raise

    def leave_out(self, peer: str, places: Iterable[int]) -> None:
        """Make the next passive ends to a peer without these rails."""
        for place in places:
            self._unreached.note(place, peer, self.loop.time())

    def take_in(self, peer: str) -> None:
        """Make the next ends to a peer with all rails again."""
        self._unreached.forget(peer)

    def take_news(self, queue: RdmaQueue) -> None:
        """Take what has completed on a rail, before a queue pair there is closed."""
        rail = self._rails[queue.place]
        # As many as lie there at most, or others on this rail would keep us here. Within a batch
        # those of this queue pair that matter are behind us: what fails it comes last.
        for _ in range(rail.reserved // _POLL_COUNT + 1):
            if self._polling or not self._poll(rail):
                return
        self._go_on(rail)

    def drop(self, queue: RdmaQueue) -> None:
        """A queue pair is about to be closed: no completion of it is looked at any more."""
        rail = self._rails[queue.place]
        if rail.queues.pop(queue.pair.number, None) is not None:
            rail.reserved -= _reserve(queue.end.active)

    def forget(self, end: RdmaEnd) -> None:
        """An end is closed."""
        self._ends.pop(end, None)

    def report(self, end: RdmaEnd, error: Exception) -> None:
        """One session's mistake is not to cost others their completions."""
        self.loop.call_exception_handler(
            {"message": f"rdma to {end.peer}: a callback failed", "exception": error}
        )

    # --- inside ----------------------------------------------------------------------------

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed("the RDMA node is closed")

    def _register(
        self, rail: _OpenRail, address: int, length: int, write: bool, read: bool
    ) -> MemoryRegion | None:
        """A region, or None on a rail that is of no use."""
        if rail.broken:
            return None
        try:
            return rail.rail.register(address, length, remote_write=write, remote_read=read)
        except VerbsError:
            reason = rail.rail.failed()
            if not reason:
                raise
            # It has no key for this memory, so that it cannot come back either.
            self._break(rail, reason)
            return None

    def _add_queue(self, end: RdmaEnd, rail: _OpenRail, place: int, setup: QueueSetup) -> None:
        need = _reserve(end.active)
        if rail.reserved + need > rail.rail.completions_max:
            raise Busy(
                f"{rail.rail.name}: {rail.reserved} completions of other sessions and {need} of"
                f" this one, the limit is {rail.rail.completions_max}"
            )
        if end.active:
            setup = setup._replace(pieces_max=min(PIECES_MAX, rail.rail.pieces_max))
        pair = rail.rail.queue_pair(setup)
        queue = RdmaQueue(end, pair, setup, rail.rail, place, self.loop.time)
        rail.queues[pair.number] = queue
        rail.reserved += need
        end.queues.append(queue)
        if not end.active:
            try:
                pair.post_receives(RECEIVES_MAX)
            except VerbsError:
                end.queues.remove(queue)
                self.drop(queue)
                queue.close()
                raise

    def _readable(self, rail: _OpenRail) -> None:
        """Take completions; when there are more, others have their turn before."""
        # One batch in a turn: the descriptor may stay readable until all are taken.
        if not rail.due and self._poll(rail):
            self._go_on(rail)

    def _go_on(self, rail: _OpenRail) -> None:
        """There may be more completions, of which the descriptor does not tell again."""
        if not rail.due:
            rail.due = True
            self.loop.call_soon(self._take_more, rail)

    def _take_more(self, rail: _OpenRail) -> None:
        rail.due = False
        self._readable(rail)

    def _poll(self, rail: _OpenRail) -> bool:
        """Take completions; whether there may be more."""
        if rail.rail.closed or rail.broken:
            return False
        try:
            batch = rail.rail.poll(_POLL_COUNT)
        except VerbsError as error:
            self._break(rail, str(error))
            return False
        queues = rail.queues
        ends: dict[RdmaEnd, None] = {}
        self._polling = True
        for completion in batch:
            queue = queues.get(completion.queue)
            if queue is not None:
                end = queue.end
                ends[end] = None
                try:
                    end.on_completion(queue, completion)
                except Exception as error:
                    self.report(end, error)
        self._polling = False
        for end in ends:
            end.settle()
        return len(batch) == _POLL_COUNT

    def _break(self, rail: _OpenRail, reason: str) -> None:
        """A rail is of no use any more, for good."""
        rail.broken = reason
        self._unwatch(rail)
        self._fail_all(rail, reason)

    def _fail_all(self, rail: _OpenRail, reason: str) -> None:
        for queue in list(rail.queues.values()):
            queue.end.fail(queue, TransportError(f"rdma {queue.name}: {reason}"))

    def _unwatch(self, rail: _OpenRail) -> None:
        fd, rail.fd = rail.fd, -1
        if fd >= 0:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.remove_reader(fd)

    def _start_watch(self) -> None:
        if self._watch is None:
            self._watch = self.loop.call_later(self.options.stall_s / _LOOKS_PER_STALL, self._look)

    def _look(self) -> None:
        """Give up rails that have failed, and queue pairs on which nothing moves."""
        self._watch = None
        late = self.loop.time() - self.options.stall_s
        before, self._suspects = self._suspects, set()
        for rail in self._rails:
            reason = rail.reason()
            if reason:
                self._fail_all(rail, reason)
                continue
            stalled = [queue for queue in rail.queues.values() if _stalled(queue, late)]
            self._suspects.update(stalled)
            for queue in stalled:
                if queue in before:
                    text = f"nothing has completed for {self.options.stall_s:g} s"
                    queue.end.fail(queue, TransportTimeout(f"rdma {queue.name}: {text}"))
            if stalled:
                # Perhaps it was this loop that had no time: it has until the next look.
                self._readable(rail)
        if self._ends and not self.closed:
            self._start_watch()
        else:
            self._suspects.clear()


def _reserve(active: bool) -> int:
    """Completions that a queue pair may have under way."""
    return SENDS_MAX if active else RECEIVES_MAX


def _stalled(queue: RdmaQueue, late: float) -> bool:
    return queue.outstanding and queue.progress_at <= late


__all__ = ["RdmaNode", "RdmaOptions"]
