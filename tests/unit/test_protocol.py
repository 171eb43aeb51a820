"""The conversation of two sides, through a wire that cuts anywhere; every rule of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvstore.errors import (
    Draining,
    LayoutMismatch,
    LimitExceeded,
    LocalProtocolError,
    RefusedError,
    RemoteProtocolError,
    TransportError,
    Unsupported,
    VersionMismatch,
)
from kvstore.messages import (
    KEYS_PER_REQUEST_MAX,
    REQUESTS,
    Cancel,
    CancelReply,
    CorruptReply,
    CorruptReport,
    Data,
    Delete,
    DeleteReply,
    Empty,
    Error,
    ErrorCode,
    FetchOutcome,
    Goaway,
    Limits,
    Lookup,
    LookupReply,
    Message,
    PutOutcome,
    Release,
    ReleaseReply,
    Subscribe,
    encode,
)
from kvstore.protocol import (
    OUTPUT_BYTES_MAX,
    ClientProtocol,
    ServerProtocol,
    client as module,
    server as server_module,
)
from kvstore.protocol.server import HELLO_BYTES_MAX
from kvstore.wire import HEADER_BYTES, FrameType
from tests.support.frames import (
    BLOCK,
    KEYS,
    LAYERS,
    LOST,
    MIB,
    NAMESPACE,
    FetchCall,
    Hooks,
    Pair,
    PutCall,
    Store,
    connected_server,
    cuts,
    deliver,
    frame,
    hello,
    said,
    take,
    welcomed_client,
)
from tests.support.samples import FROM_CLIENT, FROM_SERVER, REPORT

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


# --- every frame type, whole, byte by byte and with trailing data ----------------------------


def pieces_of(data: bytes, way: str) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))] if way == "byte by byte" else [data]


@pytest.mark.parametrize("way", ["whole", "byte by byte"])
@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("type", REQUESTS, ids=lambda type: type.name)
def test_a_server_takes_every_frame(
    store: Store, type: FrameType, way: str, trailing: bool
) -> None:
    store.fill(*KEYS[:1])
    server, hooks = connected_server(store)
    message, after = FROM_CLIENT[type], b""
    if trailing:
        ping = frame(FrameType.PING, 9)
        after = ping + ping[:20]
    if type is FrameType.HELLO:
        hooks.hellos.clear()
        hooks.protocol = server = ServerProtocol(hooks, MIB)
        data = frame(type, 0, message)  # type: ignore[arg-type]
    elif type is FrameType.DATA:
        call = PutCall(store, KEYS[1:3])
        deliver(server, frame(FrameType.PUT, 4, call.message()))
        data = frame(type, 4, b"", store.block(KEYS[1]) + store.block(KEYS[2]))
    else:
        data = frame(type, 5, message)  # type: ignore[arg-type]
    for part in pieces_of(data + after, way):
        deliver(server, part)
    if type is FrameType.HELLO:
        assert hooks.hellos == [message]
        assert server.peer == message
    elif type is FrameType.DATA:
        assert hooks.ended == [4]
        assert store.blocks.keys() == set(KEYS[:3])
    else:
        assert hooks.requests[0] == (type, 5, message)
    assert [r for r in hooks.requests if r[1] == 9] == [(FrameType.PING, 9, Empty())] * trailing
    assert server.reader.mid_frame == trailing


#: In answer to what each frame of a server comes.
ANSWERS_TO: dict[FrameType, str] = {
    **dict.fromkeys(FROM_SERVER, "call"),
    FrameType.WELCOME: "welcome",
    FrameType.GOAWAY: "goaway",
    FrameType.DATA: "fetch",
    FrameType.DONE: "fetch",
    FrameType.WANT: "put",
    FrameType.PUT_DONE: "put",
    FrameType.SUBSCRIBE: "subscribe",
    FrameType.LOAD_REPORT: "subscribe",
}


@pytest.mark.parametrize("way", ["whole", "byte by byte"])
@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("type", ANSWERS_TO, ids=lambda type: type.name)
def test_a_client_takes_every_frame(
    store: Store, type: FrameType, way: str, trailing: bool
) -> None:
    heard: list[Any] = []
    kind, message = ANSWERS_TO[type], FROM_SERVER[type]
    client = ClientProtocol(hello(), heard.append, heard.append)
    if kind != "welcome":
        deliver(client, frame(FrameType.WELCOME, 0, FROM_SERVER[FrameType.WELCOME]))
        heard.clear()
    client.call(9, FrameType.PING, Empty(), heard.append)
    fetch, put = FetchCall(store.geometry, KEYS[:3]), PutCall(store, KEYS[:3])
    data = frame(type, 0 if kind in ("welcome", "goaway") else 7, message, flags=1)
    if kind == "call":
        request = FrameType.LOOKUP if type is FrameType.ERROR else type
        client.call(7, request, FROM_CLIENT[request], heard.append)  # type: ignore[arg-type]
    elif kind == "subscribe":
        client.subscribe(7, Subscribe(), heard.append, heard.append)
    elif kind == "fetch":
        client.fetch(7, fetch.message(), fetch.transfer, heard.append)
        if type is FrameType.DATA:
            sums = store.checksums(KEYS[0])
            message = Data(checksums=sums, failed=(2,))
            data = frame(type, 7, message, store.block(KEYS[0]))
    elif kind == "put":
        client.put(7, put.message(), put.transfer, heard.append)
    after = b""
    if trailing and kind != "welcome":
        after = frame(FrameType.PING, 9, Empty(), flags=1) + data[:20]
    for part in pieces_of(data + after, way):
        deliver(client, part)
    if after:
        assert heard.pop() == Empty()
    if type is FrameType.DATA:
        assert fetch.check() == [HIT, None, MISS]
    elif type is FrameType.WANT:
        assert put.transfer.queued_bytes == 2 * BLOCK
    elif type is FrameType.ERROR:
        [error] = heard
        assert isinstance(error, LayoutMismatch)
        assert error.field == "dtype"
    else:
        assert heard == [message]


@pytest.mark.parametrize("type", [FrameType.SCRUB, FrameType.DRAIN])
def test_what_is_not_offered_yet_is_answered(pair: Pair, type: FrameType) -> None:
    replies = pair.call(type, Empty())
    pair.pump()
    assert isinstance(replies[0], Unsupported)
    assert str(replies[0]) == f"{type.name} is not supported here"
    with pytest.raises(RemoteProtocolError, match=f"{type.name} from a server"):
        welcomed_client(frame(type, 1))


@pytest.mark.parametrize("type", [FrameType.WELCOME, FrameType.DONE, FrameType.ERROR])
def test_frames_of_a_server_are_no_requests(store: Store, type: FrameType) -> None:
    server, _ = connected_server(store)
    deliver(server, frame(type, 3))
    assert said(server) == [FrameType.ERROR]
    with pytest.raises(RemoteProtocolError, match=f"{type.name} with id 0"):
        deliver(server, frame(type, 0))


# --- introductions ---------------------------------------------------------------------------


def test_introductions(store: Store) -> None:
    pair = Pair(store, cuts(1))
    pair.hooks.limits = Limits(keys_per_request=1 << 30, in_flight_bytes=5)
    pair.pump()
    assert pair.hooks.hellos == [hello()] == [pair.server.peer]
    [welcome] = pair.welcomes
    assert welcome is pair.client.welcome
    assert (welcome.version, welcome.node_id) == (1, "server")
    # A server may take more than this build can send.
    assert welcome.limits == Limits(keys_per_request=KEYS_PER_REQUEST_MAX, in_flight_bytes=5)


@pytest.mark.parametrize(
    ("window", "chosen"),
    [((1, 1), 1), ((0, 9), 1), ((1, 1 << 60), 1), ((2, 3), 0), ((0, 0), 0), ((5, 1), 0)],
)
def test_the_newest_version_that_both_speak(
    store: Store, window: tuple[int, int], chosen: int
) -> None:
    hooks = Hooks(store)
    hooks.protocol = server = ServerProtocol(hooks, MIB)
    data = frame(FrameType.HELLO, 0, hello(version_min=window[0], version_max=window[1]))
    if chosen:
        deliver(server, data)
        assert said(server) == [FrameType.WELCOME]
        return
    with pytest.raises(VersionMismatch, match=f"speaks versions {window[0]} to {window[1]}"):
        deliver(server, data)
    assert server.peer is None


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_choice_of_version_that_we_do_not_speak(version: int) -> None:
    client = ClientProtocol(hello(), lambda welcome: None, lambda goaway: None)
    welcome = msgspec.structs.replace(FROM_SERVER[FrameType.WELCOME], version=version)
    with pytest.raises(VersionMismatch, match=f"chose version {version}"):
        deliver(client, frame(FrameType.WELCOME, 0, welcome))  # type: ignore[arg-type]
    assert client.welcome is None


@pytest.mark.parametrize("type", [t for t in FrameType if t is not FrameType.HELLO])
def test_nothing_comes_before_hello(store: Store, type: FrameType) -> None:
    server = ServerProtocol(Hooks(store), MIB)
    with pytest.raises(RemoteProtocolError):
        deliver(server, frame(type, 1))


@pytest.mark.parametrize("type", [t for t in FrameType if t is not FrameType.WELCOME])
def test_nothing_comes_before_welcome(type: FrameType) -> None:
    client = ClientProtocol(hello(), lambda welcome: None, lambda goaway: None)
    with pytest.raises((RemoteProtocolError, RefusedError)):
        deliver(client, frame(type, 1, FROM_SERVER.get(type, b"")))  # type: ignore[arg-type]


def test_one_introduction_is_enough(store: Store, pair: Pair) -> None:
    server, _ = connected_server(store)
    with pytest.raises(RemoteProtocolError, match="HELLO with id 1"):
        deliver(server, frame(FrameType.HELLO, 1, hello()))
    with pytest.raises(RemoteProtocolError, match="WELCOME without a request id"):
        welcomed_client(frame(FrameType.WELCOME, 0, FROM_SERVER[FrameType.WELCOME]))


def test_a_server_that_turns_a_client_away_says_why(store: Store) -> None:
    pair = Pair(store)
    pair.hooks.hello = lambda hello, version: (_ for _ in ()).throw(Draining("bye"))
    with pytest.raises(Draining) as caught:
        pair.up(MIB)
    pair.server.refuse(caught.value)
    with pytest.raises(Draining, match="bye"):
        pair.down(MIB)


def test_last_words_fit_whatever_they_quote(store: Store) -> None:
    server = ServerProtocol(Hooks(store), MIB)
    data = frame(FrameType.HELLO, 0, b"\x81\xa4role\xdb\x00\x0f\x00\x00" + b"x" * 0xF0000)
    with pytest.raises(RemoteProtocolError) as caught:
        deliver(server, data)
    server.refuse(caught.value)
    assert server.writer.queued_bytes < 2000


# --- requests with one reply -----------------------------------------------------------------


def test_replies_find_their_requests(pair: Pair) -> None:
    pair.hooks.answers = {
        FrameType.LOOKUP: LookupReply(bitmap=b"\1"),
        FrameType.DELETE: Draining("not now"),
    }
    lookup = pair.call(FrameType.LOOKUP, Lookup(namespaces=(NAMESPACE,), keys=KEYS))
    delete = pair.call(FrameType.DELETE, FROM_CLIENT[FrameType.DELETE])  # type: ignore[arg-type]
    assert pair.client.call_count == 2
    pair.pump()
    assert lookup == [LookupReply(bitmap=b"\1")]
    assert isinstance(delete[0], Draining)
    assert pair.client.call_count == 0


def test_a_bad_request_fails_alone(store: Store) -> None:
    server, hooks = connected_server(store)
    deliver(server, frame(FrameType.LOOKUP, 1, b"\xc1"))
    deliver(server, frame(FrameType.LOOKUP, 2, b"\x80"))
    deliver(server, frame(FrameType.PING, 3))
    assert [request_id for _, request_id, _ in hooks.requests] == [3]
    assert said(server) == [FrameType.ERROR, FrameType.ERROR, FrameType.PING]


@pytest.mark.parametrize("type", [t for t in REQUESTS if t is not FrameType.DATA])
def test_a_request_has_an_id(store: Store, type: FrameType) -> None:
    server, _ = connected_server(store)
    with pytest.raises(RemoteProtocolError, match=f"{type.name} with id 0"):
        deliver(server, frame(type, 0, FROM_CLIENT[type]))  # type: ignore[arg-type]


def test_an_id_is_used_for_one_request_at_a_time(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    call = FetchCall(store.geometry, KEYS)
    request_id = pair.begin_fetch(call)
    with pytest.raises(LocalProtocolError, match=f"request id {request_id} is in use"):
        pair.client.call(request_id, FrameType.PING, Empty(), lambda reply: None)
    with pytest.raises(LocalProtocolError, match="request id 0 is in use"):
        pair.client.call(0, FrameType.PING, Empty(), lambda reply: None)
    pair.pump()
    assert call.check() == [HIT] * 6
    again = FetchCall(store.geometry, KEYS)
    pair.client.fetch(request_id, again.message(), again.transfer, again.replies.append)
    pair.pump()
    assert again.check() == [HIT] * 6


def test_a_peer_that_uses_an_id_twice_is_told(store: Store) -> None:
    store.late.update(KEYS)
    server, _ = connected_server(store)
    data = frame(FrameType.FETCH, 5, FetchCall(store.geometry, KEYS).message())
    put = frame(FrameType.PUT, 5, PutCall(store, KEYS).message())
    deliver(server, data + data + put)
    assert said(server) == [FrameType.ERROR] * 2
    assert server.request_count == 1


def test_a_message_too_long_to_send_leaves_nothing_behind(pair: Pair) -> None:
    with pytest.raises(LocalProtocolError, match="the limit is 1048576"):
        pair.call(FrameType.PUT, PutCall(pair.store, KEYS).message(checksums=bytes(MIB)))
    assert pair.client.call_count == 0


def test_an_answer_must_be_one_to_the_question() -> None:
    def answered_with(data: bytes) -> None:
        client = welcomed_client()
        client.call(7, FrameType.LOOKUP, FROM_CLIENT[FrameType.LOOKUP], bad.append)
        with pytest.raises(RemoteProtocolError):
            deliver(client, data)

    bad: list[Any] = []
    reply = LookupReply(bitmap=b"\1")
    for type, message in FROM_SERVER.items():
        if type not in (FrameType.LOOKUP, FrameType.ERROR):
            answered_with(frame(type, 7, message, flags=1))  # type: ignore[arg-type]
    answered_with(frame(FrameType.LOOKUP, 7, reply))  # not flagged as a reply
    answered_with(frame(FrameType.LOOKUP, 8, reply, flags=1))
    answered_with(frame(FrameType.LOOKUP, 0, reply, flags=1))
    answered_with(frame(FrameType.DATA, 7, b"", b"payload"))
    answered_with(frame(FrameType.ERROR, 8, FROM_SERVER[FrameType.ERROR]))  # type: ignore[arg-type]
    assert bad == []


PER_ITEM: list[tuple[FrameType, Message, Message, Message]] = [
    (
        FrameType.LOOKUP,
        Lookup(namespaces=(NAMESPACE,), keys=KEYS * 3),
        LookupReply(bitmap=bytes(count)),
        LookupReply(bitmap=bytes(3)),
    )
    for count in (0, 2, 4, 1_000_000)
] + [
    (type, request, wrong, right)
    for type, request, reply in (
        (
            FrameType.DELETE,
            Delete(namespace=NAMESPACE, keys=KEYS),
            lambda count: DeleteReply(deleted=bytes(count)),
        ),
        (
            FrameType.CORRUPT_REPORT,
            CorruptReport(namespace=NAMESPACE, keys=KEYS),
            lambda count: CorruptReply(dropped=bytes(count)),
        ),
        (
            FrameType.RELEASE,
            Release(leases=tuple(range(1, 7))),
            lambda count: ReleaseReply(held=(True,) * count),
        ),
    )
    for wrong, right in ((reply(0), reply(6)), (reply(5), reply(6)), (reply(7), reply(6)))
]


@pytest.mark.parametrize(("type", "request_", "wrong", "right"), PER_ITEM)
def test_a_reply_speaks_of_as_many_items_as_were_asked_for(
    type: FrameType, request_: Message, wrong: Message, right: Message
) -> None:
    client, replies = welcomed_client(), []
    client.call(5, type, request_, replies.append)
    with pytest.raises(RemoteProtocolError, match="expected"):
        deliver(client, frame(type, 5, wrong, flags=1))
    assert replies == []
    client.call(6, type, request_, replies.append)
    deliver(client, frame(type, 6, right, flags=1))
    assert replies == [right]


def test_a_peer_that_answers_nothing_is_not_asked_for_ever(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALLS_MAX", 3)
    silent = [pair.call(FrameType.PING, Empty()) for _ in range(5)]
    assert pair.client.call_count == 3
    for replies in silent[3:]:
        assert isinstance(replies[0], TransportError)
        assert str(replies[0]) == "3 requests are without a reply, the limit is 3"
    pair.pump()
    assert silent[:3] == [[Empty()]] * 3


def test_reports_follow_a_subscription_and_nothing_else(pair: Pair) -> None:
    replies: list[Any] = []
    reports: list[Any] = []
    pair.client.subscribe(77, Subscribe(), replies.append, reports.append)
    pair.pump()
    assert replies == [Empty()]
    for _ in range(3):
        pair.server.report(77, encode(REPORT))
    pair.pump()
    assert reports == [REPORT] * 3
    assert pair.client.call_count == 1
    pair.server.reply(FrameType.SUBSCRIBE, 77, Empty())
    with pytest.raises(RemoteProtocolError, match="SUBSCRIBE does not answer"):
        pair.pump()
    assert replies == [Empty()]
    with pytest.raises(RemoteProtocolError, match="is not under way"):
        welcomed_client(frame(FrameType.LOAD_REPORT, 1, REPORT))  # type: ignore[arg-type]


def test_a_subscription_can_be_refused(pair: Pair) -> None:
    pair.hooks.answers[FrameType.SUBSCRIBE] = LimitExceeded("one is enough")
    replies: list[Any] = []
    pair.client.subscribe(77, Subscribe(), replies.append, replies.append)
    pair.pump()
    assert isinstance(replies[0], LimitExceeded)
    assert pair.client.call_count == 0


def test_goaway_leaves_what_is_under_way_alone(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    call = FetchCall(store.geometry, KEYS)
    pair.begin_fetch(call)
    pair.server.goaway("shutting down")
    pair.pump()
    assert pair.goaways == [Goaway(reason="shutting down")]
    assert call.check() == [HIT] * 6


def test_an_error_without_an_id_ends_the_connection() -> None:
    error = Error(code=ErrorCode.PROTOCOL, message="what was that")
    with pytest.raises(TransportError, match="what was that"):
        welcomed_client(frame(FrameType.ERROR, 0, error))


def test_a_peer_that_asks_and_does_not_read_is_dropped(store: Store) -> None:
    server, hooks = connected_server(store)
    hooks.answers[FrameType.STATUS] = Error(code=ErrorCode.REFUSED, message="x" * 100_000)
    data = frame(FrameType.STATUS, 5)
    with pytest.raises(LimitExceeded, match=f"the limit is {OUTPUT_BYTES_MAX}"):
        deliver(server, data * 1000)
    assert OUTPUT_BYTES_MAX < server.writer.queued_bytes < OUTPUT_BYTES_MAX + 101_000
    # One that does read may ask as often as it likes.
    server, hooks = connected_server(store)
    for _ in range(1000):
        deliver(server, frame(FrameType.PING, 5))
        take(server.writer, MIB)


def test_a_request_that_is_refused_is_told_of_wherever_it_was_refused(store: Store) -> None:
    server, hooks = connected_server(store)
    hooks.answers[FrameType.DELETE] = LimitExceeded("too many")
    ask = {"namespaces": [NAMESPACE], "keys": [b"short"]}
    deliver(server, frame(FrameType.LOOKUP, 1, msgspec.msgpack.encode(ask)))
    deliver(server, frame(FrameType.SCRUB, 2))
    deliver(server, frame(FrameType.DELETE, 3, FROM_CLIENT[FrameType.DELETE]))
    deliver(server, frame(FrameType.PING, 4, Empty()))
    assert said(server) == [FrameType.ERROR] * 3 + [FrameType.PING]
    assert [(type, error.__class__) for type, error in hooks.refusals] == [
        (FrameType.LOOKUP, RemoteProtocolError),
        (FrameType.SCRUB, Unsupported),
        (FrameType.DELETE, LimitExceeded),
    ]


# --- memory for what a peer says -------------------------------------------------------------


def test_who_has_not_said_hello_gets_little_memory(store: Store) -> None:
    hooks = Hooks(store)
    hooks.protocol = server = ServerProtocol(hooks, MIB)
    assert HELLO_BYTES_MAX < 64 * 1024
    long = hello(node_id="n" * 256, token="t" * 4096, capabilities=("c" * 64,) * 64)
    deliver(server, frame(FrameType.HELLO, 0, long))
    assert hooks.hellos == [long]
    # Whoever is known may say more.
    deliver(server, frame(FrameType.LOOKUP, 1, bytes(HELLO_BYTES_MAX + 1)))
    assert said(server) == [FrameType.WELCOME, FrameType.ERROR]
    server = ServerProtocol(hooks, MIB)
    head = frame(FrameType.HELLO, 0, bytes(HELLO_BYTES_MAX + 1))[:HEADER_BYTES]
    with pytest.raises(RemoteProtocolError, match=f"limit is {HELLO_BYTES_MAX}"):
        deliver(server, head)


@pytest.mark.parametrize("type", [FrameType.FETCH, FrameType.PUT])
def test_requests_under_way_hold_so_much_metadata_and_no_more(
    store: Store, type: FrameType, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, hooks = connected_server(store)
    store.late.update(KEYS)
    if type is FrameType.FETCH:
        ask = frame(type, 1, FetchCall(store.geometry, KEYS[:1]).message())
    else:
        ask = frame(type, 1, PutCall(store, KEYS[:1]).message())
    size = len(ask) - HEADER_BYTES
    monkeypatch.setattr(server_module, "HELD_METADATA_BYTES_MAX", 3 * size)

    def send(number: int) -> None:
        deliver(server, frame(type, number, ask[HEADER_BYTES:]))

    for number in range(1, 6):
        send(number)
    assert server.request_count == 3
    assert [(kind, error.__class__) for kind, error in hooks.refusals] == [
        (type, LimitExceeded)
    ] * 2
    assert f"would be {4 * size} bytes, the limit is {3 * size}" in str(hooks.refusals[0][1])
    said(server)
    # What needs none always passes; and where one ends there is room for another.
    deliver(server, frame(FrameType.PING, 10, Empty()))
    deliver(server, frame(FrameType.RELEASE, 11, FROM_CLIENT[FrameType.RELEASE]))
    deliver(server, frame(FrameType.CANCEL, 12, Cancel(request_id=2)))
    assert {FrameType.PING, FrameType.RELEASE, FrameType.CANCEL} <= set(said(server))
    send(20)
    send(21)
    assert server.request_count == 3
    assert len(hooks.refusals) == 3
    server.lost(LOST)


def test_cancel_of_what_is_unknown(pair: Pair) -> None:
    replies = pair.call(FrameType.CANCEL, Cancel(request_id=99))
    pair.client.abandon(99)
    pair.pump()
    assert replies == [CancelReply(found=False)]


def test_a_call_is_answered_once_the_connection_is_gone(store: Store, pair: Pair) -> None:
    """Whoever asks on a connection that is gone hears so at once."""
    fetch, put = FetchCall(store.geometry, KEYS), PutCall(store, KEYS)
    again: list[Any] = []

    def ask_again(reply: Any) -> None:
        pair.client.call(55, FrameType.PING, Empty(), again.append)

    pair.client.call(54, FrameType.PING, Empty(), ask_again)
    pair.lose(LOST)
    assert again == [LOST]
    pair.begin_fetch(fetch)
    pair.begin_put(put)
    pair.client.subscribe(56, Subscribe(), again.append, again.append)
    assert fetch.replies + put.replies + again == [LOST] * 4
    assert pair.client.call_count == 0
