"""The engine against a dict: whatever happens in whatever order, never a wrong byte.

The model knows which version of a block it has put and not deleted. The engine may have
forgotten any of them (it is a cache), unless it is held; but what it gives out is what the
model has. After every step a recount must agree with the engine's own books, and in the end
everything must return to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from kvstore.blocksource import Chunk, FetchStream, PutStream
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import AckLevel, FetchOutcome, Pool, PoolAction, PutOutcome
from kvstore_daemon.engine.recount import check_invariants
from tests.support.engine import Engine, Reader, content, key

PAGE = 4096
ARENA_PAGES = 24
# (pool, layers): sizes from below a page to a third of the arena, several layers, two ranks.
SPACES = [
    ("small", (100,)),
    ("small", (PAGE, 1)),
    ("large", (PAGE, PAGE, PAGE)),
    ("large", (3 * PAGE, 5 * PAGE - 7)),
]
spaces = st.integers(0, len(SPACES) - 1)
numbers = st.lists(st.integers(0, 12), min_size=1, max_size=10)
versions = st.integers(0, 1)


@dataclass
class Fetch:
    """A fetch under way, and the chunks that a transport has of it."""

    space: int
    numbers: list[int]
    stream: FetchStream
    reader: Reader
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class Put:
    """A put under way and what is left to send of it."""

    space: int
    numbers: list[int]
    version: int
    stream: PutStream
    wanted: list[int] = field(default_factory=list)
    retired: bool = False


class StoreMachine(RuleBasedStateMachine):
    """Drives an engine as servers do, several requests at a time."""

    fetches = Bundle("fetches")
    puts = Bundle("puts")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(ARENA_PAGES * PAGE)
        self.model: dict[tuple[int, int], int] = {}
        self.opened: list[bytes] = [self._open(space) for space in range(len(SPACES))]
        self.all_fetches: list[Fetch] = []
        self.all_puts: list[Put] = []
        # Blocks that a lease covers, and until when.
        self.leased: dict[int, tuple[str, float, list[tuple[int, int]]]] = {}

    def _open(self, space: int) -> bytes:
        pool, layers = SPACES[space]
        return self.engine.open(*layers, pool=pool)

    def _bytes(self, space: int, number: int, version: int) -> bytes:
        return content(key(number), sum(SPACES[space][1]), version)

    # --- puts --------------------------------------------------------------------------------

    @rule(target=puts, space=spaces, numbers=numbers, version=versions)
    def announce(self, space: int, numbers: list[int], version: int) -> Put:
        namespace = self.opened[space]
        announced = b"".join(
            self.engine.checksums(namespace, key(n), self._bytes(space, n, version))
            for n in numbers
        )
        keys = list(map(key, numbers))
        stream = self.engine.source.put(namespace, keys, announced, AckLevel.MEMORY)
        put = Put(space, numbers, version, stream)
        self.all_puts.append(put)
        return put

    @rule(put=puts, pages=st.integers(0, ARENA_PAGES))
    def reserve(self, put: Put, pages: int) -> None:
        put.wanted += put.stream.reserve(pages * PAGE)

    @rule(put=puts, damaged=st.booleans(), data=st.data())
    def receive(self, put: Put, damaged: bool, data: st.DataObject) -> None:
        if not put.wanted:
            return
        index = put.wanted.pop(data.draw(st.integers(0, len(put.wanted) - 1)))
        number = put.numbers[index]
        block = bytearray(self._bytes(put.space, number, put.version))
        if damaged:
            block[data.draw(st.integers(0, len(block) - 1))] ^= 1
        target = put.stream.target(index)
        assert target is not None
        target[:] = block
        put.stream.received(index)
        outcome = PutOutcome(put.stream.outcomes()[index])
        if damaged:
            assert outcome is PutOutcome.CORRUPT
        elif put.retired:
            assert outcome is PutOutcome.UNAVAILABLE
        elif outcome is PutOutcome.STORED:
            self.model[put.space, number] = put.version
        else:
            agrees = self.model[put.space, number] == put.version
            assert outcome is (PutOutcome.EXISTS if agrees else PutOutcome.CONFLICT)

    @rule(put=puts)
    def stop_put(self, put: Put) -> None:
        put.stream.stop(PutOutcome.TIMEOUT)
        put.wanted.clear()
        assert put.stream.finished

    # --- fetches -----------------------------------------------------------------------------

    @rule(target=fetches, space=spaces, numbers=numbers, group=st.integers(0, 2), data=st.data())
    def fetch(self, space: int, numbers: list[int], group: int, data: st.DataObject) -> Fetch:
        layers = len(SPACES[space][1])
        first = data.draw(st.integers(0, layers - 1))
        last = data.draw(st.integers(first + 1, layers))
        keys = list(map(key, numbers))
        pieces = PieceMap(Geometry(SPACES[space][1]), len(keys), first, last, group)
        namespace = self.opened[space]
        stream = self.engine.source.fetch(namespace, keys, pieces)
        fetch = Fetch(space, numbers, stream, Reader(namespace, keys, pieces))
        self.all_fetches.append(fetch)
        return fetch

    @rule(fetch=fetches, bytes_max=st.sampled_from([50, PAGE, 3 * PAGE, 1 << 20]))
    def pull(self, fetch: Fetch, bytes_max: int) -> None:
        chunk = fetch.stream.next_chunk(bytes_max)
        if chunk is None:
            assert fetch.stream.finished
        else:
            assert chunk.length <= bytes_max
            fetch.chunks.append(chunk)

    @rule(fetch=fetches)
    def sent(self, fetch: Fetch) -> None:
        """The transport lets go: until now the bytes must have stayed as they were."""
        if fetch.chunks:
            chunk = fetch.chunks.pop(0)
            fetch.reader.take(chunk)
            chunk.release()

    @rule(fetch=fetches)
    def stop_fetch(self, fetch: Fetch) -> None:
        fetch.stream.stop(FetchOutcome.TIMEOUT)
        self._finish(fetch)

    def _finish(self, fetch: Fetch) -> None:
        while fetch.chunks:
            self.sent(fetch)
        layers, pieces = SPACES[fetch.space][1], fetch.reader.pieces
        results = fetch.reader.results(fetch.stream.outcomes())
        offsets = Geometry(layers).offsets
        start, end = offsets[pieces.layer_first], offsets[pieces.layer_last]
        for number, result in zip(fetch.numbers, results, strict=True):
            if isinstance(result, bytes):
                # One version from the first byte to the last; which one, its checksums say.
                assert result in {
                    self._bytes(fetch.space, number, version)[start:end] for version in (0, 1)
                }

    @rule(space=spaces, numbers=numbers)
    def get(self, space: int, numbers: list[int]) -> None:
        """All at once: what is there is the version that the model has."""
        results = self.engine.get(self.opened[space], *numbers)
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, bytes):
                assert result == self._bytes(space, number, self.model[space, number])
            else:
                assert result is FetchOutcome.MISS

    # --- the rest ----------------------------------------------------------------------------

    @rule(space=spaces, numbers=numbers)
    def delete(self, space: int, numbers: list[int]) -> None:
        self.engine.source.delete(self.opened[space], list(map(key, numbers)))
        for number in numbers:
            self.model.pop((space, number), None)
            for _, _, blocks in self.leased.values():
                if (space, number) in blocks:
                    blocks.remove((space, number))
        assert not any(self.engine.stored(self.opened[space], *numbers))

    @rule(
        target=leases,
        space=spaces,
        numbers=numbers,
        lease_ms=st.integers(1, 5000),
        owner=st.sampled_from(["me", "you"]),
    )
    def lease(self, space: int, numbers: list[int], lease_ms: int, owner: str) -> object:
        keys = list(map(key, numbers))
        bitmap, lease = self.engine.source.lookup([self.opened[space]], keys, lease_ms, owner)
        hits = [bool(bitmap[at // 8] >> at % 8 & 1) for at in range(len(keys))]
        run = hits.index(False) if False in hits else len(hits)
        assert bool(lease) == bool(run)
        if not lease:
            return multiple()
        blocks = [(space, number) for number in numbers[:run]]
        self.leased[lease] = (owner, self.engine.now + lease_ms / 1e3, blocks)
        return lease

    @rule(lease=leases, owner=st.sampled_from(["me", "you"]))
    def release(self, lease: int, owner: str) -> None:
        held = self.engine.source.release([lease], owner) == [True]
        known = self.leased.get(lease)
        assert held == (known is not None and known[0] == owner and known[1] > self.engine.now)
        if held:
            del self.leased[lease]

    @rule(owner=st.sampled_from(["me", "you"]))
    def owner_gone(self, owner: str) -> None:
        self.engine.source.owner_gone(owner)
        self.leased = {k: v for k, v in self.leased.items() if v[0] != owner}

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.engine.now += seconds
        self.leased = {k: v for k, v in self.leased.items() if v[1] > self.engine.now}

    @rule(space=spaces)
    def retire(self, space: int) -> None:
        pool, _ = SPACES[space]
        opened = self.engine.store.pools.namespace(self.opened[space])
        request = Pool(action=PoolAction.RETIRE, pool=pool, generation=opened.generation.id)
        self.engine.source.administer_pool(request)
        self.opened[space] = self._open(space)
        self.model = {k: v for k, v in self.model.items() if k[0] != space}
        for put in self.all_puts:
            put.retired |= put.space == space
        for _, _, blocks in self.leased.values():
            blocks[:] = [block for block in blocks if block[0] != space]

    @rule(pool=st.sampled_from(["small", "large"]), pages=st.sampled_from([0, 1, 4, 12]))
    def set_capacity(self, pool: str, pages: int) -> None:
        request = Pool(action=PoolAction.SET_CAPACITY, pool=pool, capacity_bytes=pages * PAGE)
        self.engine.source.administer_pool(request)

    @rule(space=spaces, number=st.integers(0, 12))
    def corruption(self, space: int, number: int) -> None:
        """Memory goes bad, a reader reports it: the block is dropped, others are not."""
        opened = self.engine.store.pools.namespace(self.opened[space])
        slot = opened.slots.get(key(number))
        if slot is None or self.engine.store.index.pins[slot]:
            return
        self.engine.store.view(slot)[0] ^= 1
        assert self.engine.source.check(self.opened[space], [key(number)]) == b"\1"
        del self.model[space, number]

    @rule()
    def report(self) -> None:
        self.engine.source.buffer_load()

    @invariant()
    def books_agree(self) -> None:
        check_invariants(self.engine.store)

    @invariant()
    def leased_blocks_are_there(self) -> None:
        for _, ends_at, blocks in self.leased.values():
            if ends_at > self.engine.now:
                for space, number in blocks:
                    assert self.engine.stored(self.opened[space], number) == [True]

    def teardown(self) -> None:
        for put in self.all_puts:
            put.stream.stop(PutOutcome.UNAVAILABLE)
        for fetch in self.all_fetches:
            self.stop_fetch(fetch)
        self.engine.source.owner_gone("me")
        self.engine.source.owner_gone("you")
        assert not any(self.engine.store.index.pins[1:])
        for space in range(len(SPACES)):
            self.retire(space)
        for _ in range(2):
            self.engine.source.buffer_load()
        check_invariants(self.engine.store)
        assert self.engine.store.free_bytes == ARENA_PAGES * PAGE
        assert len(self.engine.store.allocator) == 1
        assert [pool.used_bytes for pool in self.engine.store.pools] == [0, 0]


# Long enough for a put, a fetch and what happens between them to come together.
StoreMachine.TestCase.settings = settings(stateful_step_count=80)
TestStore = pytest.mark.slow(StoreMachine.TestCase)
