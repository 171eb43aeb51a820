"""How much may be sent for other nodes' loads now: what this node's own communication leaves.

Rule: the node's own goes first and a relay takes what is left, as with the two virtual lanes of
the paper (DualPath, arXiv 2602.21548): about 99 of 100 bytes to the model where both want the
link, all of it to the KV-cache where nobody else does. A network card decides that packet by
packet. Here it is decided from the counter of the interface, every few tens of milliseconds; the
finer part is left to whatever queues packets and knows marks (`kvstore.transport.marking`).

Pure: `now` is in seconds of any clock that goes on by itself.
"""

from __future__ import annotations

import math

# Of the link, whatever others do. The paper's 99:1: a relay that gets nothing at all would time
# out, and what it has sent so far would be lost.
FLOOR_SHARE = 0.01
# And never less than this: two frames of 1 MiB take 17 s then, and a connection that moves
# nothing for 30 s is given up.
FLOOR_BPS_MIN = 125_000
# Of the link, everything together. A link that is asked for exactly what it can carry never
# gets rid of a queue once there is one, and the node's own packets would wait in it; 3 % drain
# one of `BURST_S` in a third of a second.
HEADROOM_SHARE = 0.97
# Of the link, from where on it counts as full: counters of virtual interfaces miss up to 4.6 %,
# the headers of all but the first packet of a segmentation unit (66 of 1,514 bytes).
FULL_SHARE = 0.9
# On a full link nobody sees what others would send: packets share it as they come, and half and
# half may last. They are taken to want more, by this part of what they get or of what relays
# send, whichever is less; if they do not take it, the link is full no more, and relays come back
# as they do in any case. Others that want all come from half of a link to 99 % of it in ten
# samples; where they want no more, relays leave up to a third of their part unused.
SHIFT_SHARE = 1 / 3
# What was not used is saved up for this long. An event loop that is busy, and timers that go by
# milliseconds, lose nothing; and it is what the node's own packets wait for at most.
BURST_S = 0.01
# One unit of segmentation offload (64 KiB in a packet's length field): a smaller grant costs the
# same system call and the same trip through the network stack.
GRANT_BYTES_MIN = 64 * 1024
# Two thirds of what others leave off come back in this time, and all but 1/20,000 in a second.
# Short collectives one after the other then look like one long one.
RELEASE_TIME_CONSTANT_S = 0.1
# Two samples that are closer are one: a single large packet would look like a full link.
SAMPLE_S_MIN = 0.005
# What has left our sockets and is still above the interface's counter: two packets of 64 KiB a
# connection (TCP small queues), of a few connections; on fast links, as long as a burst.
PASSAGE_BYTES_MIN = 256 * 1024
# Beyond all rounding of times; asking at the end of a wait finds what was waited for.
WAIT_MARGIN_S = 1e-6


class EgressBudget:
    """Grants bytes to what is sent for other nodes, from a token bucket whose rate yields.

    What the interface has sent and we have not is what others send: it is believed at once when
    it rises, and let go of slowly when it falls. Headers and repeated packets of our own are
    among it; they use the link as well.

    Args:
        capacity_Bps: What the link carries, as configured; 0 if nobody knows, and then nothing
            yields.
        cap_Bps: Most that may be granted in any case; 0 for no such cap.
    """

    __slots__ = (
        "_allowed_Bps",
        "_capacity_Bps",
        "_ceiling_Bps",
        "_filled_at",
        "_interface_bytes",
        "_others_Bps",
        "_own_bytes",
        "_passing_bytes",
        "_sampled_at",
        "_tokens",
    )

    def __init__(self, capacity_Bps: int = 0, cap_Bps: int = 0) -> None:
        assert capacity_Bps >= 0
        assert cap_Bps >= 0
        self._capacity_Bps = capacity_Bps
        left_Bps = HEADROOM_SHARE * capacity_Bps if capacity_Bps else math.inf
        self._ceiling_Bps = min(left_Bps, cap_Bps or math.inf)
        self._allowed_Bps = self._ceiling_Bps
        self._tokens = self.burst_bytes
        self._filled_at = -math.inf
        self._others_Bps = 0.0
        # Of the last sample; none yet if the time is infinite.
        self._sampled_at = -math.inf
        self._interface_bytes = 0
        self._own_bytes = 0
        # Ours that have left the sockets and that the interface has not counted yet.
        self._passing_bytes = 0.0

    @property
    def others_Bps(self) -> float:
        """What the node itself sends by the interface, or would: an estimate, on the high side."""
        return self._others_Bps

    @property
    def allowed_Bps(self) -> float:
        """What may be sent for other nodes; infinite without a capacity and a cap, never 0."""
        return self._allowed_Bps

    @property
    def floor_Bps(self) -> float:
        """What may be sent for other nodes whatever this one sends."""
        return min(self._ceiling_Bps, max(FLOOR_SHARE * self._capacity_Bps, FLOOR_BPS_MIN))

    @property
    def burst_bytes(self) -> float:
        """What may be granted at once after a pause."""
        return max(GRANT_BYTES_MIN, BURST_S * self._allowed_Bps)

    def sample(self, now: float, interface_tx_bytes: int, own_tx_bytes: int) -> None:
        """Take account of what was sent since the last call.

        Counters that stand still, jump or begin anew cost at most a second of speed. The first
        sample after a pause is about the whole pause.

        Args:
            interface_tx_bytes: Counter of the interface: all that it has sent.
            own_tx_bytes: What has left our sockets for other nodes by that interface, ever: what
                they took less what still waits in them (`Stream.unsent_bytes`). Without the
                second, a full link that is shared looks like one that we have to ourselves until
                the socket buffers are full.
        """
        elapsed_s = now - self._sampled_at
        if elapsed_s < SAMPLE_S_MIN:
            return
        first = self._sampled_at == -math.inf
        interface_bytes = interface_tx_bytes - self._interface_bytes
        own_bytes = own_tx_bytes - self._own_bytes
        self._sampled_at = now
        self._interface_bytes, self._own_bytes = interface_tx_bytes, own_tx_bytes
        if first or interface_bytes < 0 or own_bytes < 0:
            self._passing_bytes = 0.0
            return
        self._believe(elapsed_s, self._others_bytes(elapsed_s, interface_bytes, own_bytes))
        self._allow(now)

    def take(self, now: float, want_bytes: int) -> int:
        """Ask for a grant.

        Returns:
            Bytes that may be sent now; less than asked for if there is less, and 0 if that is not
            worth a system call. What is not sent of it goes to `give_back`.
        """
        assert want_bytes >= 0
        if self._allowed_Bps == math.inf:
            return want_bytes
        self._fill(now)
        if self._tokens < min(want_bytes, GRANT_BYTES_MIN):
            return 0
        granted_bytes = min(want_bytes, int(self._tokens))
        self._tokens -= granted_bytes
        return granted_bytes

    def give_back(self, unsent_bytes: int) -> None:
        """The socket has not taken all of a grant."""
        assert unsent_bytes >= 0
        self._tokens = min(self._tokens + unsent_bytes, self.burst_bytes)

    def wait_s(self, now: float, want_bytes: int = GRANT_BYTES_MIN) -> float:
        """How long until `take` of as much grants something, unless a sample changes it.

        0 if it does so now. Bounded by what the floor needs for `GRANT_BYTES_MIN`, half a second;
        yet whoever waits for longer than until the next sample may wait in vain.
        """
        if self._allowed_Bps == math.inf:
            return 0.0
        self._fill(now)
        missing_bytes = min(want_bytes, GRANT_BYTES_MIN) - self._tokens
        return missing_bytes / self._allowed_Bps + WAIT_MARGIN_S if missing_bytes > 0 else 0.0

    def _others_bytes(self, elapsed_s: float, interface_bytes: int, own_bytes: int) -> float:
        """Bytes of an interval that were not ours, or would not have been."""
        difference_bytes = interface_bytes - own_bytes - self._passing_bytes
        passage_bytes = max(PASSAGE_BYTES_MIN, BURST_S * self._capacity_Bps)
        self._passing_bytes = min(max(0.0, -difference_bytes), passage_bytes)
        others_bytes = max(0.0, difference_bytes)
        if not self._capacity_Bps:
            return others_bytes
        capacity_bytes = self._capacity_Bps * elapsed_s
        if interface_bytes >= FULL_SHARE * capacity_bytes:
            others_bytes += SHIFT_SHARE * min(others_bytes, own_bytes)
        # Another interface's counter may be further on by any number.
        return min(others_bytes, capacity_bytes)

    def _believe(self, elapsed_s: float, others_bytes: float) -> None:
        """More at once, less bit by bit."""
        rate_Bps = others_bytes / elapsed_s
        kept = math.exp(-elapsed_s / RELEASE_TIME_CONSTANT_S)
        self._others_Bps = max(rate_Bps, rate_Bps + (self._others_Bps - rate_Bps) * kept)

    def _allow(self, now: float) -> None:
        """Let the rate follow what others leave."""
        if not self._capacity_Bps:
            return
        self._fill(now)  # up to now the old rate was in force
        left_Bps = HEADROOM_SHARE * self._capacity_Bps - self._others_Bps
        self._allowed_Bps = min(self._ceiling_Bps, max(self.floor_Bps, left_Bps))
        # What was saved up at a higher rate would be sent into the others' way.
        self._tokens = min(self._tokens, self.burst_bytes)

    def _fill(self, now: float) -> None:
        if now <= self._filled_at:
            return
        grown_bytes = (now - self._filled_at) * self._allowed_Bps
        self._tokens = min(self._tokens + grown_bytes, self.burst_bytes)
        self._filled_at = now
