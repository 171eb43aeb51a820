"""What is sent to other nodes, at the pace that an egress budget allows.

A fetch of another node asks for a grant before each chunk, and waits for the next one where
there is none. What engines of this node load is not paced: it stays on this host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.blocksource import Chunk, FetchStream
from kvstore.messages import FetchOutcome
from kvstore_client.agent.egress import EgressBudget

# How often the interface's counter is read while something is sent: 20 us each time.
SAMPLE_S = 0.02


def _nothing() -> None:
    """Called where there is nothing to do."""


class Pacer:
    """Shares one budget among all fetches of other nodes. On the loop's thread.

    Args:
        budget: What may be sent.
        interface_tx_bytes: Reads the counter of the interface; None while there is none.
        unsent_bytes: What sockets to other nodes have taken and not sent yet.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        budget: EgressBudget,
        interface_tx_bytes: Callable[[], int | None] | None = None,
        unsent_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.budget = budget
        self._loop = loop
        self._interface_tx_bytes = interface_tx_bytes
        self._unsent_bytes = unsent_bytes
        self._taken_bytes = 0  # by sockets, ever
        self._sampled_at = loop.time() - SAMPLE_S
        # Fetches that wait, who has waited longest first.
        self._waiting: dict[PacedFetch, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting_count(self) -> int:
        """Fetches that wait for a grant."""
        return len(self._waiting)

    def take(self, stream: PacedFetch, want_bytes: int) -> int:
        """A grant; 0 if there is none, and then the stream is told when to ask again."""
        now = self._loop.time()
        self._sample(now)
        granted_bytes = self.budget.take(now, want_bytes)
        if not granted_bytes:
            self._waiting[stream] = None
            if self._timer is None:
                # A sample may change it; without one nobody would look again in time.
                wait_s = min(self.budget.wait_s(now, want_bytes), SAMPLE_S)
                self._timer = self._loop.call_later(wait_s, self._wake)
        return granted_bytes

    def sent(self, size_bytes: int) -> None:
        """A socket has taken bytes."""
        self._taken_bytes += size_bytes

    def forget(self, stream: PacedFetch) -> None:
        """A fetch waits no more."""
        self._waiting.pop(stream, None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, {}
        for stream in waiting:
            stream.on_ready()

    def _sample(self, now: float) -> None:
        if self._interface_tx_bytes is None or now - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = now
        interface_bytes = self._interface_tx_bytes()
        if interface_bytes is not None:
            own_bytes = max(0, self._taken_bytes - self._unsent_bytes())
            self.budget.sample(now, interface_bytes, own_bytes)


class PacedFetch(FetchStream):
    """A fetch of another node: gives out what its pacer grants.

    Args:
        inner: What would be given out without a budget.
    """

    def __init__(self, inner: FetchStream, pacer: Pacer) -> None:
        self._inner = inner
        self._pacer = pacer
        self._on_ready: Callable[[], None] = _nothing

    @property
    def on_ready(self) -> Callable[[], None]:
        """Told by the inner fetch as by the pacer."""
        return self._on_ready

    @on_ready.setter
    def on_ready(self, call: Callable[[], None]) -> None:
        self._on_ready = self._inner.on_ready = call

    @property
    def finished(self) -> bool:
        return self._inner.finished

    @property
    def queued_bytes(self) -> int:
        return self._inner.queued_bytes

    def next_chunk(self, bytes_max: int) -> Chunk | None:
        if self._inner.finished:
            return None
        want_bytes = min(bytes_max, max(1, self._inner.queued_bytes))
        granted_bytes = self._pacer.take(self, want_bytes)
        if not granted_bytes:
            return None
        chunk = self._inner.next_chunk(granted_bytes)
        if chunk is None:
            self._pacer.budget.give_back(granted_bytes)
            return None
        self._pacer.budget.give_back(granted_bytes - chunk.length)
        return chunk._replace(release=partial(self._released, chunk))

    def stop(self, outcome: FetchOutcome) -> None:
        self._pacer.forget(self)
        self._inner.stop(outcome)

    def outcomes(self) -> bytes:
        return self._inner.outcomes()

    def plan(self) -> str:
        return self._inner.plan()

    def errors(self) -> Sequence[Exception]:
        return self._inner.errors()

    def tiers(self) -> bytes:
        return self._inner.tiers()

    def served_by(self) -> bytes:
        return self._inner.served_by()

    def _released(self, chunk: Chunk) -> None:
        self._pacer.sent(chunk.length)
        chunk.release()


__all__ = ["PacedFetch", "Pacer"]
