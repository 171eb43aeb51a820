"""When to leave a sick peer alone, and how to come back to it: circuit breaker and backoff.

::

                 5 failures in a row                retry_at has come
      CLOSED ──────────────────────────▶ OPEN ──────────────────────────▶ HALF_OPEN
        ▲                                 ▲ ▲            the probe failed   │
        │ 10 s without failure            │ └───────────────────────────────┤
        │                    any failure  │                                 │ it succeeded
        └────────────────── RAMPING ──────┘◀────────────────────────────────┘
                            10 % to 100 % of the requests

Pure: `now` is in seconds of any monotonic clock, and every `draw` is a random number from
[0, 1) that the caller brings.
"""

from __future__ import annotations

import enum

# Five in a row: one timeout under load is no sickness, and at 5 s a request a dead peer is
# still found out within one round of requests that were in flight together.
FAILURES_MAX = 5
# From a pause that nobody notices to one that costs a dead host's peers next to nothing.
DELAY_S_MIN = 0.05
DELAY_S_MAX = 5.0
# A probe whose outcome never came is given up after a request's default deadline.
PROBE_TIMEOUT_S = 5.0
# A peer that has just restarted has cold caches and all its clients coming back at once.
RAMP_S = 10.0
RAMP_SHARE_MIN = 0.1


class BreakerState(enum.StrEnum):
    """What a breaker lets pass."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing until `retry_at`."""
    HALF_OPEN = "half-open"
    """One request is under way to find out."""
    RAMPING = "ramping"
    """A share that grows with time."""


class Backoff:
    """Pauses between attempts: the range they are drawn from doubles up to 5 s.

    Jitter over the whole range keeps clients that lost a peer together from coming back
    together: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    The lower end of the range stays at 50 ms, so that no draw makes a busy loop.
    """

    __slots__ = ("_ceiling_s",)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The last attempt was good: begin anew."""
        self._ceiling_s = DELAY_S_MIN

    def next_delay_s(self, draw: float) -> float:
        """The pause before the next attempt, from 50 ms to 5 s."""
        self._ceiling_s = min(2 * self._ceiling_s, DELAY_S_MAX)
        return DELAY_S_MIN + draw * (self._ceiling_s - DELAY_S_MIN)


class CircuitBreaker:
    """Decides whether a peer is asked at all. One thread.

    A failure is a connection that broke, a refusal to connect, a deadline that passed in
    silence; a miss is a success. Requests that fail together are one failure, however many:
    what was begun before the last counted failure says nothing new. Outcomes of requests that
    were sent before the breaker opened count neither way while it is open, so that a burst of
    them makes the pause no longer.
    """

    __slots__ = (
        "_backoff",
        "_failed_at",
        "_failure_count",
        "_probe_until",
        "_ramp_started_at",
        "_retry_at",
    )

    def __init__(self) -> None:
        self._backoff = Backoff()
        self._failure_count = 0
        self._failed_at: float | None = None  # when the last failure was counted
        # At most one of these is set: OPEN, HALF_OPEN and RAMPING in this order.
        self._retry_at: float | None = None
        self._probe_until: float | None = None
        self._ramp_started_at: float | None = None

    @property
    def state(self) -> BreakerState:
        """The state after the last call; time alone changes it at the next one."""
        if self._retry_at is not None:
            return BreakerState.OPEN
        if self._probe_until is not None:
            return BreakerState.HALF_OPEN
        if self._ramp_started_at is not None:
            return BreakerState.RAMPING
        return BreakerState.CLOSED

    @property
    def retry_at(self) -> float | None:
        """When the next probe may go; None while requests pass."""
        return self._probe_until if self._retry_at is None else self._retry_at

    def share(self, now: float) -> float:
        """The share of requests that may pass now, from 0 to 1; a probe is no share."""
        if self._retry_at is not None or self._probe_until is not None:
            return 0.0
        if self._ramp_started_at is None:
            return 1.0
        grown = (1.0 - RAMP_SHARE_MIN) * (now - self._ramp_started_at) / RAMP_S
        return min(1.0, RAMP_SHARE_MIN + max(0.0, grown))

    def allow(self, now: float, draw: float) -> bool:
        """Whether a request may be sent now. Who gets True reports the outcome."""
        retry_at = self.retry_at
        if retry_at is not None:
            if now < retry_at:
                return False
            self._retry_at = None
            self._probe_until = now + PROBE_TIMEOUT_S
            return True
        self._finish_ramp(now)
        return draw < self.share(now)

    def success(self, now: float) -> None:
        """A request was answered."""
        if self._retry_at is not None:
            return
        self._failure_count = 0
        if self._probe_until is not None:
            self._probe_until = None
            self._ramp_started_at = now
        self._finish_ramp(now)

    def failure(self, now: float, draw: float = 1.0, begun_at: float | None = None) -> None:
        """A request failed.

        Args:
            draw: Places the next probe within the range of the backoff.
            begun_at: When the request was begun; None for what happened just now.
        """
        if self._retry_at is not None:
            return
        if begun_at is not None and self._failed_at is not None and begun_at < self._failed_at:
            return
        self._failed_at = now
        self._finish_ramp(now)
        self._failure_count += 1
        # What has just been sick gets no five tries.
        if self.state is BreakerState.CLOSED and self._failure_count < FAILURES_MAX:
            return
        self._failure_count = 0
        self._probe_until = self._ramp_started_at = None
        self._retry_at = now + self._backoff.next_delay_s(draw)

    def _finish_ramp(self, now: float) -> None:
        if self._ramp_started_at is not None and now >= self._ramp_started_at + RAMP_S:
            self._ramp_started_at = None
            # Only here, so that a peer that comes and goes is asked ever more rarely.
            self._backoff.reset()
