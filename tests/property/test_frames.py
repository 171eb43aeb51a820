"""Whatever bytes come: a typed error or an answer, nothing outside of the destinations, never
a wrong byte, and in the end everything is given back."""

from __future__ import annotations

import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvstore.errors import KVStoreError
from kvstore.messages import (
    Cancel,
    Data,
    Done,
    Empty,
    FetchOutcome,
    PutDone,
    Subscribe,
    Want,
)
from kvstore.protocol import ClientProtocol, ServerProtocol
from kvstore.wire import FrameType, encode_header
from tests.support.frames import (
    BLOCK,
    KEYS,
    LAYERS,
    LOST,
    MIB,
    FetchCall,
    Hooks,
    Pair,
    PutCall,
    Store,
    deliver,
    frame,
    hello,
    take,
    welcomed_client,
)
from tests.support.samples import FROM_CLIENT, FROM_SERVER

# More than usual, since most of what is drawn ends early.
MANY = settings(
    max_examples=3 * settings.default.max_examples,  # type: ignore[union-attr]
    suppress_health_check=[HealthCheck.too_slow],
)

# --- streams of bytes ------------------------------------------------------------------------

small = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 40, 64, 163, 164, 165, (1 << 32) - 1])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
metadatas = st.one_of(
    st.sampled_from([*FROM_CLIENT.values(), *FROM_SERVER.values()]),
    st.builds(Want, indices=st.lists(st.integers(-1, 6), max_size=4).map(tuple)),
    st.builds(Done, outcomes=st.binary(max_size=4), tiers=st.just(b"") | st.binary(max_size=4)),
    st.builds(PutDone, outcomes=st.binary(max_size=4)),
    st.builds(
        Data,
        checksums=st.integers(0, 10).map(lambda n: bytes(8 * n)) | st.binary(max_size=30),
        failed=st.lists(st.integers(-1, 6), max_size=3).map(tuple),
    ),
    st.builds(Cancel, request_id=st.integers(0, 6)),
    anything.map(msgpack.packb),
    st.binary(max_size=20),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """One frame whose header and checksums are right, whatever it says."""
    type = draw(st.sampled_from(FrameType) | st.just(FrameType.DATA))
    request_id = draw(st.integers(0, 6))
    flags = draw(st.integers(0, 1))
    if type is not FrameType.DATA:
        return frame(type, request_id, draw(metadatas), flags=flags)  # type: ignore[arg-type]
    length = draw(st.integers(0, 4 * BLOCK))
    metadata = draw(st.just(b"") | metadatas)
    payload = draw(st.sampled_from([b"\0", b"\xff"])) * length
    return frame(type, request_id, metadata, payload, draw(small), draw(small), flags)


@st.composite
def damaged(draw: st.DrawFn, stream: bytes) -> bytes:
    """A stream with bits flipped, parts cut out, repeated, moved, or replaced."""
    data = bytearray(stream)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + draw(st.sampled_from([1, 48, 2000])))))
        change = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "truncate", "frame"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:end]
        elif change == "repeat":
            data[end:end] = data[at:end]
        elif change == "insert":
            data[at:end] = draw(st.binary(max_size=60))
        elif change == "truncate":
            del data[end:]
        elif change == "frame":
            data[at:at] = draw(frames())
    return bytes(data)


@st.composite
def spliced(draw: st.DrawFn, whole_frames: list[bytes]) -> bytes:
    """Whole frames of a conversation: reordered, repeated, left out, mixed with others."""
    chosen = st.sampled_from(whole_frames) if whole_frames else st.nothing()
    return b"".join(draw(st.lists(chosen | frames(), max_size=12)))


def in_parts(draw: st.DataObject, data: bytes) -> list[bytes]:
    """A stream as it arrives: cut at some places."""
    places = st.lists(st.integers(0, len(data)), max_size=5)
    cuts = [0, *sorted(draw.draw(places, label="cuts")), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(cuts)]


def frames_of(stream: bytes) -> list[bytes]:
    """A sound stream as a list of its frames."""
    found = []
    while stream:
        length = 48 + int.from_bytes(stream[16:20], "little")
        length += int.from_bytes(stream[20:24], "little")
        found.append(stream[:length])
        stream = stream[length:]
    return found


# --- what a client and a server really say ---------------------------------------------------


def conversation() -> tuple[bytes, bytes]:
    """All that a client says (two fetches, two puts, others) and all that its server does."""
    store = Store(*LAYERS)
    store.fill(*KEYS[:3])
    pair = Pair(store, in_flight_bytes_max=2 * BLOCK)
    up, down = b"", b""
    begin_all(pair.client, store)
    while True:
        pair.client.fill()
        pair.server.fill()
        said, answered = take(pair.client.writer, MIB), take(pair.server.writer, MIB)
        if not said and not answered:
            return up, down
        up, down = up + said, down + answered
        deliver(pair.server, said)
        deliver(pair.client, answered)


def begin_all(client: ClientProtocol, store: Store) -> tuple[list[FetchCall], list[PutCall], Any]:
    """Requests 1 to 5 and what they come to."""
    fetches = [
        FetchCall(store.geometry, KEYS[:4]),
        FetchCall(store.geometry, KEYS[:3], (1, 3), 1, scattered=True),
    ]
    puts = [PutCall(store, KEYS[3:5]), PutCall(store, [KEYS[5], KEYS[2]])]
    others: list[Any] = []
    for request_id, fetch in enumerate(fetches, 1):
        client.fetch(request_id, fetch.message(), fetch.transfer, fetch.replies.append)
    for request_id, put in enumerate(puts, 3):
        client.put(request_id, put.message(), put.transfer, put.replies.append)
    client.call(5, FrameType.PING, Empty(), others.append)
    client.subscribe(6, Subscribe(), others.append, lambda report: None)
    return fetches, puts, others


UP, DOWN = conversation()
HELLO = frames_of(UP)[0]


def test_the_conversation_is_a_whole_one() -> None:
    assert [frame[5] for frame in frames_of(UP)].count(FrameType.DATA) >= 2
    assert [frame[5] for frame in frames_of(DOWN)].count(FrameType.DONE) == 2
    assert [frame[5] for frame in frames_of(DOWN)].count(FrameType.PUT_DONE) == 2


# --- a server --------------------------------------------------------------------------------


def feed_server(draw: st.DataObject, stream: bytes) -> None:
    """A server hears a stream; nothing but a typed error may come of it."""
    store = Store(*LAYERS)
    store.fill(*KEYS[:3])
    store.late.update(draw.draw(st.sampled_from([[], KEYS[1:2], KEYS])))
    hooks = Hooks(store)
    hooks.protocol = server = ServerProtocol(hooks, 2 * BLOCK)
    reads = draw.draw(st.booleans(), label="the peer reads")
    try:
        for part in in_parts(draw, stream):
            deliver(server, part)
            server.fill()
            if reads:
                for said in frames_of(take(server.writer, 1 << 40)):
                    assert len(said) >= 48
    except KVStoreError as error:
        server.refuse(error)
    begun = server.request_count + len(hooks.ended)
    server.lost(LOST)
    assert all(target.intact for target in store.targets), "written outside of a reservation"
    assert (store.lent, store.held, server.request_count) == (0, 0, 0)
    assert len(hooks.ended) == begun
    for name, block in store.blocks.items():
        # Sample puts announce checksums that no bytes have, so what is stored is right.
        assert block == store.block(name)


@given(data=st.data(), stream=st.binary(max_size=200))
def test_a_server_hears_noise(data: st.DataObject, stream: bytes) -> None:
    feed_server(data, stream)


@given(data=st.data(), stream=st.binary(max_size=200))
def test_a_server_hears_noise_after_hello(data: st.DataObject, stream: bytes) -> None:
    feed_server(data, HELLO + stream)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_server_hears_a_damaged_conversation(data: st.DataObject) -> None:
    feed_server(data, data.draw(damaged(UP), label="stream"))


@pytest.mark.slow
@MANY
@given(data=st.data(), introduced=st.booleans())
def test_a_server_hears_frames_in_any_order(data: st.DataObject, introduced: bool) -> None:
    stream = data.draw(spliced(frames_of(UP)), label="stream")
    feed_server(data, HELLO * introduced + stream)


# --- a client --------------------------------------------------------------------------------


def feed_client(draw: st.DataObject, stream: bytes, welcomed: bool) -> None:
    """A client with requests under way hears a stream."""
    store = Store(*LAYERS)
    client = ClientProtocol(hello(), lambda welcome: None, lambda goaway: None)
    if welcomed:
        client = welcomed_client()
    fetches, puts, others = begin_all(client, store)
    abandoned = draw.draw(st.sampled_from([0, 0, 1, 2, 3, 4]), label="abandoned")
    parts = in_parts(draw, stream)
    try:
        for number, part in enumerate(parts):
            deliver(client, part)
            client.fill()
            if number % 2:
                take(client.writer, 200)
            if abandoned and number == len(parts) // 2:
                client.abandon(abandoned)
                before = [[fetch.data(i) for i in range(3)] for fetch in fetches]
    except KVStoreError as error:
        client.refuse(error)
    else:
        if abandoned in (1, 2):
            now = [fetches[abandoned - 1].data(index) for index in range(3)]
            assert now == before[abandoned - 1], "bytes came after abandon"
    client.lost(LOST)
    assert client.call_count == 0
    assert len(others) in (2, 3)  # the subscription has its reply, and then its end
    for fetch in fetches:
        assert len(fetch.replies) == 1
        fetch.transfer.fail_rest(FetchOutcome.UNAVAILABLE)
        assert None not in fetch.check()
        failed = [index for index, _ in fetch.failed]
        assert len(set(failed)) == len(failed)
        assert len(set(fetch.arrived)) == len(fetch.arrived)
    for put in puts:
        assert len(put.replies) == 1
        assert put.transfer.idle
    for buffer in client.reader.buffers():
        assert all(
            buffer.obj is not guard.view.obj for f in fetches for g in f.guards for guard in g
        )


@given(data=st.data(), stream=st.binary(max_size=200), welcomed=st.booleans())
def test_a_client_hears_noise(data: st.DataObject, stream: bytes, welcomed: bool) -> None:
    feed_client(data, stream, welcomed)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_a_client_hears_a_damaged_conversation(data: st.DataObject) -> None:
    feed_client(data, data.draw(damaged(DOWN), label="stream"), welcomed=False)


@pytest.mark.slow
@MANY
@given(data=st.data(), welcomed=st.booleans())
def test_a_client_hears_frames_in_any_order(data: st.DataObject, welcomed: bool) -> None:
    stream = data.draw(spliced(frames_of(DOWN)[1:]), label="stream")
    feed_client(data, stream, welcomed)


# --- damage on the way that no header shows --------------------------------------------------


@pytest.mark.slow
@MANY
@given(data=st.data(), group=st.integers(0, 2), scattered=st.booleans())
def test_damaged_payload_is_never_a_hit(data: st.DataObject, group: int, scattered: bool) -> None:
    """Bits flip in payload only: the blocks that have them are corrupt, all others are hits."""
    store = Store(*LAYERS)
    store.fill(*KEYS[:4])
    store.chunk_bytes = data.draw(st.sampled_from([1, 30, 64, 100, 164, 400, MIB]))
    pair = Pair(store)
    pair.pump()
    call = FetchCall(store.geometry, KEYS[:4], None, group, scattered)
    pair.begin_fetch(call)
    pair.up(MIB)
    stream = b""
    while True:
        pair.server.fill()
        said = take(pair.server.writer, MIB)
        if not said:
            break
        stream += said
    hit: set[int] = set()
    flips = data.draw(st.lists(st.integers(0, 4 * BLOCK - 1), max_size=3, unique=True))
    passed, broken = 0, b""
    for one in frames_of(stream):
        length = int.from_bytes(one[20:24], "little")
        body = bytearray(one)
        piece, offset = int.from_bytes(one[24:28], "little"), int.from_bytes(one[28:32], "little")
        for at in range(length):
            size = call.pieces.group_ranges[piece // 4][3]
            if passed in flips:
                body[len(one) - length + at] ^= 0x10
                hit.add(piece % 4)
            passed, offset = passed + 1, offset + 1
            if offset == size:
                piece, offset = piece + 1, 0
        broken += body
    assert passed == 4 * BLOCK
    for part in in_parts(data, broken):
        deliver(pair.client, part)
    expected = [FetchOutcome.CORRUPT if index in hit else FetchOutcome.HIT for index in range(4)]
    assert call.check() == expected
    assert sorted(call.transfer.corrupt) == sorted(hit)


@pytest.mark.parametrize("type", FrameType)
def test_headers_alone_of_every_type(type: FrameType) -> None:
    """A header with nothing behind it, to either side, at any stage."""
    store = Store(*LAYERS)
    for request_id in (0, 1, 9):
        header = encode_header(type, request_id)
        for server in (True, False):
            for ready in (True, False):
                hooks = Hooks(store)
                hooks.protocol = ServerProtocol(hooks, MIB)
                target: Any = hooks.protocol if server else welcomed_client()
                if server and ready:
                    deliver(target, HELLO)
                try:
                    deliver(target, header)
                except KVStoreError:
                    pass
                target.lost(LOST)
