"""What this client itself knows: which paths are up, what it has under way on them, and how
fast they were.

It needs no report and is never late, so that it counts more than what others claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore_client.selector.gain import GainMeter

# A window of busy time gives one sample of the rate: whichever comes first.
WINDOW_S_MAX = 0.1
WINDOW_BYTES_MAX = 4 * 1024 * 1024
# The last window of a busy time counts if it is this long; a shorter one shows latency.
WINDOW_S_MIN = 0.01
# What the system had already received comes in no time, and says nothing either.
BURST_S_MAX = 1e-4
# Two thirds of a change show after three windows: a link that falls to a hundredth of its
# rate is known as slow before the second request.
RATE_TIME_CONSTANT_S = 0.3
# How long what was seen of an idle relay is worth something. Then what it claims counts
# again, so that one that was slow once gets another chance.
MEMORY_S = 10.0
# What a relay is believed to bring that has brought nothing in a whole window: next to nothing,
# and not what 0.0 means.
NOTHING_BPS = 1.0
# A report tells of our own bytes as they were up to one interval ago.
PEAK_S = 0.2
# A path that has brought nothing for this long gets nothing new.
STALLED_S_MIN = 1.0


class PathMeter:
    """Bytes of ours that are under way on one path, and the rate while there are any.

    Attributes:
        node_id: Of the relay; "" for the path direct.
        share: What the breaker lets pass, from 0 (down) to 1; the owner sets it.
        inflight_bytes: Asked for, and neither here nor given up.
        limit_Bps: What bytes that it must read from storage can come at, by its own report:
            what it had in memory came faster, and says nothing of the next request.
        observed_Bps: The rate while busy, when last seen; 0.0 is unknown.
        observed_at: When that was.
    """

    __slots__ = (
        "_gain",
        "_peak_bytes",
        "_peak_until",
        "_previous_peak_bytes",
        "_progress_at",
        "_window_bytes",
        "_window_started_at",
        "inflight_bytes",
        "limit_Bps",
        "node_id",
        "observed_Bps",
        "observed_at",
        "share",
    )

    def __init__(self, gain: GainMeter, node_id: str = "") -> None:
        self.node_id = node_id
        self.share = 1.0
        self.inflight_bytes = 0
        self.limit_Bps = math.inf
        self.observed_Bps = 0.0
        self.observed_at = -math.inf
        self._gain = gain
        self._window_started_at = 0.0
        self._window_bytes = 0
        self._progress_at = 0.0
        # The highest `inflight_bytes` of this and of the last time of PEAK_S.
        self._peak_bytes = 0
        self._previous_peak_bytes = 0
        self._peak_until = -math.inf

    def sent(self, now: float, size_bytes: int) -> None:
        """Bytes were asked for."""
        if self.inflight_bytes == 0:
            self._window_started_at = self._progress_at = now
            self._window_bytes = 0
        self._turn_peak(now)
        self.inflight_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self.inflight_bytes)
        self._gain.moved(now, bool(self.node_id), size_bytes, 0)

    def arrived(self, now: float, size_bytes: int) -> None:
        """Some of them are here. To be told of each block as it comes, not of a run at its
        end, else the rate is that of bursts."""
        self._ended(now, size_bytes, size_bytes)

    def gone(self, now: float, size_bytes: int) -> None:
        """Some of them will not come: misses, failures, and what another path took over."""
        self._ended(now, size_bytes, 0)

    @property
    def seen_Bps(self) -> float:
        """The rate while busy, as far as the path's limit allows; 0.0 is unknown."""
        return min(self.observed_Bps, self.limit_Bps)

    def rate_Bps(self, now: float, prior_Bps: float) -> float:
        """What the path is believed to carry.

        Args:
            prior_Bps: What to believe when nothing was seen, or nothing lately.
        """
        seen_Bps = self.seen_Bps
        if seen_Bps == 0.0:
            return prior_Bps
        if self.inflight_bytes:
            return seen_Bps
        worth = math.exp(-max(0.0, now - self.observed_at) / MEMORY_S)
        return prior_Bps + (seen_Bps - prior_Bps) * worth

    def recent_bytes(self, now: float) -> int:
        """The most that was under way lately: what of a reported queue may be our own."""
        self._turn_peak(now)
        return max(self._peak_bytes, self._previous_peak_bytes)

    def stalled(self, now: float) -> bool:
        """Whether bytes are under way and none has come for a second."""
        return self.inflight_bytes > 0 and now - self._progress_at >= STALLED_S_MIN

    def _ended(self, now: float, size_bytes: int, arrived_bytes: int) -> None:
        assert size_bytes <= self.inflight_bytes, "more bytes end than were sent"
        self._turn_peak(now)
        self.inflight_bytes -= size_bytes
        if arrived_bytes:
            self._window_bytes += arrived_bytes
            self._progress_at = now
        elapsed_s = now - self._window_started_at
        full = elapsed_s >= WINDOW_S_MAX or self._window_bytes >= WINDOW_BYTES_MAX
        if elapsed_s > BURST_S_MAX and (
            full or (self.inflight_bytes == 0 and elapsed_s >= WINDOW_S_MIN)
        ):
            self._sample(now, elapsed_s)
        self._gain.moved(now, bool(self.node_id), -size_bytes, arrived_bytes)

    def _sample(self, now: float, elapsed_s: float) -> None:
        seen_Bps = self._window_bytes / elapsed_s
        if self.observed_Bps:
            step = 1.0 - math.exp(-elapsed_s / RATE_TIME_CONSTANT_S)
            self.observed_Bps += (seen_Bps - self.observed_Bps) * step
        elif self._window_bytes or not self.node_id or elapsed_s < WINDOW_S_MAX:
            # Misses bring nothing either; they come soon. And nobody would ask storage again.
            self.observed_Bps = seen_Bps
        else:
            self.observed_Bps = NOTHING_BPS
        self.observed_at = now
        self._window_started_at = now
        self._window_bytes = 0

    def _turn_peak(self, now: float) -> None:
        if now >= self._peak_until:
            # After a long pause the last time is not the one before this.
            late = now >= self._peak_until + PEAK_S
            self._previous_peak_bytes = self.inflight_bytes if late else self._peak_bytes
            self._peak_bytes = self.inflight_bytes
            self._peak_until = now + PEAK_S


class Daemon:
    """A daemon as this client sees it.

    Attributes:
        node_id: As its reports name it; "" before it has ever answered.
        up: Whether it can be asked now.
    """

    __slots__ = ("node_id", "up")

    def __init__(self, node_id: str = "", up: bool = True) -> None:
        self.node_id = node_id
        self.up = up


class Inflight:
    """All paths of a client. One thread.

    Args:
        node_id: This node, as its requests name it.
        daemons: Node ids, by the index that spans use.
        relays: Node ids of the agents that may relay.

    Attributes:
        direct: This node's storage link, whichever daemon sends.
        relays: By node id.
        ring: The same in a fixed order.
    """

    __slots__ = ("daemons", "direct", "gain", "node_id", "relays", "ring")

    def __init__(self, node_id: str, daemons: Sequence[str], relays: Sequence[str] = ()) -> None:
        self.node_id = node_id
        self.gain = GainMeter()
        self.daemons = [Daemon(name) for name in daemons]
        self.direct = PathMeter(self.gain)
        self.relays: dict[str, PathMeter] = {}
        self.ring: list[PathMeter] = []
        for name in relays:
            self.add_relay(name)

    def add_relay(self, node_id: str) -> PathMeter:
        """Use an agent as a relay from now on."""
        meter = self.relays.get(node_id)
        if meter is None:
            assert node_id, "a relay has a name"
            meter = self.relays[node_id] = PathMeter(self.gain, node_id)
            self.ring.append(meter)
        return meter

    def remove_relay(self, node_id: str) -> None:
        """Use it no more; what is under way there still ends by its meter."""
        meter = self.relays.pop(node_id, None)
        if meter is not None:
            self.ring.remove(meter)
