"""The policies: how many blocks of a request go by each path, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.loadreport import ReportTable
from kvstore_client.selector.estimates import Belief, relay_belief, usable
from kvstore_client.selector.inflight import Inflight, PathMeter
from kvstore_client.selector.plans import Request
from kvstore_client.selector.waterfill import Shares, fill

# What takes less direct is not split: a second request, its hop and its share of the blocks'
# completion cost about a millisecond.
SPLIT_S_MIN = 0.01
# Splitting must promise a tenth, since it spends the decode node's link and processors.
SAVING_MIN = 0.1
# A relay's part must be worth a request of its own.
RELAY_S_MIN = 0.002
# The decode node and two drawn by chance. With two choices the longest queue is within a few
# bytes of the best (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
# IEEE TPDS 12(10), 2001); with all of them, every client would find the same idle node.
SAMPLE_SIZE = 2

_MIB = 1024 * 1024


class Scene(NamedTuple):
    """All that a policy may look at.

    Attributes:
        request: What is to be fetched.
        block_count: All its blocks.
        direct_blocks: Those whose daemon is up.
        direct: Belief of this node's own link.
        queues: Reported bytes by node; None believes no report of queues.
        draws: Random numbers from [0, 1).
        committed: Whether the plan will be carried out, or is only an estimate.
    """

    request: Request
    block_count: int
    direct_blocks: int
    direct: Belief
    reports: ReportTable
    inflight: Inflight
    queues: dict[str, int] | None
    shares: Shares
    now: float
    draws: Sequence[float]
    committed: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.block_count * self.request.block_bytes

    def believe(self, relay: PathMeter) -> Belief:
        """What is believed of a relay."""
        preferred = self.request.decode_node in ("", relay.node_id)
        return relay_belief(
            self.now, relay, self.reports, self.queues, self.direct.rate_Bps, preferred
        )

    def find(self, draw: float, rank_min: int, taken: Sequence[PathMeter]) -> PathMeter | None:
        """The first relay of at least a rank, from a drawn place on."""
        ring = self.inflight.ring
        count = len(ring)
        start = int(draw * count)
        for place in range(start, start + count):
            meter = ring[place if place < count else place - count]
            if meter not in taken and usable(self.now, meter, self.reports) >= rank_min:
                return meter
        return None

    def candidates(self, rank_min: int) -> list[PathMeter]:
        """The decode node, if it can be used, and some others."""
        found: list[PathMeter] = []
        preferred = self.inflight.relays.get(self.request.decode_node)
        if preferred is not None and usable(self.now, preferred, self.reports) >= rank_min:
            found.append(preferred)
        for draw in self.draws[:SAMPLE_SIZE]:
            meter = self.find(draw, rank_min, found)
            if meter is None:
                break
            found.append(meter)
        return found

    def candidate(self) -> PathMeter | None:
        """The relay of policies that take whole requests."""
        relays = self.candidates(2)
        return relays[0] if relays else None


class Decision(NamedTuple):
    """Blocks that go direct, blocks of each relay, when all are here, and why."""

    direct_blocks: int
    quotas: list[tuple[str, int]]
    estimate_s: float
    reason: str


def all_direct(scene: Scene, why: str) -> Decision:
    """Everything by this node's own link, as far as its daemons are up."""
    if scene.direct_blocks < scene.block_count:
        return spread_forced(scene, why)
    direct = scene.direct
    end_s = direct.start_s + scene.size_bytes / direct.rate_Bps
    return Decision(
        scene.block_count, [], end_s, f"direct, {_work(scene.size_bytes, direct, end_s)}: {why}"
    )


def only_direct(scene: Scene) -> Decision:
    """The policy `direct`: relays do not exist."""
    direct = scene.direct
    size_bytes = scene.direct_blocks * scene.request.block_bytes
    end_s = direct.start_s + size_bytes / direct.rate_Bps if size_bytes else math.inf
    reason = f"direct, {_work(size_bytes, direct, end_s)}: by policy"
    if scene.direct_blocks < scene.block_count:
        reason += f"; {scene.block_count - scene.direct_blocks} blocks lie on daemons that are down"
    return Decision(scene.direct_blocks, [], end_s, reason)


def whole(scene: Scene, relay: PathMeter, why: str) -> Decision:
    """Everything by one relay."""
    belief = scene.believe(relay)
    end_s = belief.start_s + scene.size_bytes / belief.rate_Bps
    return Decision(
        0,
        [(relay.node_id, scene.block_count)],
        end_s,
        f"by {relay.node_id}, {_work(scene.size_bytes, belief, end_s)}: {why}",
    )


def round_robin(scene: Scene, turn: int) -> Decision:
    """The policy `round_robin`: direct and the decode node in turn; where that is not known,
    direct and each relay."""
    relay: PathMeter | None
    if scene.request.decode_node in scene.inflight.relays:
        relay = scene.candidate() if turn % 2 else None
    else:
        count = len(scene.inflight.ring)
        place = turn % (count + 1)
        relay = scene.find((place - 0.5) / count, 2, ()) if place else None
    if relay is None:
        return all_direct(scene, f"turn {turn}")
    return whole(scene, relay, f"turn {turn}")


def shortest_queue(scene: Scene) -> Decision:
    """The policy `shortest_queue`: the paper's rule for the path of a whole request."""
    relay = scene.candidate()
    if relay is None:
        return all_direct(scene, "no relay can be used")
    there, here = scene.believe(relay).queued_bytes, scene.direct.queued_bytes
    why = f"{_mib(here)} wait for this node, {_mib(there)} for {relay.node_id}"
    return all_direct(scene, why) if here <= there else whole(scene, relay, why)


def balanced(scene: Scene) -> Decision:
    """The policy `balanced`: in parts that end together."""
    if scene.direct_blocks < scene.block_count:
        return spread_forced(scene, "as even as can be")
    direct, size_bytes = scene.direct, scene.size_bytes
    direct_s = direct.start_s + size_bytes / direct.rate_Bps
    if direct_s < SPLIT_S_MIN:
        return all_direct(scene, f"less than {SPLIT_S_MIN * 1e3:.0f} ms is not split")
    relays = scene.candidates(2)
    if not relays:
        return all_direct(scene, "no relay is up, willing and known by a fresh report")
    gain = scene.inflight.gain
    allowance_s = math.inf if gain.splitting else 0.0
    if scene.committed:
        allowance_s = gain.allowance_s(scene.now, direct_s)
    if not allowance_s:
        return all_direct(scene, _gain_reason(scene))

    beliefs = [direct, *map(scene.believe, relays)]
    end_s = fill([b.start_s for b in beliefs], [b.rate_Bps for b in beliefs], size_bytes)
    wanted = [0.0] * len(relays)
    if end_s <= (1.0 - SAVING_MIN) * direct_s:
        for place, belief in enumerate(beliefs[1:]):
            busy_s = min(end_s - belief.start_s, allowance_s)
            if busy_s >= RELAY_S_MIN:
                wanted[place] = busy_s * belief.rate_Bps / size_bytes
    names = [relay.node_id for relay in relays]
    parts = scene.shares.bound(scene.now, names, wanted, scene.committed)
    counts = apportion([max(0.0, 1.0 - sum(parts)), *parts], scene.block_count)
    return _decision(scene, beliefs, counts, f"direct alone {direct_s * 1e3:.1f} ms")


def spread_forced(scene: Scene, why: str) -> Decision:
    """Blocks of daemons that cannot be reached from here go by relays, if any is left."""
    relays = scene.candidates(2) or scene.candidates(1)
    forced = scene.block_count - scene.direct_blocks
    if not relays:
        decision = only_direct(scene)
        return decision._replace(reason=f"{decision.reason}; no relay can be used")
    beliefs = [scene.direct, *map(scene.believe, relays)]
    counts = _level(beliefs, scene.block_count, scene.request.block_bytes)
    if counts[0] > scene.direct_blocks:
        rest = scene.block_count - scene.direct_blocks
        counts = [scene.direct_blocks, *_level(beliefs[1:], rest, scene.request.block_bytes)]
    return _decision(
        scene, beliefs, counts, f"{forced} blocks lie on daemons that are down here; {why}"
    )


def apportion(parts: Sequence[float], count: int) -> list[int]:
    """Split a count in proportion, the largest remainders rounded up; the sum is exact."""
    total = sum(parts)
    exact = [part / total * count for part in parts]
    counts = [int(value) for value in exact]
    left = count - sum(counts)
    if left > 0:
        order = sorted(range(len(parts)), key=lambda place: counts[place] - exact[place])
        for place in order[:left]:
            counts[place] += 1
    return counts


def _level(beliefs: Sequence[Belief], block_count: int, block_bytes: int) -> list[int]:
    starts_s = [belief.start_s for belief in beliefs]
    rates_Bps = [belief.rate_Bps for belief in beliefs]
    end_s = fill(starts_s, rates_Bps, max(1, block_count * block_bytes))
    parts = [
        max(0.0, end_s - start_s) * rate_Bps
        for start_s, rate_Bps in zip(starts_s, rates_Bps, strict=True)
    ]
    if not any(parts):
        # Too little for the precision of times.
        parts[starts_s.index(min(starts_s))] = 1.0
    return apportion(parts, block_count)


def _decision(scene: Scene, beliefs: Sequence[Belief], counts: Sequence[int], why: str) -> Decision:
    """Of the path direct, which comes first, and of relays."""
    estimate_s = 0.0
    words = []
    quotas = []
    for belief, count in zip(beliefs, counts, strict=True):
        if not count:
            continue
        size_bytes = count * scene.request.block_bytes
        end_s = belief.start_s + size_bytes / belief.rate_Bps
        estimate_s = max(estimate_s, end_s)
        name = "direct"
        if belief.relay is not None:
            name = belief.relay.node_id
            quotas.append((name, count))
        words.append(f"{count} by {name} ({_work(size_bytes, belief, end_s)})")
    return Decision(counts[0], quotas, estimate_s, f"{', '.join(words)}: {why}")


def _gain_reason(scene: Scene) -> str:
    gain = scene.inflight.gain
    if gain.splitting:
        return "to compare with what splitting brings"
    return f"splitting brought {gain.gain:.2f} of the rate of direct alone"


def _work(size_bytes: float, belief: Belief, end_s: float) -> str:
    return (
        f"{_mib(size_bytes)} behind {_mib(belief.queued_bytes)}"
        f" at {belief.rate_Bps / 1e6:.0f} MB/s, {end_s * 1e3:.1f} ms"
    )


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / _MIB:.1f} MiB"
