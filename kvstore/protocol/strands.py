"""Work on memory that is done beside the loop, in the order in which it was given.

::

    loop:    add ──▶ parts ──┐                   ┌──▶ finished(result)
    worker:                  └──▶ work() ──post──┘

Copying and hashing run at memory speed and let other threads run meanwhile: the loop goes on
to answer, and a core that is busy with bytes is not the one that has to know which come next.
Pure: a `Worker` has the threads (`kvstore.copier`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

ResultT = TypeVar("ResultT")
#: What is to be done, and who is told.
_Part: TypeAlias = tuple[Callable[[], Any], Callable[[Any], None]]

# Of one connection; the loop hears of each half of them, and the other half takes a worker 0.6 ms,
# in which the loop mostly comes round. More would only stand in the way of what is more urgent,
# and of other clients.
PARTS_MAX = 8


class Worker(Protocol):
    """Threads beside the loop."""

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on one of the threads, after those that came before. On the loop's thread."""

    def again(self, job: Callable[[], None]) -> None:
        """The same, from within a job."""

    def post(self, call: Callable[[], None], wake: bool = True) -> None:
        """Run a call on the loop's thread, in the order of posting. From any thread.

        Args:
            wake: Soon; else with the next one that is to run soon, which must follow.
        """


class Strands:
    """All work of one connection. On the loop's thread.

    Args:
        worker: Does it.

    Attributes:
        count: Parts that are not finished.
        on_ready: Called when parts are accepted again after they were not.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.count = 0
        self.on_ready: Callable[[], None] = _nothing
        self._added = 0
        self._begun = itertools.count(1)
        self._refused = False
        self._waiting: list[Callable[[], None]] = []

    @property
    def accepts(self) -> bool:
        """Whether a part may be added now. If not, `on_ready` will be called."""
        if self.count < PARTS_MAX:
            return True
        self._refused = True
        return False

    def begin(self) -> bool:
        """A part is begun, or dropped; whether the loop is to hear of it soon: it has been done
        with half of all that may be under way. From any thread."""
        return (self._added - next(self._begun)) % (PARTS_MAX // 2) == 0

    def added(self) -> None:
        """A part was added."""
        self.count += 1
        self._added += 1

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call when no memory is touched any more: now, or when the last part has ended."""
        if self.count:
            self._waiting.append(call)
        else:
            call()

    def ended(self) -> None:
        """A part has ended."""
        self.count -= 1
        if self._refused:
            self._refused = False
            self.on_ready()
        if not self.count:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                call()


class Dropped(Exception):
    """In place of a result: nobody had begun the work, and nobody wants it any more."""


class Strand:
    """Work of one request: one part after another.

    It keeps nothing of a part that has ended: whoever owns a strand is free when the last one
    has, and so is the memory that it works on.

    Args:
        strands: Of its connection.

    Attributes:
        count: Parts that are not finished. With none, nothing that they use is touched.
    """

    def __init__(self, strands: Strands) -> None:
        self.count = 0
        self._strands = strands
        self._parts: deque[_Part] = deque()
        self._running = False  # or about to

    def add(
        self, work: Callable[[], ResultT], finished: Callable[[ResultT | Exception], None]
    ) -> None:
        """Have a part done, after those that were added before.

        Args:
            work: Called on a thread of the worker. What it uses may be used by other parts, and
                by nobody else while parts are under way.
            finished: Called on the loop's thread, in the order of adding, with the result, with
                what was raised, or with `Dropped`.
        """
        self.count += 1
        self._strands.added()
        self._parts.append((work, finished))
        if not self._running:
            self._running = True
            self._strands.worker.submit(self._run)

    def run(
        self, work: Callable[[], ResultT], finished: Callable[[ResultT | Exception], None]
    ) -> None:
        """Do a part here and now: so little that handing it over would take longer. Only while
        none is under way."""
        assert not self.count
        finished(_outcome(work))

    def drop(self) -> None:
        """The parts that nobody has begun are `Dropped`, now."""
        while True:
            try:
                _, finished = self._parts.popleft()  # as the worker may do meanwhile
                self._strands.begin()
            except IndexError:
                return
            self._ended(finished, Dropped())

    def _run(self) -> None:
        """Do one part, on a thread of the worker."""
        worker = self._strands.worker
        with contextlib.suppress(IndexError):  # it was dropped
            work, finished = self._parts.popleft()
            wake = self._strands.begin()
            worker.post(partial(self._ended, finished, _outcome(work)), wake)
        if self._parts:
            worker.again(self._run)  # behind those of others
        else:
            worker.post(self._rest)

    def _ended(self, finished: Callable[[Any], None], result: Any) -> None:
        self.count -= 1
        try:
            finished(result)
        finally:
            self._strands.ended()

    def _rest(self) -> None:
        """The worker has found no further part."""
        self._running = bool(self._parts)  # added since
        if self._running:
            self._strands.worker.submit(self._run)


def _outcome(work: Callable[[], ResultT]) -> ResultT | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _nothing() -> None:
    pass


__all__ = ["PARTS_MAX", "Dropped", "Strand", "Strands", "Worker"]
