"""Requests played against an eviction policy, as an engine and a store would. Pure.

A request looks up its blocks. The leading run of those that are held is fetched, and touches
the policy; from the first gap on the engine computes, and puts what is missing. Blocks behind
a gap are there and of no use: they count as block hits, and not as prefix hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore_bench.simulate.workload import Workload
from kvstore_daemon.engine.policy import EvictionPolicy


@dataclass(slots=True)
class Tally:
    """What came of all requests.

    Attributes:
        blocks: Blocks asked for.
        block_hits: Those that were held.
        prefix_hits: Those that were held together with all before them in their chain.
        evictions: Blocks that went to make room.
    """

    blocks: int = 0
    block_hits: int = 0
    prefix_hits: int = 0
    evictions: int = 0

    def add(self, hits: Sequence[bool], leading: int) -> None:
        """One more request."""
        self.blocks += len(hits)
        self.block_hits += sum(hits)
        self.prefix_hits += leading

    @property
    def block_hit_rate(self) -> float:
        """Share of blocks that were held."""
        return self.block_hits / self.blocks if self.blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of blocks that an engine could use."""
        return self.prefix_hits / self.blocks if self.blocks else 0.0


def leading_hits(hits: Sequence[bool]) -> int:
    """Length of the run of hits that a request begins with."""
    return next((place for place, hit in enumerate(hits) if not hit), len(hits))


def run_policy(
    workload: Workload,
    policy: EvictionPolicy,
    capacity_bytes: int,
    tail_first: bool,
    progress: Callable[[int], None],
) -> Tally:
    """Play all requests.

    Args:
        policy: An empty one; blocks' numbers serve as slots.
        capacity_bytes: Of the cache; at least the largest block.
        tail_first: Whether the blocks of a request are inserted and touched in reverse.
        progress: Told the number of each request.
    """
    sizes, digests, tally = workload.sizes, workload.digests, Tally()
    assert capacity_bytes >= max(sizes, default=0)
    held = bytearray(workload.distinct_count)
    free_bytes = capacity_bytes
    for number, blocks in enumerate(workload.requests):
        progress(number)
        hits = [bool(held[block]) for block in blocks]
        leading = leading_hits(hits)
        tally.add(hits, leading)
        fetched = blocks[:leading]
        missing = [block for block, hit in zip(blocks, hits, strict=True) if not hit]
        for block in reversed(fetched) if tail_first else fetched:
            policy.touch(block)
        for block in reversed(missing) if tail_first else missing:
            while free_bytes < sizes[block]:
                victim = policy.evict(_anything)
                assert victim is not None
                held[victim] = 0
                free_bytes += sizes[victim]
                tally.evictions += 1
            policy.insert(block, sizes[block], digests[block])
            held[block] = 1
            free_bytes -= sizes[block]
    return tally


def _anything(slot: int) -> bool:
    return True


__all__ = ["Tally", "leading_hits", "run_policy"]
