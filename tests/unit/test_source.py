"""The engine as a block source: lookups, fetches, puts, leases, checks."""

from __future__ import annotations

import tracemalloc

import pytest

from kvstore.blocksource import CHECKSUM_BYTES_PER_CHUNK_MAX, Chunk, FetchStream, PutStream
from kvstore.errors import (
    LayoutMismatch,
    LocalProtocolError,
    RefusedError,
    UnknownNamespace,
    Unsupported,
)
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import AckLevel, FetchOutcome, Pool, PoolAction, PutOutcome, Tier
from kvstore_daemon import source, streams
from kvstore_daemon.engine.recount import check_invariants
from tests.support.engine import Engine, Reader, content, key, layout

PAGE = 4096
MIB = 1024 * 1024
HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS
STORED = PutOutcome.STORED


@pytest.fixture
def engine() -> Engine:
    return Engine(16 * PAGE)


@pytest.mark.parametrize("group", [0, 1000])
def test_checksums_of_tiny_layers_fit_into_a_frame(group: int) -> None:
    # Eight bytes of checksum for each byte of payload.
    engine = Engine(200 * PAGE)
    namespace = engine.open(*(1,) * 1024)
    engine.put(namespace, *range(150))
    stream, reader = begin_fetch(engine, namespace, *range(150), group=group)
    while (chunk := stream.next_chunk(MIB)) is not None:
        assert len(chunk.checksums) <= CHECKSUM_BYTES_PER_CHUNK_MAX
        reader.take(chunk)
        chunk.release()
    assert all(isinstance(result, bytes) for result in reader.results(stream.outcomes()))
    assert not any(engine.store.index.pins[1:])


def begin_fetch(
    engine: Engine, namespace: bytes, *numbers: int, group: int = 0
) -> tuple[FetchStream, Reader]:
    keys = list(map(key, numbers))
    pieces = PieceMap(Geometry(engine.layers[namespace]), len(keys), group_layers=group)
    return engine.source.fetch(namespace, keys, pieces), Reader(namespace, keys, pieces)


def begin_put(engine: Engine, namespace: bytes, *numbers: int, version: int = 0) -> PutStream:
    size = sum(engine.layers[namespace])
    announced = b"".join(
        engine.checksums(namespace, key(number), content(key(number), size, version))
        for number in numbers
    )
    return engine.source.put(namespace, list(map(key, numbers)), announced, AckLevel.MEMORY)


def send(stream: PutStream, index: int, number: int, version: int = 0) -> None:
    target = stream.target(index)
    assert target is not None
    target[:] = content(key(number), len(target), version)
    stream.received(index)


def chunk_of(stream: FetchStream, bytes_max: int = MIB) -> Chunk:
    chunk = stream.next_chunk(bytes_max)
    assert chunk is not None
    return chunk


# --- fetches -------------------------------------------------------------------------------


def test_what_was_put_is_fetched(engine: Engine) -> None:
    namespace = engine.open(1000, 3000, 96)
    assert engine.put(namespace, 1, 2, 3) == [STORED] * 3
    assert engine.get(namespace, 3, 9, 1) == [content(key(3), PAGE), MISS, content(key(1), PAGE)]
    check_invariants(engine.store)


@pytest.mark.parametrize("group", [0, 1, 2, 3])
@pytest.mark.parametrize("layers", [(0, 4), (0, 1), (1, 3), (3, 4)])
def test_any_layers_in_any_order(engine: Engine, layers: tuple[int, int], group: int) -> None:
    sizes = (100, 2000, 7, 333)
    namespace = engine.open(*sizes)
    engine.put(namespace, 1, 2, 3)
    start, end = sum(sizes[: layers[0]]), sum(sizes[: layers[1]])
    whole = {number: content(key(number), sum(sizes)) for number in (1, 2, 3)}
    assert engine.get(namespace, 1, 7, 2, 3, 3, layers=layers, group=group) == [
        whole[1][start:end],
        MISS,
        *(whole[number][start:end] for number in (2, 3, 3)),
    ]


@pytest.mark.parametrize("bytes_max", [1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, MIB])
@pytest.mark.parametrize("group", [0, 1])
def test_chunks_keep_to_their_size(engine: Engine, bytes_max: int, group: int) -> None:
    namespace = engine.open(1024, 3072)
    engine.put(namespace, 1, 2, 4)
    stream, reader = begin_fetch(engine, namespace, 1, 2, 3, 4, group=group)
    assert stream.queued_bytes == 4 * PAGE
    while (chunk := stream.next_chunk(bytes_max)) is not None:
        assert 0 < chunk.length <= bytes_max
        reader.take(chunk)
        chunk.release()
    assert (stream.finished, stream.queued_bytes) == (True, 0)
    assert reader.results(stream.outcomes()) == [
        content(key(1), PAGE),
        content(key(2), PAGE),
        MISS,
        content(key(4), PAGE),
    ]
    assert stream.tiers() == bytes([Tier.ARENA, Tier.ARENA, Tier.NONE, Tier.ARENA])
    assert not any(engine.store.index.pins[1:])


def test_consecutive_blocks_share_a_chunk_and_misses_break_the_run(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2, 5)
    stream, _ = begin_fetch(engine, namespace, 0, 1, 2, 3, 4, 5, 6)
    first = chunk_of(stream)
    assert (first.piece, len(first.buffers), len(first.checksums)) == (1, 2, 16)
    second = chunk_of(stream)
    assert (second.piece, len(second.buffers)) == (5, 1)
    assert (first.failed, second.failed) == ((0, 3), (4, 6))
    assert stream.next_chunk(MIB) is None
    assert stream.outcomes() == bytes([MISS, HIT, HIT, MISS, MISS, HIT, MISS])


def test_a_chunk_has_no_more_buffers_than_a_system_call_takes() -> None:
    engine = Engine(600 * PAGE)
    namespace = engine.open(16)
    engine.put(namespace, *range(600))
    for group in (0, 1):
        stream, _ = begin_fetch(engine, namespace, *range(600), group=group)
        assert [len(chunk_of(stream).buffers) for _ in range(2)] == [512, 88]
        assert stream.finished


def test_news_of_missing_blocks_does_not_wait_for_a_later_hit_of_another_group(
    engine: Engine,
) -> None:
    namespace = engine.open(16, 16)
    engine.put(namespace, 1)
    stream, _ = begin_fetch(engine, namespace, 5, 1, 6, group=1)
    first = chunk_of(stream)
    assert (first.piece, first.length) == (1, 16)
    second = chunk_of(stream)
    assert (second.piece, second.length) == (4, 16)
    assert first.failed + second.failed == (0, 2)


def test_a_fetch_of_nothing_that_is_stored_is_over_at_once(engine: Engine) -> None:
    namespace = engine.open(16, 16)
    for group in (0, 1):
        stream, _ = begin_fetch(engine, namespace, 1, 2, group=group)
        assert stream.next_chunk(MIB) is None
        assert (stream.finished, stream.queued_bytes) == (True, 0)
        assert stream.outcomes() == bytes([MISS, MISS])


def test_a_block_is_pinned_while_a_chunk_holds_it() -> None:
    engine = Engine(PAGE)
    namespace = engine.open(PAGE)
    engine.put(namespace, 1)
    stream, _ = begin_fetch(engine, namespace, 1)
    chunk = chunk_of(stream)
    assert engine.put(namespace, 2) == [PutOutcome.FULL]
    assert engine.source.delete(namespace, [key(1)]) == b"\1"
    assert engine.put(namespace, 2) == [PutOutcome.FULL]
    assert bytes(chunk.buffers[0]) == content(key(1), PAGE)
    chunk.release()
    assert engine.put(namespace, 2) == [STORED]
    check_invariants(engine.store)


def test_a_stopped_fetch_lets_go_of_what_it_did_not_give_out(engine: Engine) -> None:
    namespace = engine.open(1000, 3096)
    engine.put(namespace, 1, 2, 3)
    for group in (0, 1):
        stream, _ = begin_fetch(engine, namespace, 1, 2, 3, group=group)
        chunk = chunk_of(stream, bytes_max=3500)
        stream.stop(FetchOutcome.TIMEOUT)
        assert stream.finished
        assert stream.next_chunk(MIB) is None
        assert stream.queued_bytes == 0
        assert stream.outcomes() == bytes([FetchOutcome.TIMEOUT] * 3)
        assert any(engine.store.index.pins[1:])
        chunk.release()
        assert not any(engine.store.index.pins[1:])


def test_what_was_given_out_whole_stays_a_hit_when_the_fetch_is_stopped(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2, 3)
    stream, _ = begin_fetch(engine, namespace, 1, 9, 2, 3)
    chunk_of(stream, bytes_max=2 * PAGE).release()
    stream.stop(FetchOutcome.UNAVAILABLE)
    unavailable = FetchOutcome.UNAVAILABLE
    assert stream.outcomes() == bytes([HIT, MISS, unavailable, unavailable])
    assert stream.tiers() == bytes([Tier.ARENA, Tier.NONE, Tier.NONE, Tier.NONE])


@pytest.mark.parametrize("held_bytes", [0, 2 * PAGE, MIB])
def test_in_layer_order_a_block_that_was_replaced_meanwhile_is_a_miss_or_the_old_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    monkeypatch.setattr(streams, "HELD_BYTES_PER_FETCH_MAX", held_bytes)
    namespace = engine.open(100, 200, 300)
    engine.put(namespace, 1, 2, 3, 4)
    stream, reader = begin_fetch(engine, namespace, 1, 2, 3, 4, group=1)
    chunk = chunk_of(stream, bytes_max=400)
    reader.take(chunk)
    chunk.release()
    engine.source.delete(namespace, [key(1), key(2), key(3)])
    engine.put(namespace, 1, 3, version=1)
    while (chunk := stream.next_chunk(MIB)) is not None:  # type: ignore[assignment]
        reader.take(chunk)
        chunk.release()
    results = reader.results(stream.outcomes())
    held_count = held_bytes // PAGE
    for index, number in enumerate((1, 2, 3)):
        assert results[index] == (content(key(number), 600) if index < held_count else MISS)
    assert results[3] == content(key(4), 600)
    assert reader.failed == [index for index in range(3) if index >= held_count]
    assert not any(engine.store.index.pins[1:])
    check_invariants(engine.store)


def test_in_layer_order_a_fetch_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HELD_BYTES_PER_FETCH_MAX", 3 * PAGE)
    engine = Engine(8 * PAGE)
    namespace = engine.open(8, 8)
    engine.put(namespace, *range(8))
    stream, _ = begin_fetch(engine, namespace, *range(8), group=1)
    chunk_of(stream, bytes_max=64).release()
    assert sum(engine.store.index.pins[1:]) == 3
    stream.stop(FetchOutcome.TIMEOUT)
    assert sum(engine.store.index.pins[1:]) == 0


def test_fetching_and_putting_allocate_nothing_of_block_size() -> None:
    engine = Engine(64 * MIB)
    namespace = engine.open(MIB // 2, MIB // 2)
    for number in range(32):
        assert engine.put(namespace, number) == [STORED]
    stream, _ = begin_fetch(engine, namespace, *range(32))
    incoming = begin_put(engine, namespace, *range(32, 48))
    tracemalloc.start()
    chunks = []
    while (chunk := stream.next_chunk(MIB)) is not None:
        chunks.append(chunk)
    for chunk in chunks:
        chunk.release()
    for index in incoming.reserve(16 * MIB):
        incoming.received(index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(chunks) == 32
    assert peak < 64 * 1024


# --- puts ----------------------------------------------------------------------------------


def test_what_is_there_already_is_not_asked_for(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2)
    stream = begin_put(engine, namespace, 1, 3, 2)
    assert stream.reserve(MIB) == [1]
    send(stream, 1, 3)
    assert stream.outcomes() == bytes([PutOutcome.EXISTS, STORED, PutOutcome.EXISTS])
    assert engine.put(namespace, 1, version=1) == [PutOutcome.CONFLICT]
    assert engine.get(namespace, 1) == [content(key(1), PAGE)]


def test_reservations_keep_to_the_room(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, *range(5))
    assert stream.reserve(PAGE - 1) == []
    assert stream.reserve(PAGE) == [0]
    assert stream.reserve(0) == []
    assert stream.reserve(3 * PAGE - 1) == [1, 2]
    assert stream.reserved_bytes == 3 * PAGE
    send(stream, 1, 1)
    assert stream.reserved_bytes == 2 * PAGE
    assert stream.target(1) is None
    assert stream.target(4) is None
    assert not stream.finished


def test_what_needs_no_room_is_decided_without_any(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2)
    stream = begin_put(engine, namespace, 1, 2, 3, 1)
    assert stream.reserve(0) == []
    assert not stream.finished
    assert stream.outcomes()[:2] == bytes([PutOutcome.EXISTS] * 2)
    stream = begin_put(engine, namespace, 2, 1)
    assert stream.reserve(0) == []
    assert stream.outcomes() == bytes([PutOutcome.EXISTS] * 2)


def test_a_key_twice_in_one_put_is_stored_once(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, 1, 1)
    assert stream.reserve(MIB) == [0, 1]
    send(stream, 1, 1)
    send(stream, 0, 1)
    assert stream.outcomes() == bytes([PutOutcome.EXISTS, STORED])
    check_invariants(engine.store)


def test_of_two_puts_under_way_the_first_complete_stays(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    slow, same, other = (
        begin_put(engine, namespace, 1),
        begin_put(engine, namespace, 1),
        begin_put(engine, namespace, 1, version=1),
    )
    for stream in (slow, same, other):
        assert stream.reserve(MIB) == [0]
    send(same, 0, 1)
    send(slow, 0, 1)
    send(other, 0, 1, version=1)
    assert [s.outcomes()[0] for s in (slow, same, other)] == [
        PutOutcome.EXISTS,
        STORED,
        PutOutcome.CONFLICT,
    ]
    assert engine.get(namespace, 1) == [content(key(1), PAGE)]
    check_invariants(engine.store)


def test_damaged_bytes_are_not_stored_and_hide_nothing(engine: Engine) -> None:
    namespace = engine.open(100, 200)
    stream = begin_put(engine, namespace, 1, 2)
    assert stream.reserve(MIB) == [0, 1]
    target = stream.target(0)
    assert target is not None
    target[:] = content(key(1), 300)
    target[150] ^= 1
    stream.received(0)
    send(stream, 1, 2)
    assert stream.outcomes() == bytes([PutOutcome.CORRUPT, STORED])
    assert engine.stored(namespace, 1, 2) == [False, True]
    assert engine.store.free_bytes == 15 * PAGE
    check_invariants(engine.store)


def test_the_bytes_of_another_block_or_layer_are_corrupt(engine: Engine) -> None:
    namespace = engine.open(100, 100)
    data = content(key(1), 200)
    other = engine.checksums(namespace, key(2), data)
    swapped = engine.checksums(namespace, key(1), data[100:] + data[:100])
    for announced in (other, swapped, swapped[8:] + swapped[:8]):
        stream = engine.source.put(namespace, [key(1)], announced, AckLevel.MEMORY)
        stream.reserve(MIB)
        target = stream.target(0)
        assert target is not None
        target[:] = data
        stream.received(0)
        assert stream.outcomes() == bytes([PutOutcome.CORRUPT])


def test_a_put_of_more_than_the_arena_stores_what_fits(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(100, 116))
    outcomes = engine.put(namespace, *range(20))
    assert outcomes == [STORED] * 16 + [PutOutcome.FULL] * 4
    assert all(engine.stored(namespace, *range(16)))
    check_invariants(engine.store)


def test_a_put_waits_for_its_own_blocks_before_it_calls_the_arena_full(engine: Engine) -> None:
    namespace, small = engine.open(9 * PAGE), engine.open(PAGE, pool="small")
    stream = begin_put(engine, namespace, 1, 2)
    assert stream.reserve(MIB) == [0]
    assert engine.put(small, *range(7)) == [STORED] * 7
    assert stream.reserve(MIB) == []
    assert not stream.finished
    send(stream, 0, 1)
    assert stream.reserve(MIB) == []
    assert stream.outcomes() == bytes([STORED, PutOutcome.FULL])


def test_a_stopped_put_gives_its_reservations_back(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, 1, 2, 3)
    stream.reserve(2 * PAGE)
    send(stream, 0, 1)
    stream.stop(PutOutcome.TIMEOUT)
    assert stream.finished
    assert stream.target(1) is None
    assert stream.reserve(MIB) == []
    timeout = PutOutcome.TIMEOUT
    assert stream.outcomes() == bytes([STORED, timeout, timeout])
    assert engine.store.free_bytes == 15 * PAGE
    assert engine.stored(namespace, 1, 2, 3) == [True, False, False]
    check_invariants(engine.store)


def test_the_tail_of_a_put_does_not_evict_its_head(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, *range(20))
    for number in range(16):
        stream.reserve(PAGE)
        send(stream, number, number)
    assert stream.reserve(PAGE) == []
    assert stream.outcomes() == bytes([STORED] * 16 + [PutOutcome.FULL] * 4)
    # Once it has ended, the next put takes from the tail.
    engine.put(namespace, 50, 51)
    assert engine.stored(namespace, *range(16)) == [True] * 14 + [False] * 2


def test_a_long_put_holds_back_only_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HELD_BYTES_PER_PUT_MAX", 2 * PAGE)
    engine = Engine(16 * PAGE)
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, *range(5))
    stream.reserve(MIB)
    for number in range(3):
        send(stream, number, number)
    assert sum(engine.store.index.queued) == 2
    check_invariants(engine.store)


def test_leases_that_end_during_a_put_make_room_for_it(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(16))
    engine.source.lookup([namespace], list(map(key, range(16))), 1000, "me")
    stream = begin_put(engine, namespace, 20)
    engine.now = 1.5
    assert stream.reserve(MIB) == [0]


def test_only_the_acknowledgement_that_can_be_kept_is_given(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    with pytest.raises(Unsupported, match="written"):
        engine.source.put(namespace, [key(1)], bytes(8), AckLevel.WRITTEN)


# --- lookups and leases --------------------------------------------------------------------


def test_a_lookup_over_ranks_finds_what_all_have(engine: Engine) -> None:
    ranks = [engine.open(PAGE, tp_rank=rank, tp_size=2) for rank in range(2)]
    engine.put(ranks[0], 0, 1, 2, 9)
    engine.put(ranks[1], 0, 2, 3, 9)
    bitmap, lease = engine.source.lookup(ranks, list(map(key, range(10))), 0, "me")
    assert bitmap == bytes([0b00000101, 0b00000010])
    assert lease == 0


def test_a_lease_covers_the_leading_hits_of_all_ranks(engine: Engine) -> None:
    ranks = [engine.open(PAGE, tp_rank=rank, tp_size=2) for rank in range(2)]
    for namespace in ranks:
        engine.put(namespace, 0, 1, 3)
    _, lease = engine.source.lookup(ranks, list(map(key, range(4))), 1000, "me")
    assert lease > 0
    assert sorted(engine.store.leases.slots()) == sorted(
        engine.store.pools.namespace(namespace).slots[key(number)]
        for namespace in ranks
        for number in (0, 1)
    )
    assert engine.source.release([lease, lease, 99], "me") == [True, False, False]
    assert engine.store.leases.slots() == []


def test_nothing_found_is_nothing_leased(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    assert engine.source.lookup([namespace], [key(1)], 1000, "me") == (b"\0", 0)


def test_leased_blocks_stay_until_the_lease_ends_by_itself(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(16))
    _, lease = engine.source.lookup([namespace], list(map(key, range(8))), 1000, "me")
    assert engine.source.lookup([namespace], list(map(key, range(8, 16))), 1000, "you")[1]
    engine.now = 0.999
    assert engine.put(namespace, 20) == [PutOutcome.FULL]
    engine.now = 1.0
    assert engine.put(namespace, 20) == [STORED]
    assert engine.source.release([lease], "me") == [False]


def test_a_session_leases_half_of_the_arena_and_no_more(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(16))
    keys = list(map(key, range(16)))
    bitmap, lease = engine.source.lookup([namespace], keys[:9], 1000, "me")
    assert (bitmap, lease) == (b"\xff\1", 0)
    assert engine.source.counters()["leases_refused"] == 1
    assert engine.source.lookup([namespace], keys[:5], 1000, "me")[1]
    assert engine.source.lookup([namespace], keys[5:8], 1000, "me")[1]
    assert engine.source.lookup([namespace], keys[8:9], 1000, "me")[1] == 0
    assert engine.put(namespace, 20) == [STORED]
    check_invariants(engine.store)


def test_leases_end_with_their_session(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1)
    engine.source.lookup([namespace], [key(1)], 1000, "me")
    engine.source.owner_gone("me")
    assert engine.store.leases.slots() == []


def test_a_lease_longer_than_the_limit_is_refused(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    with pytest.raises(LocalProtocolError, match="60001"):
        engine.source.lookup([namespace], [key(1)], 60_001, "me")


# --- the rest ------------------------------------------------------------------------------


def test_unknown_namespaces_are_refused_everywhere(engine: Engine) -> None:
    unknown, keys = bytes(32), [key(1)]
    pieces = PieceMap(Geometry((PAGE,)), 1)
    for act in (
        lambda: engine.source.layer_bytes(unknown),
        lambda: engine.source.lookup([unknown], keys, 0, "me"),
        lambda: engine.source.fetch(unknown, keys, pieces),
        lambda: engine.source.put(unknown, keys, bytes(8), AckLevel.MEMORY),
        lambda: engine.source.delete(unknown, keys),
        lambda: engine.source.check(unknown, keys),
    ):
        with pytest.raises(UnknownNamespace):
            act()


def test_a_check_drops_what_went_bad_so_that_the_next_put_heals_it(engine: Engine) -> None:
    namespace = engine.open(1000, 2000)
    engine.put(namespace, 1, 2, 3)
    opened = engine.store.pools.namespace(namespace)
    engine.store.view(opened.slots[key(2)])[2500] ^= 0x80
    assert engine.source.check(namespace, list(map(key, (1, 2, 3, 4)))) == bytes([0, 1, 0, 0])
    assert engine.stored(namespace, 1, 2, 3) == [True, False, True]
    assert engine.put(namespace, 2) == [STORED]
    assert engine.source.counters()["blocks_corrupt"] == 1


def test_checks_hash_only_so_much_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHECK_BYTES_PER_S", 2 * PAGE + 1)
    engine = Engine(16 * PAGE)
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2, 3)
    opened = engine.store.pools.namespace(namespace)
    for number in (1, 2, 3):
        engine.store.view(opened.slots[key(number)])[0] ^= 1
    # What is not there costs nothing.
    keys = [key(8), key(1), key(2), key(3), key(9)]
    assert engine.source.check(namespace, keys) == b"\0\1\1\0\0"
    assert engine.source.counters()["checks_skipped"] == 1
    assert engine.source.check(namespace, keys) == bytes(5)
    engine.now = 0.4
    assert engine.source.check(namespace, keys) == bytes(5)
    engine.now = 0.5
    assert engine.source.check(namespace, keys) == b"\0\0\0\1\0"
    assert engine.source.counters()["checks_skipped"] == 3


def test_pools_are_administered(engine: Engine) -> None:
    administer = engine.source.administer_pool
    old, new = engine.open(PAGE, weights_digest="old"), engine.open(PAGE, weights_digest="new")
    engine.put(old, 1, 2)
    engine.put(new, 1)
    [info] = administer(Pool(action=PoolAction.LIST))
    assert (info.pool, info.used_bytes, info.capacity_bytes) == ("pool", 3 * PAGE, 0)
    assert [(g.block_count, g.used_bytes) for g in info.generations] == [(2, 2 * PAGE), (1, PAGE)]
    generations = [generation.generation for generation in info.generations]
    [info] = administer(Pool(action=PoolAction.PIN, pool="pool", generation=generations[1]))
    assert info.pinned == generations[1]
    with pytest.raises(LayoutMismatch, match="weights_digest"):
        engine.open(PAGE, weights_digest="old")
    [info] = administer(Pool(action=PoolAction.RETIRE, pool="pool", generation=generations[0]))
    assert [g.generation for g in info.generations] == generations[1:]
    assert info.used_bytes == PAGE
    with pytest.raises(UnknownNamespace):
        engine.stored(old, 1)
    [info] = administer(Pool(action=PoolAction.UNPIN, pool="pool"))
    assert info.pinned == b""
    [info] = administer(Pool(action=PoolAction.SET_CAPACITY, pool="pool", capacity_bytes=PAGE))
    assert info.capacity_bytes == PAGE
    engine.put(new, 2)
    assert engine.stored(new, 1, 2) == [False, True]
    assert administer(Pool(action=PoolAction.LIST, pool="other")) == []
    with pytest.raises(RefusedError):
        administer(Pool(action=PoolAction.UNPIN, pool="other"))


def test_a_lowered_capacity_evicts(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(10))
    [info] = engine.source.administer_pool(
        Pool(action=PoolAction.SET_CAPACITY, pool="pool", capacity_bytes=4 * PAGE)
    )
    assert info.used_bytes == 4 * PAGE
    assert engine.source.buffer_load().free_bytes == 12 * PAGE


def test_pools_come_configured() -> None:
    engine = Engine(16 * PAGE, capacities={"small": 2 * PAGE}, pins={"fixed": b"g" * 32})
    pools = {p.pool: p for p in engine.source.administer_pool(Pool(action=PoolAction.LIST))}
    assert (pools["small"].capacity_bytes, pools["fixed"].pinned) == (2 * PAGE, b"g" * 32)
    with pytest.raises(LayoutMismatch):
        engine.open(PAGE, pool="fixed")
    namespace = engine.open(PAGE, pool="small")
    engine.put(namespace, 1)
    engine.put(namespace, 2)
    engine.put(namespace, 3)
    assert sum(engine.stored(namespace, 1, 2, 3)) == 2


def test_a_fetch_outlives_its_generation(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, 1, 2)
    stream, _ = begin_fetch(engine, namespace, 1, 2)
    chunk = chunk_of(stream, bytes_max=PAGE)
    [info] = engine.source.administer_pool(Pool(action=PoolAction.LIST))
    engine.source.administer_pool(
        Pool(action=PoolAction.RETIRE, pool="pool", generation=info.generations[0].generation)
    )
    assert stream.next_chunk(MIB) is None
    assert stream.outcomes() == bytes([HIT, MISS])
    assert bytes(chunk.buffers[0]) == content(key(1), PAGE)
    chunk.release()
    assert engine.source.buffer_load().free_bytes == 16 * PAGE
    check_invariants(engine.store)


def test_a_put_under_way_in_a_retired_generation_ends_as_unavailable(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    stream = begin_put(engine, namespace, 1, 2, 3)
    stream.reserve(2 * PAGE)
    send(stream, 0, 1)
    [info] = engine.source.administer_pool(Pool(action=PoolAction.LIST))
    engine.source.administer_pool(
        Pool(action=PoolAction.RETIRE, pool="pool", generation=info.generations[0].generation)
    )
    check_invariants(engine.store)
    send(stream, 1, 2)
    assert stream.reserve(MIB) == []
    unavailable = PutOutcome.UNAVAILABLE
    assert stream.outcomes() == bytes([STORED, unavailable, unavailable])
    assert engine.source.buffer_load().free_bytes == 16 * PAGE
    check_invariants(engine.store)


def test_what_happens_is_counted(engine: Engine) -> None:
    namespace = engine.open(PAGE)
    engine.put(namespace, *range(17))
    engine.put(namespace, 16)
    engine.put(namespace, 16, 0)
    engine.put(namespace, 16, version=1)
    engine.get(namespace, 0, 1, 99)
    engine.get(namespace, 2, group=1)
    engine.source.delete(namespace, [key(3), key(99)])
    counters = engine.source.counters()
    assert {name: counters[name] for name in sorted(counters)} == {
        "blocks_deleted": 1,
        "blocks_evicted": 1,
        "blocks_evicted_arena": 1,
        "fetch_bytes": 3 * PAGE,
        "fetch_hits": 3,
        "fetch_misses": 1,
        "put_bytes": 17 * PAGE,
        "put_conflicts": 1,
        "put_exists": 2,
        "put_full": 1,
        "put_stored": 17,
    }


def test_open_namespaces_are_listed(engine: Engine) -> None:
    namespace = engine.open(PAGE, 10)
    engine.put(namespace, 1)
    assert engine.source.layer_bytes(namespace) == (PAGE, 10)
    [info] = engine.source.namespaces("")
    assert info.layout == layout(PAGE, 10)
    assert (info.namespace, info.block_count, info.used_bytes) == (namespace, 1, 2 * PAGE)
    assert engine.source.namespaces("other") == []
    assert engine.source.disk_load().queued_bytes == 0
