"""Workers without threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class AtOnce:
    """Does everything where it is asked for."""

    def submit(self, job: Callable[[], None]) -> None:
        job()

    def again(self, job: Callable[[], None]) -> None:
        job()

    def post(self, call: Callable[[], None], wake: bool = True) -> None:
        call()


class ByHand:
    """Does what a test lets it do.

    Attributes:
        jobs: Submitted, and not begun.
        calls: Posted, and not made.
    """

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], None]] = deque()
        self.calls: deque[Callable[[], None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def again(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def post(self, call: Callable[[], None], wake: bool = True) -> None:
        self.calls.append(call)

    def work(self, count: int = 1) -> None:
        """Do the next jobs; the loop hears of nothing yet."""
        for _ in range(count):
            self.jobs.popleft()()

    def tell(self) -> None:
        """Make all calls."""
        while self.calls:
            self.calls.popleft()()

    def finish(self) -> bool:
        """Do and tell everything; whether there was something."""
        any_job = bool(self.jobs or self.calls)
        while self.jobs or self.calls:
            self.tell()
            if self.jobs:
                self.work()
        return any_job
