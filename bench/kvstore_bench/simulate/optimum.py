"""The most hits that any policy could have, by one that knows the future. Pure.

L. Belady's MIN ("A study of replacement algorithms for a virtual-storage computer", IBM
Systems Journal 5(2), 1966): the block whose next use is furthest away goes. A new block may
go at once. It is exact for the hits of blocks of one size; with several sizes the best choice
is a knapsack, and this is a good guess at it. Of blocks that are used next at the same time
the deeper in its chain goes first, which makes the most of prefixes.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence

from kvstore_bench.simulate.simulation import Tally, leading_hits
from kvstore_bench.simulate.workload import Workload

# Entries of blocks that were used meanwhile are left in the heap, up to this many more than
# those that count.
STALE_ENTRIES_MAX = 100_000


def run_optimum(
    workload: Workload,
    uses: Sequence[array[int]],
    capacity_bytes: int,
    progress: Callable[[int], None],
) -> Tally:
    """Play all requests.

    Args:
        uses: Of `next_uses`.
        progress: Told the number of each request.
    """
    sizes, tally = workload.sizes, Tally()
    # Until when a block that is held waits for its next use; -1 if it is not held.
    waits = array("q", [-1]) * workload.distinct_count
    heap: list[tuple[int, int, int]] = []
    held_bytes = held_count = 0
    for number, blocks in enumerate(workload.requests):
        progress(number)
        hits = [waits[block] >= 0 for block in blocks]
        tally.add(hits, leading_hits(hits))
        for depth, (block, use, hit) in enumerate(zip(blocks, uses[number], hits, strict=True)):
            if not hit:
                held_bytes += sizes[block]
                held_count += 1
            waits[block] = use
            heapq.heappush(heap, (-use, -depth, block))
        while held_bytes > capacity_bytes:
            use, _, block = heapq.heappop(heap)
            if waits[block] == -use:  # else it was used since: another entry is right
                waits[block] = -1
                held_bytes -= sizes[block]
                held_count -= 1
                tally.evictions += 1
        if len(heap) > 2 * held_count + STALE_ENTRIES_MAX:
            heap = [entry for entry in heap if waits[entry[2]] == -entry[0]]
            heapq.heapify(heap)
    return tally
