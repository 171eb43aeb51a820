"""Fetches from one side to the other, through a wire that cuts anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import (
    KVStoreError,
    LimitExceeded,
    LocalProtocolError,
    RemoteProtocolError,
)
from kvstore.messages import (
    CancelReply,
    Data,
    Done,
    Empty,
    FetchOutcome,
    PutDone,
    PutOutcome,
    Want,
)
from kvstore.protocol import server as module
from kvstore.wire import FrameType
from tests.support.engine import key
from tests.support.frames import (
    BLOCK,
    KEYS,
    LAYERS,
    LOST,
    MIB,
    FetchCall,
    Pair,
    PutCall,
    Store,
    check_idle,
    cuts,
    deliver,
    frame,
    take,
    welcomed_client,
)
from tests.support.placed import PlacedPair
from tests.support.samples import FROM_SERVER

HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT
STORED = PutOutcome.STORED


@pytest.fixture
def store() -> Store:
    return Store(*LAYERS)


@pytest.fixture
def pair(store: Store) -> Pair:
    made = Pair(store)
    made.pump()
    assert len(made.welcomes) == 1
    return made


@pytest.mark.parametrize("kind", [Pair, PlacedPair])
@pytest.mark.parametrize("chunk", [1, 41, 64, 200, MIB])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    ("layers", "group"), [((0, 3), 0), ((0, 3), 1), ((0, 3), 2), ((1, 3), 1), ((2, 3), 0)]
)
def test_a_fetch(
    store: Store,
    layers: tuple[int, int],
    group: int,
    scattered: bool,
    chunk: int,
    kind: type[Pair],
) -> None:
    """Through the stream, and beside it."""
    store.fill(KEYS[0], KEYS[2], KEYS[3], KEYS[5])
    store.chunk_bytes = chunk
    pair = kind(store, cuts(chunk))
    pair.pump()
    call = FetchCall(store.geometry, KEYS, layers, group, scattered)
    pair.begin_fetch(call)
    pair.pump()
    assert call.check() == [HIT, MISS, HIT, HIT, MISS, HIT]
    assert call.failed == [(1, MISS), (4, MISS)]
    assert [reply.outcomes for reply in call.replies] == [bytes([0, 1, 0, 0, 1, 0])]
    assert call.transfer.received_bytes == 4 * call.pieces.span_bytes
    assert len(call.arrived) == 4 * call.pieces.group_count
    check_idle(pair)


def test_layers_are_published_in_their_order(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    call = FetchCall(store.geometry, KEYS, group_layers=1)
    pair.begin_fetch(call)
    pair.pump()
    assert call.arrived == [(index, group) for group in range(3) for index in range(6)]


@pytest.mark.parametrize("cut", [300_007, 700_000, MIB, 2 * MIB])
def test_blocks_of_many_frames(cut: int) -> None:
    """The last bytes of one frame arrive together with the header of the next."""
    store = Store(MIB, 700_000, MIB + 1)
    store.fill(KEYS[0])
    pair = Pair(store, lambda: cut)
    pair.pump()
    call = FetchCall(store.geometry, KEYS[:1], scattered=cut == MIB)
    pair.begin_fetch(call)
    pair.pump()
    assert call.check() == [HIT]
    new = Store(*store.geometry.layer_bytes)
    target = Pair(new, lambda: cut)
    put = PutCall(store, KEYS[:1], scattered=cut == MIB)
    target.begin_put(put)
    target.pump()
    assert put.outcomes() == [STORED]
    assert new.blocks == store.blocks


def test_one_bad_block_hides_no_other(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    store.damaged.add(KEYS[2])
    call = FetchCall(store.geometry, KEYS)
    pair.begin_fetch(call)
    pair.pump()
    assert call.check() == [HIT, HIT, CORRUPT, HIT, HIT, HIT]
    assert call.transfer.corrupt == [2]


def test_urgent_fetches_go_first_and_none_waits_for_a_source(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    store.late.add(KEYS[0])
    late, normal, urgent = (FetchCall(store.geometry, [KEYS[n]]) for n in range(3))
    ids = [
        pair.begin_fetch(call, priority=priority)
        for call, priority in ((late, 1), (normal, 5), (urgent, 1))
    ]
    pair.pump()
    assert pair.hooks.ended == [ids[2], ids[1]]
    store.late.clear()
    pair.pump()
    assert pair.hooks.ended == [ids[2], ids[1], ids[0]]
    assert [call.check() for call in (late, normal, urgent)] == [[HIT]] * 3


def test_early_news_of_a_miss_comes_before_late_blocks(store: Store, pair: Pair) -> None:
    store.fill(KEYS[1])
    store.late.add(KEYS[1])
    call = FetchCall(store.geometry, KEYS[:2])
    pair.begin_fetch(call)
    pair.pump()
    assert call.check() == [MISS, None]
    assert call.replies == []
    store.late.clear()
    pair.pump()
    assert call.check() == [MISS, HIT]


def cancelled_fetch(steps: int, group: int) -> tuple[Pair, FetchCall]:
    """A fetch that is abandoned after so many steps of one chunk up and down."""
    store = Store(*LAYERS)
    store.fill(*KEYS[:3])
    store.chunk_bytes = 50
    pair = Pair(store, lambda: 37)
    pair.pump()
    call = FetchCall(store.geometry, KEYS[:3], group_layers=group)
    request_id = pair.begin_fetch(call)
    for _ in range(steps):
        pair.up(37)
        pair.down(37)
    before = [call.data(index) for index in range(3)]
    cancelled = pair.cancel(request_id)
    pair.pump()
    assert [call.data(index) for index in range(3)] == before, "bytes came after abandon"
    assert len(call.replies) == len(cancelled) == 1
    assert isinstance(call.replies[0], Done)
    assert isinstance(cancelled[0], CancelReply)
    check_idle(pair)
    # The connection is sound.
    after = FetchCall(store.geometry, KEYS[:3])
    pair.begin_fetch(after)
    pair.pump()
    assert after.check() == [HIT] * 3
    return pair, call


@pytest.mark.parametrize("group", [0, 1])
def test_a_fetch_can_be_cancelled_at_any_point(group: int) -> None:
    seen = set()
    for steps in range(45):
        _, call = cancelled_fetch(steps, group)
        seen.update(call.check())
    assert seen == {HIT, FetchOutcome.UNAVAILABLE}


def test_a_server_ends_a_fetch_at_its_deadline(store: Store, pair: Pair) -> None:
    store.fill(*KEYS[:2])
    store.late.add(KEYS[1])
    call = FetchCall(store.geometry, KEYS[:2])
    request_id = pair.begin_fetch(call)
    pair.pump()
    assert pair.server.stop_request(request_id)
    pair.pump()
    assert call.check() == [HIT, FetchOutcome.TIMEOUT]
    assert not pair.server.stop_request(request_id)


@pytest.mark.parametrize("last", [FrameType.DONE, FrameType.ERROR])
def test_no_payload_follows_the_last_word_of_a_fetch(store: Store, last: FrameType) -> None:
    """The header of the next frame arrives together with the last word: the memory is the
    caller's again, whatever that frame wants."""
    client = welcomed_client()
    call = FetchCall(store.geometry, KEYS[:1])
    client.fetch(7, call.message(), call.transfer, call.replies.append)
    word: Any = Done(outcomes=b"\1")
    if last is FrameType.ERROR:
        word = FROM_SERVER[FrameType.ERROR]
    data = frame(FrameType.DATA, 7, Data(checksums=bytes(24)), b"x" * BLOCK)
    with pytest.raises(RemoteProtocolError, match="DATA for request 7, which is no fetch"):
        deliver(client, frame(last, 7, word) + data)
    assert len(call.replies) == 1
    assert call.data(0) == bytes(BLOCK)


@pytest.mark.parametrize("kind", ["put", "call", "nothing"])
def test_payload_for_what_is_no_fetch_is_refused(store: Store, kind: str) -> None:
    client = welcomed_client()
    put = PutCall(store, KEYS[:1])
    if kind == "put":
        client.put(7, put.message(), put.transfer, put.replies.append)
    elif kind == "call":
        client.call(7, FrameType.PING, Empty(), put.replies.append)
    for payload in (b"payload", b""):
        with pytest.raises(RemoteProtocolError, match=r"request 7|is no fetch"):
            deliver(client, frame(FrameType.DATA, 7, b"", payload))


@pytest.mark.parametrize(
    ("type", "message"),
    [
        (FrameType.WANT, Want(indices=(0,))),
        (FrameType.PUT_DONE, PutDone(outcomes=b"\0")),
        (FrameType.FETCH, Empty()),
        (FrameType.PING, Empty()),
    ],
)
def test_a_fetch_is_answered_by_data_and_done(store: Store, type: FrameType, message: Any) -> None:
    client = welcomed_client()
    call = FetchCall(store.geometry, KEYS[:1])
    client.fetch(7, call.message(), call.transfer, call.replies.append)
    with pytest.raises(RemoteProtocolError):
        deliver(client, frame(type, 7, message, flags=1))
    client.lost(LOST)
    assert call.replies == [LOST]


def test_many_fetches_have_a_limit(store: Store, pair: Pair, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "REQUESTS_PER_CONNECTION_MAX", 3)
    store.fill(*KEYS)
    store.late.update(KEYS)
    calls = [FetchCall(store.geometry, KEYS) for _ in range(4)]
    for call in calls:
        pair.begin_fetch(call)
    put = PutCall(store, KEYS)
    pair.begin_put(put)
    pair.pump()
    assert isinstance(calls[3].replies[0], LimitExceeded)
    assert str(calls[3].replies[0]).endswith("the limit is 3")
    assert isinstance(put.replies[0], LimitExceeded)
    store.late.clear()
    pair.pump()
    assert [call.check() for call in calls] == [[HIT] * 6] * 3 + [[None] * 6]


def test_a_slow_reader_holds_a_window_and_no_more() -> None:
    store = Store(MIB)
    keys = [key(number) for number in range(20)]
    store.fill(*keys)
    pair = Pair(store)
    pair.pump()
    pair.begin_fetch(FetchCall(store.geometry, keys))
    pair.up(MIB)
    pair.server.fill()
    assert store.lent == 2
    assert 2 * MIB < pair.server.writer.queued_bytes < 3 * MIB
    assert pair.server.fetch_queued_bytes > MIB
    take(pair.server.writer, 1000)
    pair.server.fill()
    assert store.lent == 3
    pair.server.fill()
    assert store.lent == 3


def test_fetches_without_payload_are_answered_a_few_at_a_time(
    store: Store, pair: Pair, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "STEPS_PER_FILL_MAX", 10)
    calls = [FetchCall(store.geometry, KEYS[:2]) for _ in range(25)]
    for call in calls:
        pair.begin_fetch(call)
    pair.up(MIB)
    ended = []
    for _ in range(5):
        pair.server.fill()
        ended.append((len(pair.hooks.ended), pair.server.unfilled))
    # Each takes two steps: news of its misses, and its end.
    assert ended == [(5, True), (10, True), (15, True), (20, True), (25, False)]
    pair.pump()
    assert all(call.check() == [FetchOutcome.MISS] * 2 for call in calls)


def test_fetches_that_wait_for_their_source_do_not_hide_those_behind_them(
    store: Store, pair: Pair, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "STEPS_PER_FILL_MAX", 3)
    store.fill(*KEYS[:2])
    store.late.add(KEYS[0])
    for _ in range(10):
        pair.begin_fetch(FetchCall(store.geometry, KEYS[:1]))
    last = FetchCall(store.geometry, KEYS[1:2])
    pair.begin_fetch(last)
    pair.pump()
    assert last.check() == [FetchOutcome.HIT]
    assert not pair.server.unfilled


def test_a_chunk_that_fits_no_frame_is_given_back(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    pair.begin_fetch(FetchCall(store.geometry, KEYS))
    pair.up(MIB)
    stream = pair.server._fetches[0][3]
    chunk = stream.next_chunk(MIB)
    assert chunk is not None
    stream.next_chunk = lambda bytes_max: chunk._replace(checksums=bytes(2 * MIB))
    with pytest.raises(LocalProtocolError, match="DATA: metadata of"):
        pair.server.fill()
    assert store.lent == 0


def test_errors_of_a_source_refuse_one_request(store: Store, pair: Pair) -> None:
    bad = FetchCall(store.geometry, KEYS)
    good = PutCall(store, KEYS)
    pair.begin_fetch(bad, layer_last=4)
    pair.begin_put(good)
    pair.pump()
    assert isinstance(bad.replies[0], KVStoreError)
    assert good.outcomes() == [STORED] * 6
