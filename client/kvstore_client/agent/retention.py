"""What an agent keeps in its pool, for whom and until when. Pure: time is an argument.

Three kinds of *holds*, each a lease of some blocks that ends by itself::

    retained    for an engine of this node, by the name of its request, until it is claimed
    claimed     by that engine, until it gives the number back or is gone
    offered     for peers, a hold for each block

All together they keep no more than a share of the pool, so that blocks always find a way
through. Dropped blocks leave their holds: their bytes are no good, or nobody wants them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from kvstore_client.agent.memory import BlockPool, HeldBlock

# The other half of the pool is for what passes through.
HELD_SHARE_DIVISOR = 2
# Attempts at requests with something retained or claimed: several times what an engine batches.
REQUESTS_MAX = 4096
# Requests of which it is remembered which attempts are over. A straggler comes within its own
# deadline, in which a node begins fewer than this.
ENDED_REQUESTS_MAX = 16_384
# Entries of holds that were prolonged or have ended stay in the heap until their time is over,
# unless they are this many more than those that count: then the heap is made anew.
STALE_ENTRIES_MAX = 1024


class Claimed(NamedTuple):
    """What an engine has taken over.

    Attributes:
        number: Of the lease; never 0.
        blocks: Those that are here or on their way. Later ones are added by themselves.
    """

    number: int
    blocks: list[HeldBlock]


class _Hold:
    """Some blocks, until a time.

    Attributes:
        request: Name of the engine's request; "" for an offer.
        number: Of the claim; 0 until then.
        entry: Number of its entry among the ends; 0 once it has ended.
    """

    __slots__ = ("attempt", "blocks", "ends_at", "entry", "number", "owner", "request")

    def __init__(self, request: str = "", attempt: int = 0) -> None:
        self.ends_at = 0.0
        self.entry = 0
        self.request = request
        self.attempt = attempt
        self.blocks: dict[HeldBlock, None] = {}
        self.number = 0
        self.owner: object = None


class Retentions:
    """All holds on the blocks of a pool. Times are seconds of any monotonic clock.

    Takes over `pool.on_dropped`.

    Attributes:
        counters: `claims`, `claims_missed`, `retentions_refused` (that kept less than they
            should), `retentions_expired` (that nobody claimed).
    """

    def __init__(self, pool: BlockPool) -> None:
        self.counters: Counter[str] = Counter()
        self._pool = pool
        self._held_bytes_max = pool.total_bytes // HELD_SHARE_DIVISOR
        # The newest attempt at each request that holds something.
        self._requests: dict[str, _Hold] = {}
        # For each request the least attempt that may still retain, the oldest entry first.
        self._attempts: dict[str, int] = {}
        self._offers: dict[HeldBlock, _Hold] = {}
        # By number: those that are claimed.
        self._claims: dict[int, _Hold] = {}
        self._claims_of: dict[object, set[int]] = {}
        self._holders: dict[HeldBlock, dict[_Hold, None]] = {}
        # Only the newest entry of a hold counts.
        self._ends: list[tuple[float, int, _Hold]] = []
        self._live_count = 0
        self._serials = itertools.count(1)
        pool.on_dropped = self.block_dropped

    @property
    def block_count(self) -> int:
        """Blocks that are kept."""
        return len(self._holders)

    @property
    def request_count(self) -> int:
        """Requests with something retained or claimed by the newest attempt."""
        return len(self._requests)

    def has(self, request: str, attempt: int) -> bool:
        """Whether something is retained for, or claimed by, this attempt at a request."""
        hold = self._requests.get(request)
        return hold is not None and hold.attempt == attempt

    def has_room(self, size_bytes: int) -> bool:
        """Whether that much more may be kept, in whole pages (`HeldBlock.size_bytes`)."""
        return self._pool.leased_bytes + size_bytes <= self._held_bytes_max

    # --- for an engine of this node --------------------------------------------------------

    def retain(
        self, request: str, attempt: int, blocks: Iterable[HeldBlock], ends_at: float
    ) -> bool:
        """Keep blocks for the engine that will claim them, complete or not.

        The same attempt again adds blocks and prolongs; a claimed one gets the blocks, for as
        long as the claim lasts. A newer attempt ends what an older one has retained, but not
        what was claimed of it.

        Returns:
            Whether all of them are kept. If not: the attempt is over, or older than another
            one that is known, and none is; or there is room for the first of them only.
        """
        hold = self._requests.get(request)
        least = self._attempts.get(request, 0) if hold is None else hold.attempt
        if attempt < least:
            return False
        if hold is not None and hold.attempt < attempt:
            self._leave(hold)
            hold = None
        self._remember(request, attempt)
        if hold is None:
            if self._live_count - len(self._offers) >= REQUESTS_MAX:
                self.counters["retentions_refused"] += 1
                return False
            hold = self._requests[request] = self._begin(_Hold(request, attempt), ends_at)
        elif not hold.number:
            self._prolong(hold, ends_at)
        for block in blocks:
            if not self._add(hold, block):
                self.counters["retentions_refused"] += 1
                return False
        return True

    def claim(
        self, request: str, attempt: int, owner: object, lease_s: float, now: float
    ) -> Claimed | None:
        """An engine takes over what was retained for it. Claimed again by the same owner it
        gets the same number, and `lease_s` from now on.

        Returns:
            None when nothing is retained for this attempt, or it is another owner's.
        """
        hold = self._requests.get(request)
        if (
            hold is None
            or hold.attempt != attempt
            or hold.ends_at <= now
            or (hold.number and hold.owner is not owner)
        ):
            self.counters["claims_missed"] += 1
            return None
        if hold.number:
            self._prolong(hold, now + lease_s)
        else:
            self.counters["claims"] += 1
            hold.number = next(self._serials)
            hold.owner = owner
            self._claims[hold.number] = hold
            self._claims_of.setdefault(owner, set()).add(hold.number)
            self._set_end(hold, now + lease_s)
        return Claimed(hold.number, list(hold.blocks))

    def release(self, number: int, owner: object) -> bool:
        """An engine gives back what it has claimed; whether it had held until now, if
        `expire` was called before."""
        hold = self._claims.get(number)
        if hold is None or hold.owner is not owner:
            return False
        self._end(hold)
        return True

    def done(self, request: str) -> None:
        """Nobody will claim what is retained for a request; what is claimed stays."""
        hold = self._requests.get(request)
        if hold is not None and not hold.number:
            self._end(hold)

    def owner_gone(self, owner: object) -> None:
        """End all claims of an owner."""
        for number in sorted(self._claims_of.get(owner, ())):
            self._end(self._claims[number])

    # --- for peers -------------------------------------------------------------------------

    def offer(self, block: HeldBlock, ends_at: float) -> bool:
        """Keep a block for peers; offered again it is kept until the later end.

        Returns:
            False when there is no room, or the block was dropped.
        """
        hold = self._offers.get(block)
        if hold is not None:
            self._prolong(hold, ends_at)
            return True
        if block.dropped or not self._may_keep(block):
            return False
        hold = self._offers[block] = self._begin(_Hold(), ends_at)
        return self._add(hold, block)

    # --- ends ------------------------------------------------------------------------------

    @property
    def next_end(self) -> float | None:
        """When `expire` has something to do next; None while nothing is kept."""
        hold = self._first()
        return hold.ends_at if hold is not None else None

    def expire(self, now: float) -> None:
        """End the holds whose time is over."""
        while (hold := self._first()) is not None and hold.ends_at <= now:
            if hold.request and not hold.number:
                self.counters["retentions_expired"] += 1
            self._end(hold)

    def block_dropped(self, block: HeldBlock) -> None:
        """Nobody keeps a block any more. Harmless when called again."""
        offer = self._offers.pop(block, None)
        for hold in self._holders.pop(block, {}):
            del hold.blocks[block]
            self._pool.unlease(block)
        if offer is not None:
            self._end(offer)

    def check(self) -> None:
        """Assert that the books agree with each other and with the pool's."""
        holds = {*self._requests.values(), *self._claims.values(), *self._offers.values()}
        assert len(holds) == self._live_count
        entries = [(end, hold) for end, number, hold in self._ends if number == hold.entry]
        assert len(entries) == len(holds)
        assert set(entries) == {(hold.ends_at, hold) for hold in holds}
        kept = {(block, hold) for hold in holds for block in hold.blocks}
        assert kept == {(block, hold) for block, by in self._holders.items() for hold in by}
        assert all(not block.dropped for block in self._holders)
        assert all(by for by in self._holders.values())
        assert all(len(hold.blocks) == 1 for hold in self._offers.values())
        kept_bytes = sum(block.size_bytes for block in self._holders)
        assert kept_bytes <= min(self._held_bytes_max, self._pool.leased_bytes)
        for request, hold in self._requests.items():
            assert hold.request == request
            assert not hold.number or self._claims[hold.number] is hold
        owned = {(owner, number) for owner, of in self._claims_of.items() for number in of}
        assert owned == {(hold.owner, number) for number, hold in self._claims.items()}
        assert all(self._claims_of.values())

    # --- the books -------------------------------------------------------------------------

    def _begin(self, hold: _Hold, ends_at: float) -> _Hold:
        self._live_count += 1
        self._set_end(hold, ends_at)
        return hold

    def _prolong(self, hold: _Hold, ends_at: float) -> None:
        if ends_at > hold.ends_at:
            self._set_end(hold, ends_at)

    def _set_end(self, hold: _Hold, ends_at: float) -> None:
        hold.ends_at = ends_at
        hold.entry = next(self._serials)
        heapq.heappush(self._ends, (ends_at, hold.entry, hold))
        if len(self._ends) > 2 * self._live_count + STALE_ENTRIES_MAX:
            self._ends = [entry for entry in self._ends if entry[1] == entry[2].entry]
            heapq.heapify(self._ends)

    def _first(self) -> _Hold | None:
        """The hold that ends first."""
        ends = self._ends
        while ends and ends[0][1] != ends[0][2].entry:
            heapq.heappop(ends)
        return ends[0][2] if ends else None

    def _add(self, hold: _Hold, block: HeldBlock) -> bool:
        if block in hold.blocks or block.dropped:
            return True  # what was dropped meanwhile takes no room
        if not self._may_keep(block):
            return False
        hold.blocks[block] = None
        self._holders.setdefault(block, {})[hold] = None
        self._pool.lease(block)
        return True

    def _may_keep(self, block: HeldBlock) -> bool:
        return block.leases > 0 or self.has_room(block.size_bytes)

    def _leave(self, hold: _Hold) -> None:
        """A newer attempt takes the name of the request."""
        if hold.number:
            del self._requests[hold.request]
        else:
            self._end(hold)

    def _end(self, hold: _Hold) -> None:
        hold.entry = 0
        self._live_count -= 1
        if self._requests.get(hold.request) is hold:
            del self._requests[hold.request]
        if hold.number:
            # A straggler does not retain again what was claimed and given back.
            self._remember(hold.request, hold.attempt + 1)
            del self._claims[hold.number]
            numbers = self._claims_of[hold.owner]
            numbers.remove(hold.number)
            if not numbers:
                del self._claims_of[hold.owner]
        blocks, hold.blocks = hold.blocks, {}
        for block in blocks:
            if not hold.request:
                del self._offers[block]
            holders = self._holders[block]
            del holders[hold]
            if not holders:
                del self._holders[block]
        # Last, for this may wake those who wait for room.
        for block in blocks:
            self._pool.unlease(block)

    def _remember(self, request: str, attempt: int) -> None:
        """Attempts before this one are over."""
        attempt = max(attempt, self._attempts.pop(request, 0))
        self._attempts[request] = attempt
        if len(self._attempts) > ENDED_REQUESTS_MAX:
            del self._attempts[next(iter(self._attempts))]


__all__ = ["Claimed", "Retentions"]
