"""Fetches into shared memory and puts out of it, without a connection."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvstore.blocksource import Chunk
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import FetchOutcome
from kvstore.protocol import copying, strands
from kvstore.protocol.copying import CopyPuller, CopySink, copy
from kvstore.protocol.placing import Placed
from kvstore.protocol.strands import Strands, Worker
from kvstore.transfer import BlockMemory, FetchTransfer
from kvstore.wire import FrameType, Header
from tests.support.engine import key
from tests.support.frames import MIB, NAMESPACE, Guarded, Store, StoreFetch
from tests.support.workers import AtOnce, ByHand

HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT
LAYERS = (40, 24, 100)
BLOCK = sum(LAYERS)
KEYS = [key(number) for number in range(6)]


def _told(index: int, number: int) -> None:
    """Nobody asks."""


@pytest.fixture
def store() -> Store:
    return Store(*LAYERS)


class Fetching:
    """A sink, the memory that it writes into, and a reader who takes its news.

    Attributes:
        news: All that was told.
        arrived, failed: What the reader made of it.
        worker: What copies; everything is copied at once if not said otherwise.
    """

    def __init__(
        self,
        store: Store,
        pieces: PieceMap,
        keys: Sequence[bytes],
        layered: bool = False,
        worker: Worker | None = None,
    ) -> None:
        self.worker = worker or AtOnce()
        self.strands = Strands(self.worker)
        self.store, self.pieces, self.keys = store, pieces, keys
        sizes = list(pieces.geometry.layer_bytes[pieces.layer_first : pieces.layer_last])
        self.guards = [[Guarded(n) for n in (sizes if layered else [sum(sizes)])] for _ in keys]
        memory: list[BlockMemory] = [
            [guard.view for guard in guards] if layered else guards[0].view
            for guards in self.guards
        ]
        self.news: list[Placed] = []
        self.arrived: list[tuple[int, int]] = []
        self.failed: list[tuple[int, int]] = []
        self.reader = FetchTransfer(
            NAMESPACE,
            keys,
            pieces,
            memory,
            lambda index, group: self.arrived.append((index, group)),
            lambda index, outcome: self.failed.append((index, outcome)),
        )
        self.sink = CopySink(NAMESPACE, keys, pieces, memory, self.strands)
        self.sink.on_news = self.news.append

    def run(self) -> None:
        """Bring everything, tell everything."""
        stream = StoreFetch(self.store, self.keys, self.pieces)
        while (chunk := stream.next_chunk(MIB)) is not None:
            assert self.sink.accepts
            self.sink.take(chunk)
            assert self.sink.idle
            assert not self.store.lent  # it is in the reader's memory, and nowhere else
        self.sink.flush()
        self.read()

    def read(self) -> None:
        """Take the news as a client does."""
        for piece, offset, length, data, verified in self.news:
            header = Header(FrameType.DATA, 0, 0, 0, length, piece, offset, 0)
            self.reader.placed(header, data.checksums, data.failed, data.corrupt, verified)

    def block(self, index: int) -> bytes:
        """What lies in the memory of a block."""
        return b"".join(guard.view for guard in self.guards[index])

    def expected(self, index: int) -> bytes:
        """What belongs there."""
        offsets = self.pieces.geometry.offsets
        whole = self.store.block(self.keys[index])
        return whole[offsets[self.pieces.layer_first] : offsets[self.pieces.layer_last]]

    def check(self, outcomes: Sequence[FetchOutcome]) -> None:
        """Whether all is as it should be."""
        assert all(guard.intact for guards in self.guards for guard in guards)
        told = [outcome if outcome != 255 else HIT for outcome in self.reader.outcomes]
        assert told == list(outcomes)
        for index, outcome in enumerate(outcomes):
            if outcome is HIT:
                assert self.block(index) == self.expected(index)


@pytest.mark.parametrize("chunk", [1, 41, 64, 200, MIB])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize(
    ("layers", "group"), [((0, 3), 0), ((0, 3), 1), ((0, 3), 2), ((1, 3), 1), ((2, 3), 0)]
)
def test_a_fetch(
    store: Store, layers: tuple[int, int], group: int, layered: bool, chunk: int
) -> None:
    store.fill(KEYS[0], KEYS[2], KEYS[3], KEYS[5])
    store.chunk_bytes = chunk
    call = Fetching(store, PieceMap(store.geometry, 6, *layers, group), KEYS, layered)
    call.run()
    call.check([HIT, MISS, HIT, HIT, MISS, HIT])
    assert call.failed == [(1, MISS), (4, MISS)]
    assert len(call.arrived) == 4 * call.pieces.group_count
    assert all(news.verified for news in call.news)
    assert sum(news.length for news in call.news) == 4 * call.pieces.span_bytes


@pytest.mark.parametrize("chunk", [1, 50, 300, MIB])
@pytest.mark.parametrize("group", [0, 1])
def test_what_does_not_match_is_told_as_corrupt(store: Store, group: int, chunk: int) -> None:
    store.fill(*KEYS)
    store.damaged = {KEYS[1], KEYS[5]}
    store.chunk_bytes = chunk
    call = Fetching(store, PieceMap(store.geometry, 6, 0, 3, group), KEYS)
    call.run()
    call.check([HIT, CORRUPT, HIT, HIT, HIT, CORRUPT])
    assert call.failed == [(1, CORRUPT), (5, CORRUPT)]
    assert sorted(index for news in call.news for index in news.data.corrupt) == [1, 5]


def test_a_block_that_was_corrupt_is_not_written_any_more(store: Store) -> None:
    store.fill(KEYS[0])
    call = Fetching(store, PieceMap(store.geometry, 1, 0, 3, 1), KEYS[:1])
    stream = StoreFetch(store, KEYS[:1], call.pieces)
    store.chunk_bytes = 40
    chunk = stream.next_chunk(MIB)
    assert chunk is not None
    call.sink.take(chunk._replace(buffers=[memoryview(bytes(40))]))
    while (chunk := stream.next_chunk(MIB)) is not None:
        call.sink.take(chunk)
    call.sink.flush()
    call.read()
    assert call.block(0) == bytes(BLOCK)
    assert call.failed == [(0, CORRUPT)]


def test_news_of_consecutive_bytes_go_together(store: Store) -> None:
    store.fill(*KEYS)
    store.chunk_bytes = 10
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.run()
    assert [news[:3] for news in call.news] == [(0, 0, 6 * BLOCK)]
    assert call.news[0].data.checksums == b"".join(map(store.checksums, KEYS))


def test_news_of_other_places_go_apart(store: Store) -> None:
    store.fill(*KEYS[:2], *KEYS[3:])
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.run()
    assert [news[:3] for news in call.news] == [(0, 0, 2 * BLOCK), (3, 0, 3 * BLOCK)]
    assert sorted(index for news in call.news for index in news.data.failed) == [2]


def test_misses_alone_are_news_too(store: Store) -> None:
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.run()
    assert call.failed == [(index, MISS) for index in range(6)]
    assert sum(news.length for news in call.news) == 0


def test_nothing_new_is_no_news(store: Store) -> None:
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.sink.flush()
    call.run()
    count = len(call.news)
    call.sink.flush()
    assert len(call.news) == count


@pytest.mark.parametrize("limit", ["NEWS_BYTES_MAX", "NEWS_CHECKSUM_BYTES_MAX"])
def test_news_are_not_kept_back_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(copying, limit, 2 * (BLOCK if limit == "NEWS_BYTES_MAX" else 24))
    store.fill(*KEYS)
    store.chunk_bytes = BLOCK
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.run()
    assert [news[:3] for news in call.news] == [(n, 0, 2 * BLOCK) for n in (0, 2, 4)]
    call.check([HIT] * 6)


@pytest.mark.parametrize("slice_bytes", [1, 7, 40, 64])
@pytest.mark.parametrize("chunk", [1, 41, 300, MIB])
@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("layered", [False, True])
def test_layers_are_verified_in_slices(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    slice_bytes: int,
    chunk: int,
    group: int,
    layered: bool,
) -> None:
    monkeypatch.setattr(copying, "SLICE_BYTES", slice_bytes)
    store.fill(*KEYS)
    store.damaged = {KEYS[1], KEYS[5]}
    store.chunk_bytes = chunk
    call = Fetching(store, PieceMap(store.geometry, 6, 0, 3, group), KEYS, layered)
    call.run()
    call.check([HIT, CORRUPT, HIT, HIT, HIT, CORRUPT])
    transfer = call.sink._transfer
    assert {index for index in transfer._digests if index not in (1, 5)} == set()
    assert not transfer._hashers


def test_chunk_is_released_also_when_it_cannot_be_copied(store: Store) -> None:
    released: list[bool] = []
    call = Fetching(store, PieceMap(store.geometry, 1), KEYS[:1])
    short = Chunk(0, 0, [memoryview(bytes(3))], BLOCK, b"", lambda: released.append(True))
    call.sink.take(short)
    assert isinstance(call.sink.failure, IndexError)
    assert (released, call.news) == ([True], [])


def test_reader_touches_no_memory_for_news_of_what_was_verified(store: Store) -> None:
    store.fill(*KEYS)
    call = Fetching(store, PieceMap(store.geometry, 6, 0, 3, 1), KEYS)
    call.run()
    outcomes = bytes(call.reader.outcomes)
    nowhere: list[BlockMemory] = []
    call.reader = FetchTransfer(NAMESPACE, KEYS, call.pieces, nowhere, _told, _told)
    call.read()
    assert bytes(call.reader.outcomes) == outcomes == bytes(6)


def test_groups_of_layers_take_no_more_memory_than_one(store: Store) -> None:
    keys = [key(number) for number in range(1000)]
    memory = [memoryview(bytearray(BLOCK))] * len(keys)
    held_bytes = []
    for group in (0, 1):
        pieces = PieceMap(Geometry((1,) * BLOCK), len(keys), 0, BLOCK, group)
        tracemalloc.start()
        try:
            sink = CopySink(NAMESPACE, keys, pieces, memory, Strands(AtOnce()))
            held_bytes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        sink.close()
    assert held_bytes[1] < held_bytes[0] + len(keys)


def test_closed_sink_tells_nothing(store: Store) -> None:
    store.fill(*KEYS)
    call = Fetching(store, PieceMap(store.geometry, 6), KEYS)
    call.sink.close()
    call.run()
    assert call.news == []


# --- puts ----------------------------------------------------------------------------------


def test_blocks_of_a_put_come_in_the_order_in_which_they_were_asked_for() -> None:
    blocks = [memoryview(bytes([number]) * BLOCK) for number in range(4)]
    worker = ByHand()
    puller = CopyPuller(blocks, Strands(worker))
    pulled: list[int] = []
    puller.on_pulled = pulled.append
    targets = [memoryview(bytearray(BLOCK)) for _ in blocks]
    assert puller.idle
    for index in (2, 0, 3, 1):
        puller.pull(index, targets[index])
    assert not puller.idle
    worker.work()
    assert pulled == []  # nobody has told the loop
    worker.tell()
    assert pulled == [2]
    worker.finish()
    assert pulled == [2, 0, 3, 1]
    assert puller.idle
    assert [bytes(target) for target in targets] == [bytes(block) for block in blocks]


def test_stopped_puller_is_idle_when_what_was_begun_has_ended() -> None:
    worker = ByHand()
    puller = CopyPuller([memoryview(bytes(BLOCK))] * 3, Strands(worker))
    targets = [memoryview(bytearray(b"x" * BLOCK)) for _ in range(3)]
    pulled: list[int] = []
    ready: list[bool] = []
    puller.on_pulled = pulled.append
    puller.on_ready = lambda: ready.append(puller.idle)
    for index in range(3):
        puller.pull(index, targets[index])
    worker.work()
    puller.stop()
    assert not puller.idle  # for all that the loop knows
    worker.finish()
    assert puller.idle
    assert ready[-1]
    assert pulled == []
    assert [bytes(target) for target in targets[1:]] == [b"x" * BLOCK] * 2
    puller.stop()


def test_layers_of_a_put_are_put_together(store: Store) -> None:
    data = memoryview(store.block(KEYS[0]))
    layers = [data[a:b] for a, b in pairwise(store.geometry.offsets)]
    puller = CopyPuller([layers], Strands(AtOnce()))
    target = memoryview(bytearray(BLOCK))
    puller.pull(0, target)
    assert target == data


def test_put_out_of_memory_that_cannot_be_read_fails() -> None:
    puller = CopyPuller([memoryview(bytes(BLOCK - 1))], Strands(AtOnce()))
    ready: list[bool] = []
    puller.on_ready = lambda: ready.append(True)
    puller.pull(0, memoryview(bytearray(BLOCK)))
    assert puller.failure is not None
    assert (ready, puller.idle) == ([True], True)


# --- beside the loop -----------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is too large to be copied at once, or all of it together."""
    monkeypatch.setattr(copying, "HERE_BYTES_MAX", 0)
    monkeypatch.setattr(strands, "PARTS_MAX", 2)


def give(call: Fetching, count: int) -> None:
    """Give a sink so many chunks of one block."""
    call.store.chunk_bytes = BLOCK
    stream = StoreFetch(call.store, call.keys, call.pieces)
    for _ in range(count):
        chunk = stream.next_chunk(MIB)
        assert chunk is not None
        call.sink.take(chunk)


@pytest.fixture
def call(store: Store, large: None) -> Fetching:
    store.fill(*KEYS)
    return Fetching(store, PieceMap(store.geometry, 6), KEYS, worker=ByHand())


def test_sink_takes_what_the_worker_is_busy_with_and_one_more(call: Fetching) -> None:
    worker = call.worker
    assert isinstance(worker, ByHand)
    ready: list[int] = []
    call.strands.on_ready = lambda: ready.append(call.strands.count)
    give(call, 2)
    assert not call.sink.accepts
    assert call.store.lent
    worker.work()
    assert not call.sink.accepts
    worker.tell()
    assert ready == [1]
    assert call.sink.accepts
    worker.finish()
    assert call.sink.idle
    assert not call.store.lent
    assert ready == [1]  # nobody was refused since


def test_news_wait_for_the_last_part_that_is_under_way(call: Fetching) -> None:
    worker = call.worker
    assert isinstance(worker, ByHand)
    give(call, 2)
    call.sink.flush()
    worker.work()
    worker.tell()
    assert call.news == []
    worker.finish()
    assert [news.length for news in call.news] == [2 * BLOCK]
    call.read()
    assert [call.block(index) for index in range(2)] == [call.expected(index) for index in range(2)]


def test_closed_sink_gives_back_what_nobody_has_begun(call: Fetching) -> None:
    worker = call.worker
    assert isinstance(worker, ByHand)
    idle: list[bool] = []
    give(call, 2)
    worker.work()  # and nobody has told of it
    call.sink.close()
    call.strands.when_idle(lambda: idle.append(call.sink.idle))
    assert call.store.lent == 1
    assert idle == []
    worker.finish()
    assert (call.store.lent, idle, call.news) == (0, [True], [])
    assert call.block(1) == bytes(BLOCK)


def test_sink_that_has_failed_tells_nothing_more(call: Fetching) -> None:
    worker = call.worker
    assert isinstance(worker, ByHand)
    memory = call.sink._transfer.memory
    call.sink._transfer.memory = [memory[0], memoryview(bytes(BLOCK)), *memory[2:]]
    give(call, 3)
    call.sink.flush()
    worker.finish()
    assert call.sink.failure is not None
    assert sum(news.length for news in call.news) <= BLOCK
    assert (call.store.lent, call.sink.idle) == (0, True)


def test_sink_whose_memory_cannot_be_written_fails(call: Fetching) -> None:
    worker = call.worker
    assert isinstance(worker, ByHand)
    ready: list[bool] = []
    call.sink.on_ready = lambda: ready.append(True)
    call.sink._transfer.memory = [memoryview(bytes(BLOCK))] * 6  # not to be written
    give(call, 1)
    worker.finish()
    assert isinstance(call.sink.failure, Exception)
    assert ready
    assert (call.store.lent, call.sink.idle, call.news) == (0, True, [])


@given(st.binary(max_size=60), st.data())
def test_copy_keeps_the_order_wherever_both_sides_are_cut(
    data: bytes, draws: st.DataObject
) -> None:
    def parts(whole: memoryview) -> list[memoryview]:
        cuts = sorted(draws.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
        return [whole[a:b] for a, b in pairwise([0, *cuts, len(whole)])]

    target = memoryview(bytearray(len(data)))
    sources = parts(memoryview(data))
    copy(sources, parts(target))
    assert target == data
    assert b"".join(sources) == data


def test_blocks_of_many_chunks(store: Store) -> None:
    large = Store(MIB, 700_000, MIB + 1)
    large.fill(KEYS[0], KEYS[2])
    call = Fetching(large, PieceMap(Geometry((MIB, 700_000, MIB + 1)), 3, 0, 3, 2), KEYS[:3], True)
    call.run()
    call.check([HIT, MISS, HIT])
