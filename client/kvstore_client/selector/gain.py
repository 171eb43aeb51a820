"""Whether the second path gains anything: a comparison of what really arrived.

Two paths that look idle may share what limits them: the processors of one host, or the
daemon's own link. No report says so. So the bytes that arrive a second while relays are at
work are compared with those that arrive without, and from time to time the arm that is not
in use is tried again.
"""

from __future__ import annotations

import math

# Splitting goes on while it brings a twentieth more, and begins again when it brings three;
# the gap between both keeps noise from switching it to and fro.
GAIN_KEEP_MIN = 1.05
GAIN_BEGIN_MIN = 1.15
# Beyond these a verdict is clear, and the next trial may be later.
GAIN_CLEAR_MIN = 0.9
GAIN_CLEAR_MAX = 1.5
# The first trial soon, so that a host where relays only cost notices within its first second;
# then ever more rarely, since half the trials cost half the rate.
TRIAL_INTERVAL_S_MIN = 0.5
TRIAL_INTERVAL_S_MAX = 10.0
# How long a trial of direct goes on while more is asked for.
DIRECT_TRIAL_S = 0.1
# A trial whose outcome is not known by then is given up, if relays have finished: nothing
# large was asked for.
TRIAL_S_MAX = 2.0
# A trial of direct costs its request as much again as it takes. However rarely requests come,
# so many are split before the first, and with the interval their number grows.
TRIAL_REQUESTS_MIN = 2
TRIAL_REQUESTS_MAX = 16
# For how long a trial keeps a relay busy: two fifths of an episode, so that a link as fast as
# our own shows as a gain of 1.4, and a tenth of a second of the bytes of a useless one.
PROBE_S = 0.1
# Requests that take longer are not tried direct unless nothing shorter comes for four
# intervals: the trial costs their caller as much again as they take.
TRIAL_REQUEST_S_MAX = 0.25
_OVERDUE = 4.0

# Long enough to hold many blocks, short enough for several in a trial.
EPISODE_S_MAX = 0.25
# What is shorter or smaller shows latency, and no rate.
EPISODE_S_MIN = 0.02
EPISODE_BYTES_MIN = 4 * 1024 * 1024
BURST_S_MAX = 1e-4
# Of busy time: the memory of an arm.
EVIDENCE_TIME_CONSTANT_S = 1.0
# Older evidence is of another time of the day.
EVIDENCE_S_MAX = 2.0


class Evidence:
    """Bytes a second of one arm, the newer counting more."""

    __slots__ = ("_bytes", "_seconds", "seen_at")

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self.seen_at = -math.inf

    @property
    def rate_Bps(self) -> float:
        """The average rate; 0.0 is unknown."""
        return self._bytes / self._seconds if self._seconds else 0.0

    def add(self, now: float, seconds: float, size_bytes: int) -> None:
        """`size_bytes` arrived in the `seconds` before `now`."""
        old = now - seconds - self.seen_at > EVIDENCE_S_MAX
        kept = 0.0 if old else math.exp(-seconds / EVIDENCE_TIME_CONSTANT_S)
        self._bytes = self._bytes * kept + size_bytes
        self._seconds = self._seconds * kept + seconds
        self.seen_at = now


class GainMeter:
    """Decides whether requests are split at all. One thread.

    Time in which bytes are under way is cut into episodes. An episode in which a relay was at
    work at any time counts for splitting, with the tail in which one path waits for another;
    the others count for direct.

    Attributes:
        splitting: The verdict. It begins with hope.
        direct, split: What was seen of both arms.
    """

    __slots__ = (
        "_bytes",
        "_due_at",
        "_inflight_bytes",
        "_interval_s",
        "_relayed",
        "_relayed_bytes",
        "_split_count",
        "_started_at",
        "_trial_at",
        "direct",
        "split",
        "splitting",
    )

    def __init__(self) -> None:
        self.splitting = True
        self.direct = Evidence()
        self.split = Evidence()
        self._interval_s = TRIAL_INTERVAL_S_MIN
        self._split_count = 0  # requests that were split since the last trial
        self._due_at: float | None = None
        self._trial_at: float | None = None
        # The episode.
        self._inflight_bytes = 0
        self._relayed_bytes = 0
        self._started_at = 0.0
        self._bytes = 0
        self._relayed = False

    @property
    def gain(self) -> float:
        """How many times the rate of direct alone splitting reaches; 0.0 is unknown."""
        direct_Bps = self.direct.rate_Bps
        return self.split.rate_Bps / direct_Bps if direct_Bps else 0.0

    def moved(self, now: float, relayed: bool, sent_bytes: int, arrived_bytes: int) -> None:
        """Bytes under way have changed by `sent_bytes` (negative when they end).

        Args:
            arrived_bytes: How many of those that ended have arrived.
        """
        if self._inflight_bytes == 0:
            self._begin(now)
        self._relayed = self._relayed or self._relayed_bytes > 0
        self._inflight_bytes += sent_bytes
        if relayed:
            self._relayed_bytes += sent_bytes
            self._relayed = self._relayed or self._relayed_bytes > 0
        self._bytes += arrived_bytes
        elapsed_s = now - self._started_at
        length_s = EPISODE_S_MAX
        drained = False
        if self._trial_at is not None and self.splitting:
            # A trial of direct costs: it begins with the last relayed byte, and is short.
            drained = self._relayed and self._relayed_bytes == 0
            length_s = DIRECT_TRIAL_S
        if self._inflight_bytes == 0 or elapsed_s >= length_s or drained:
            if elapsed_s >= EPISODE_S_MIN or (
                self._bytes >= EPISODE_BYTES_MIN and elapsed_s > BURST_S_MAX
            ):
                self._end(now, elapsed_s)
            self._begin(now)

    def allowance_s(self, now: float, direct_s: float) -> float:
        """How long relays may be busy with a request that seems worth splitting: infinitely
        long, not at all, or for a trial.

        Args:
            direct_s: What the request is estimated to take direct.
        """
        if self._due_at is None:
            self._due_at = now + self._interval_s
        draining = self.splitting and self._relayed_bytes > 0
        if self._trial_at is not None and now - self._trial_at > TRIAL_S_MAX and not draining:
            self._schedule(now)
        if self._trial_at is not None:
            # Of splitting one request is trial enough; of direct it takes all.
            return 0.0
        if now < self._due_at:
            self._split_count += self.splitting
            return math.inf if self.splitting else 0.0
        if self.splitting:
            if self._split_count < self._requests_min:
                self._split_count += 1
                return math.inf
            overdue = now - self._due_at >= (_OVERDUE - 1) * self._interval_s
            if direct_s > TRIAL_REQUEST_S_MAX and not overdue:
                return math.inf
        self._trial_at = now
        self._split_count = 0
        return 0.0 if self.splitting else PROBE_S

    @property
    def _requests_min(self) -> float:
        grown = TRIAL_REQUESTS_MIN * self._interval_s / TRIAL_INTERVAL_S_MIN
        return min(TRIAL_REQUESTS_MAX, grown)

    def _begin(self, now: float) -> None:
        self._started_at = now
        self._bytes = 0
        self._relayed = self._relayed_bytes > 0

    def _end(self, now: float, elapsed_s: float) -> None:
        (self.split if self._relayed else self.direct).add(now, elapsed_s, self._bytes)
        trial_at = self._trial_at
        # The other arm must have begun after the trial did.
        if (
            trial_at is not None
            and self._relayed is not self.splitting
            and self._started_at >= trial_at
        ):
            before = self.splitting
            self.splitting = self.gain >= (GAIN_KEEP_MIN if before else GAIN_BEGIN_MIN)
            if self.splitting is not before:
                self._interval_s = TRIAL_INTERVAL_S_MIN
            clear = not GAIN_CLEAR_MIN < self.gain < GAIN_CLEAR_MAX
            self._schedule(now, 4 if clear else 2)

    def _schedule(self, now: float, factor: int = 2) -> None:
        self._trial_at = None
        self._interval_s = min(factor * self._interval_s, TRIAL_INTERVAL_S_MAX)
        self._due_at = now + self._interval_s
