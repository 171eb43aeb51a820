"""The default eviction policy: order, the guard against scans, pins, and its books."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, strategies as st

from kvstore_bench.simulate.policies import Lru
from kvstore_daemon.engine.eviction import MAIN_PARTS, WINDOW_PARTS, Ghosts, GuardedLru
from kvstore_daemon.engine.policy import CANDIDATES_MAX, EvictionPolicy, Fifo
from kvstore_daemon.source import ArenaSource

BLOCK = 4096


def anything(slot: int) -> bool:
    return True


def nothing(slot: int) -> bool:
    return False


def policy() -> GuardedLru:
    return GuardedLru(0, itertools.count())


class Cache:
    """Numbered blocks in a policy of `capacity` blocks of one size: slots come and go."""

    def __init__(
        self, capacity: int, make: Callable[[int, Iterable[int]], EvictionPolicy] = GuardedLru
    ) -> None:
        self.policy = make(capacity * BLOCK, itertools.count())
        self.slots: dict[int, int] = {}
        self.blocks: dict[int, int] = {}
        self.free = list(range(1, capacity + 1))
        self.evicted: list[int] = []

    def use(self, number: int) -> bool:
        """Read a block, or put it when it is missing; whether it was there."""
        slot = self.slots.get(number)
        if slot is not None:
            self.policy.touch(slot)
            return True
        if not self.free:
            victim = self.policy.evict(anything)
            assert victim is not None
            self.evicted.append(self.blocks.pop(victim))
            del self.slots[self.evicted[-1]]
            self.free.append(victim)
        slot = self.free.pop()
        self.policy.insert(slot, BLOCK, number * 0x9E3779B97F4A7C15 % 2**64)
        self.slots[number] = slot
        self.blocks[slot] = number
        return False


def evict_all(queue: EvictionPolicy) -> list[int]:
    victims = []
    while (victim := queue.evict(anything)) is not None:
        victims.append(victim)
    return victims


# --- order -------------------------------------------------------------------------------------


def test_what_was_never_read_goes_in_the_order_of_insertion() -> None:
    queue = policy()
    for slot in (3, 1, 2):
        queue.insert(slot, BLOCK, slot)
    assert evict_all(queue) == [3, 1, 2]
    assert len(queue) == 0


def test_what_was_read_goes_in_the_order_of_reading() -> None:
    queue = policy()
    for slot in (1, 2, 3):
        queue.insert(slot, BLOCK, slot)
    for slot in (2, 3, 1, 2):
        queue.touch(slot)
    assert evict_all(queue) == [3, 1, 2]


def test_as_long_as_the_window_is_small_the_older_of_both_lists_goes() -> None:
    queue = policy()
    for slot in range(1, 11):
        queue.insert(slot, BLOCK, slot)
    for slot in range(1, 9):
        queue.touch(slot)
    queue.insert(11, BLOCK, 11)
    # Main: 1 to 8. Window: 9 and 10, never read and older, and 11, newer than all.
    assert [queue.evict(anything) for _ in range(4)] == [9, 10, 1, 2]


def test_a_window_above_its_share_gives_first_though_it_is_newer() -> None:
    queue = policy()
    queue.insert(1, 2 * BLOCK, 1)
    queue.touch(1)
    for slot in (2, 3, 4, 5):
        queue.insert(slot, BLOCK, slot)
    # By bytes: 4 blocks against 2 is more than three to two, 3 against 2 is not.
    assert queue.evict(anything) == 2
    assert queue.evict(anything) == 1


def test_the_tail_of_a_chain_goes_before_its_head() -> None:
    # The store inserts and touches in reverse order of the chain.
    queue = policy()
    chains = {first: list(range(first, first + 10)) for first in (10, 20, 30)}
    for chain in chains.values():
        for slot in reversed(chain):
            queue.insert(slot, BLOCK, slot)
    for slot in reversed(chains[20]):
        queue.touch(slot)
    victims = evict_all(queue)
    for chain in chains.values():
        assert [slot for slot in victims if slot in chain] == chain[::-1]


def test_slots_are_used_again() -> None:
    queue = policy()
    queue.insert(7, BLOCK, 1)
    queue.touch(7)
    queue.remove(7)
    queue.insert(7, BLOCK, 2)
    queue.insert(8, BLOCK, 3)
    assert evict_all(queue) == [7, 8]


def test_the_tick_is_that_of_the_next_candidate() -> None:
    ticks = itertools.count(100)
    queue = GuardedLru(0, ticks)
    queue.insert(1, BLOCK, 1)
    assert queue.next_tick() == 100
    queue.insert(2, BLOCK, 2)
    queue.touch(1)
    assert queue.next_tick() == 101  # 2 is older and in the window
    queue.touch(2)
    assert queue.next_tick() == 102
    assert queue.evict(anything) == 1
    assert queue.next_tick() == 103


# --- scans -------------------------------------------------------------------------------------


def kept_after_scan(make: Callable[[int, Iterable[int]], EvictionPolicy]) -> int:
    """Of a hot set of a third of the cache, how many blocks a scan of ten caches leaves."""
    capacity, hot = 300, range(100)
    cache = Cache(capacity, make)
    for _ in range(3):
        for number in hot:
            cache.use(number)
    for number in range(1000, 1000 + 10 * capacity):
        assert not cache.use(number)
    return sum(number in cache.slots for number in hot)


def test_a_scan_of_ten_caches_leaves_the_hot_set() -> None:
    assert kept_after_scan(GuardedLru) == 100


@pytest.mark.parametrize("make", [Fifo, Lru])
def test_others_lose_the_hot_set(make: Callable[[int, Iterable[int]], EvictionPolicy]) -> None:
    # The scenario above is one that a policy can fail.
    assert kept_after_scan(make) == 0


def test_a_hot_set_larger_than_its_share_keeps_the_share() -> None:
    cache = Cache(300)
    for _ in range(2):
        for number in range(300):
            cache.use(number)
    for number in range(1000, 9000):
        cache.use(number)
    kept = sum(number in cache.slots for number in range(300))
    assert abs(kept - 300 * MAIN_PARTS // (MAIN_PARTS + WINDOW_PARTS)) <= 1


def test_a_hot_set_that_is_read_during_the_scan_never_misses() -> None:
    cache = Cache(300)
    hot = itertools.cycle(range(100))
    for _ in range(200):
        cache.use(next(hot))
    for number in range(1000, 4000):
        cache.use(number)
        assert cache.use(next(hot))


def test_another_hot_set_takes_over() -> None:
    # It is larger than the window: without ghosts it would never get in.
    cache = Cache(300)
    for _ in range(3):
        for number in range(300):
            cache.use(number)
    for _ in range(8):
        for number in range(1000, 1270):
            cache.use(number)
    assert sum(cache.use(number) for number in range(1000, 1270)) == 270


# --- pins --------------------------------------------------------------------------------------


def test_pinned_blocks_are_passed_over_and_come_again() -> None:
    queue = policy()
    for slot in (1, 2, 3, 4):
        queue.insert(slot, BLOCK, slot)
    assert queue.evict(lambda slot: slot not in (1, 2)) == 3
    # Those that were passed over stand behind the rest, in their order.
    assert evict_all(queue) == [4, 1, 2]


def test_where_one_list_is_pinned_the_other_gives() -> None:
    queue = policy()
    for slot in range(1, 21):
        queue.insert(slot, BLOCK, slot)
    queue.touch(5)
    window = set(range(1, 21)) - {5}
    assert queue.evict(lambda slot: slot not in window) == 5
    assert queue.evict(lambda slot: slot == 20) == 20


def test_where_all_is_pinned_nothing_goes_and_nothing_is_lost() -> None:
    queue = policy()
    for slot in range(1, 21):
        queue.insert(slot, BLOCK, slot)
        if slot % 2:
            queue.touch(slot)
    assert queue.evict(nothing) is None
    assert len(queue) == 20
    assert sorted(evict_all(queue)) == list(range(1, 21))


def test_an_empty_policy_gives_nothing() -> None:
    assert policy().evict(anything) is None


def test_the_work_of_one_eviction_is_bounded() -> None:
    queue = policy()
    count = CANDIDATES_MAX + 100
    for slot in range(1, count + 1):
        queue.insert(slot, BLOCK, slot)
    seen: list[int] = []

    def only_the_last(slot: int) -> bool:
        seen.append(slot)
        return slot == count

    assert queue.evict(only_the_last) is None
    assert len(seen) == CANDIDATES_MAX
    # The next call goes on where this one stopped, so that many pins never block for ever.
    assert queue.evict(only_the_last) == count
    assert len(seen) == CANDIDATES_MAX + 100


# --- ghosts ------------------------------------------------------------------------------------


def test_a_block_that_was_let_go_lately_comes_back_as_one_that_was_read() -> None:
    cache = Cache(10)
    for number in range(13):
        cache.use(number)
    assert cache.evicted == [0, 1, 2]
    cache.use(2)
    for number in range(100, 200):
        cache.use(number)
    assert 2 in cache.slots


def test_a_block_that_was_let_go_long_ago_is_new() -> None:
    cache = Cache(10)
    for number in range(30):
        cache.use(number)
    cache.use(2)
    for number in range(100, 200):
        cache.use(number)
    assert 2 not in cache.slots


def test_ghosts_reach_as_far_as_they_say() -> None:
    ghosts = Ghosts()
    for digest in range(1, 11):
        ghosts.remember(digest)
    assert not ghosts.recall(7, reach=3)
    assert ghosts.recall(8, reach=3)
    assert not ghosts.recall(8, reach=3), "a ghost is called once"


def test_most_ghosts_of_a_full_table_are_known_and_few_others() -> None:
    draws = random.Random(7)
    digests = [draws.getrandbits(64) for _ in range(4096)]
    strangers = [draws.getrandbits(64) for _ in range(4096)]
    ghosts = Ghosts()
    ghosts.fit(len(digests))
    for digest in [*range(1 << 20, (1 << 20) + 20_000), *digests]:
        ghosts.remember(digest)
    assert sum(ghosts.recall(digest, 4096) for digest in strangers) < 10
    known = [ghosts.recall(digest, 4096) for digest in digests]
    assert sum(known) > 0.97 * len(known)
    assert all(known[-1024:]), "the youngest are the surest"


def test_the_table_of_ghosts_is_bounded_by_the_blocks_that_are_held() -> None:
    cache = Cache(1000)
    for number in range(20_000):
        cache.use(number)
    ghosts = cache.policy._ghosts  # type: ignore[attr-defined]
    assert len(ghosts._marks) == len(ghosts._times) == 1024


# --- books -------------------------------------------------------------------------------------


class Model:
    """The same policy by the book: two lists, all candidates pinned or not; no ghosts."""

    def __init__(self) -> None:
        self.window: dict[int, int] = {}
        self.main: dict[int, int] = {}

    def insert(self, slot: int, size: int) -> None:
        self.window[slot] = size

    def touch(self, slot: int) -> None:
        size = self.window.pop(slot, None) or self.main.pop(slot)
        self.main[slot] = size

    def remove(self, slot: int) -> None:
        (self.window if slot in self.window else self.main).pop(slot)

    def first(self) -> set[int]:
        """The slots of which one is the next candidate: the oldest of each list."""
        oldest = {next(iter(queue)) for queue in (self.window, self.main) if queue}
        above = sum(self.window.values()) * MAIN_PARTS > sum(self.main.values()) * WINDOW_PARTS
        return {next(iter(self.window))} if self.window and above else oldest


steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "touch", "remove", "evict", "pinned"]),
        st.integers(1, 12),
        st.integers(1, 5),
    ),
    max_size=120,
)


@given(steps)
def test_it_agrees_with_two_lists_kept_by_the_book(steps: list[tuple[str, int, int]]) -> None:
    queue, model = policy(), Model()
    for number, (step, slot, size) in enumerate(steps):
        known = slot in model.window or slot in model.main
        match step:
            case "insert" if not known:
                queue.insert(slot, size, number + 1)  # every digest is new
                model.insert(slot, size)
            case "touch" if known:
                queue.touch(slot)
                model.touch(slot)
            case "remove" if known:
                queue.remove(slot)
                model.remove(slot)
            case "evict":
                victim = queue.evict(anything)
                if victim is None:
                    assert not model.window
                    assert not model.main
                else:
                    assert victim in model.first()
                    model.remove(victim)
            case "pinned":
                # Every other slot is pinned. What may go does, whatever the order.
                free = {s for s in (*model.window, *model.main) if s % 2}
                victim = queue.evict(lambda slot: bool(slot % 2))
                assert (victim is None) == (not free)
                if victim is not None:
                    assert victim in free
                    model.remove(victim)
                _reorder(model, queue)
        assert len(queue) == len(model.window) + len(model.main)


def _reorder(model: Model, queue: GuardedLru) -> None:
    """Candidates that were passed over moved: take the order over, and check the members."""
    for segment, known in ((0, model.window), (1, model.main)):
        order = []
        node = queue._newer[segment]
        while node != segment:
            order.append(node - 2)
            node = queue._newer[node]
        assert sorted(order) == sorted(known)
        sizes = dict(known)
        known.clear()
        known.update((slot, sizes[slot]) for slot in order)


@pytest.mark.parametrize("make", [GuardedLru, Fifo])
def test_policies_keep_what_was_not_evicted(
    make: Callable[[int, Iterable[int]], EvictionPolicy],
) -> None:
    draws = random.Random(11)
    cache = Cache(50, make)
    for _ in range(2000):
        cache.use(draws.randrange(80))
        assert len(cache.policy) == len(cache.slots)
    assert sorted(evict_all(cache.policy)) == sorted(cache.slots.values())


def test_it_is_what_the_daemon_uses() -> None:
    source = ArenaSource(memoryview(bytearray(BLOCK)))
    source.store.pools.configure("pool")
    assert isinstance(source.store.pools.pool("pool").policy, GuardedLru)
