"""The shell of a connection: when it sends, whom it wakes, and how it ends.

With streams that do what a script says, on a loop that stands still. Conversations over real
sockets are in tests/contract.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from kvstore.errors import RefusedError, RemoteProtocolError, TransportError, VersionMismatch
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.transport.connection import CALLS_PER_TURN_MAX, LAST_WORDS_S
from kvstore.wire import HEADER_BYTES, FrameType
from tests.support.engine import key
from tests.support.frames import (
    FetchCall,
    Pair,
    PutCall,
    Store,
    frame as encode_frame,
    hello,
    sent_types,
    take,
)
from tests.support.scripts import DESCRIPTOR, Rig, ping

FULL = BlockingIOError()
READER, WRITER = True, True
BROKEN = TransportError("the stream broke")
KEYS = [key(number) for number in range(4)]


@pytest.fixture
def rig() -> Rig:
    """A connection that is idle."""
    made = Rig()
    made.settle()
    return made


# --- when it sends -------------------------------------------------------------------------


def test_first_words_go_out_in_the_next_turn_of_the_loop() -> None:
    rig = Rig(Pair(Store(100)).client)
    assert rig.stream.sends == 0
    assert rig.loop.changes == [("+reader", DESCRIPTOR)]
    rig.loop.run_soon()
    assert sent_types(bytes(rig.stream.sent)) == [FrameType.HELLO]
    assert rig.stream.sends == 1
    assert rig.waits_for == (READER, not WRITER)


def test_what_is_said_within_a_turn_goes_out_with_one_call(rig: Rig) -> None:
    for number in range(5):
        rig.talk.say(bytes([number]))
    assert rig.stream.sends == 0
    assert rig.loop.run_soon() == 1
    assert rig.stream.sent == bytes(range(5))
    assert rig.stream.sends == 1


def test_answers_go_out_at_the_end_of_the_turn_that_brought_the_question(rig: Rig) -> None:
    rig.talk.at_frame = lambda: rig.talk.say(b"answer")
    rig.arrive(ping(1) + ping(2))
    assert rig.stream.sent == b"answeranswer"
    assert rig.stream.sends == 1
    assert rig.loop.run_soon() == 0, "the flush was scheduled although the turn took it along"


def test_nothing_to_say_costs_no_call(rig: Rig) -> None:
    rig.arrive(ping(1))
    assert rig.stream.sends == 0
    assert rig.loop.changes == []


def test_stream_that_takes_a_byte_at_a_time_is_waited_for_and_loses_nothing(rig: Rig) -> None:
    released: list[int] = []
    rig.stream.room.extend([1] * 7)
    rig.talk.say(b"abc", lambda: released.append(3))
    rig.talk.say(b"defg", lambda: released.append(7))
    rig.loop.run_soon()
    assert rig.loop.changes == [("+writer", DESCRIPTOR)]
    for count in range(2, 8):
        rig.writable()
        assert rig.stream.sends == count, "a short send says that the stream is full"
        assert released == [end for end in (3, 7) if end <= count]
    assert rig.stream.sent == b"abcdefg"
    assert rig.loop.changes == [("+writer", DESCRIPTOR), ("-writer", DESCRIPTOR)]


def test_full_stream_is_registered_for_once_and_tried_once_an_event(rig: Rig) -> None:
    rig.stream.room.extend([FULL] * 50)
    rig.talk.say(b"abc")
    rig.loop.run_soon()
    for _ in range(49):
        rig.writable()
    assert rig.stream.sends == 50
    assert rig.loop.changes == [("+writer", DESCRIPTOR)]
    rig.writable()
    assert rig.stream.sent == b"abc"
    assert rig.waits_for == (READER, not WRITER)


def test_while_the_loop_watches_the_stream_nothing_else_flushes(rig: Rig) -> None:
    rig.stream.room.append(FULL)
    rig.talk.say(b"abc")
    rig.loop.run_soon()
    rig.talk.say(b"def")
    assert rig.loop.run_soon() == 0
    rig.talk.at_frame = lambda: rig.talk.say(b"ghi")
    rig.arrive(ping(1))
    assert rig.stream.sends == 1
    rig.writable()
    assert rig.stream.sent == b"abcdefghi"


def test_flush_that_was_scheduled_before_the_stream_was_full_does_nothing(rig: Rig) -> None:
    rig.talk.say(b"abc")
    rig.stream.room.append(FULL)
    rig.arrive(ping(1))
    assert (rig.stream.sends, rig.waits_for) == (1, (READER, WRITER))
    rig.loop.run_soon()
    assert rig.stream.sends == 1


def test_sender_with_no_end_lets_others_have_their_turn(rig: Rig) -> None:
    rig.talk.ready.extend((bytes([number]), lambda: None) for number in range(20))
    rig.talk.say(b"x")
    rig.loop.run_soon()
    assert rig.stream.sends == CALLS_PER_TURN_MAX
    assert rig.waits_for == (READER, WRITER)
    while rig.waits_for[1]:
        rig.writable()
    assert rig.stream.sent == b"x" + bytes(range(20))


def test_peer_with_no_end_lets_others_have_their_turn(rig: Rig) -> None:
    # The reader asks for a header, then for the rest and the next header, and so on.
    everything = b"".join(map(ping, range(1, 50)))
    rig.arrive(everything)
    assert rig.stream.receives == CALLS_PER_TURN_MAX
    while rig.stream.arriving:
        rig.arrive()
    assert [found.header.request_id for found in rig.talk.frames] == list(range(1, 50))


def test_protocol_that_has_more_to_fill_lets_others_have_their_turn(rig: Rig) -> None:
    left = [b"a", b"", b"b", b""]

    def fill() -> None:
        data = left.pop(0) if left else b""
        rig.talk.unfilled = bool(left)
        if data:
            rig.talk.ready.append((data, lambda: None))

    rig.talk.at_fill = fill
    rig.talk.fills = 0
    rig.talk.on_output()
    rig.loop.run_soon()
    assert (rig.talk.fills, rig.waits_for) == (1, (READER, WRITER))
    for fills in (2, 3):
        rig.writable()
        assert (rig.talk.fills, rig.waits_for) == (fills, (READER, WRITER))
    rig.writable()
    assert rig.stream.sent == b"ab"
    assert (rig.talk.fills, rig.waits_for) == (4, (READER, not WRITER))


def test_short_receive_ends_the_turn_unless_more_of_the_frame_is_due(rig: Rig) -> None:
    rig.arrive(ping(1)[:10])
    rig.arrive(ping(1)[10:20])
    assert rig.stream.receives == 4  # asked once more each time, in vain
    for byte in ping(1)[20:]:
        rig.arrive(bytes([byte]))
    assert len(rig.talk.frames) == 1
    asked = rig.stream.receives
    rig.arrive(ping(2))
    assert len(rig.talk.frames) == 2
    assert rig.stream.receives == asked + 2  # a header, then its metadata and no more


def test_false_alarms_are_harmless_and_are_no_sign_of_life(rig: Rig) -> None:
    begun = rig.loop.time()
    rig.loop.advance(10.0)
    for _ in range(50):
        rig.arrive()
    assert (rig.connection.received_at, rig.connection.sent_at) == (begun, begun)
    rig.arrive(ping(1)[:1])
    assert (rig.connection.received_at, rig.connection.sent_at) == (begun + 10.0, begun)


def test_peer_that_takes_nothing_is_measured_from_when_there_was_something(rig: Rig) -> None:
    begun = rig.loop.time()
    rig.loop.advance(10.0)
    rig.stream.room.extend([FULL, FULL, 2, FULL])
    rig.talk.say(b"abc")
    rig.loop.run_soon()
    assert rig.connection.sent_at == begun + 10.0
    rig.loop.advance(5.0)
    rig.writable()
    rig.arrive(ping(1))
    assert rig.connection.sent_at == begun + 10.0, "what comes does not count"
    rig.writable()
    assert rig.connection.sent_at == begun + 15.0
    rig.loop.advance(5.0)
    rig.writable()
    assert rig.connection.sent_at == begun + 15.0
    rig.writable()
    assert (rig.stream.sent, rig.connection.sent_at) == (b"abc", begun + 20.0)


# --- how it ends ---------------------------------------------------------------------------


def test_close_unregisters_closes_and_tells_once_in_this_order(rig: Rig) -> None:
    rig.stream.room.append(FULL)
    rig.talk.say(b"abc")
    rig.loop.run_soon()
    at_loss: list[tuple[int, int, bool]] = []
    rig.talk.at_loss = lambda: at_loss.append(
        (rig.stream.closes, len(rig.closed), rig.connection.closed)
    )
    rig.connection.close(BROKEN)
    rig.connection.close(TransportError("again"))
    rig.connection.close_when_sent(TransportError("and again"))
    assert rig.loop.changes == [
        ("+writer", DESCRIPTOR),
        ("-reader", DESCRIPTOR),
        ("-writer", DESCRIPTOR),
    ]
    assert at_loss == [(1, 0, True)]
    assert (rig.stream.closes, rig.talk.losses, rig.closed) == (1, [BROKEN], [BROKEN])
    assert not rig.stream.sent


def test_what_was_scheduled_before_the_close_does_nothing_after_it(rig: Rig) -> None:
    rig.talk.say(b"abc")
    rig.connection.close(BROKEN)
    rig.talk.say(b"def")
    rig.loop.run_soon()
    assert rig.stream.sends == 0
    assert rig.loop.pending == []


def test_owner_may_close_again_when_it_is_told(rig: Rig) -> None:
    other = Rig()
    other.connection._on_closed = lambda reason: other.connection.close(reason)
    other.connection.close(BROKEN)
    assert other.stream.closes == 1


@pytest.mark.parametrize(
    ("before", "where"), [(b"", "between"), (ping(1), "between"), (ping(1)[:-1], "inside")]
)
def test_end_of_the_stream_says_whether_it_cut_a_frame(before: bytes, where: str) -> None:
    rig = Rig()
    if before:
        rig.arrive(before)
    while rig.stream.arriving:
        rig.arrive()
    rig.arrive(b"")
    (reason,) = rig.closed
    assert isinstance(reason, TransportError)
    assert f"the script closed the connection {where}" in str(reason)
    assert rig.stream.sends == 0


def test_frames_before_an_error_of_the_stream_are_handled(rig: Rig) -> None:
    # The first receive gets a header, the second the rest and no more than another header.
    rig.arrive(ping(1) + ping(2)[:HEADER_BYTES], BROKEN)
    while not rig.closed:
        rig.arrive()
    assert len(rig.talk.frames) == 1
    assert rig.closed == [BROKEN]


def test_error_while_sending_ends_the_connection(rig: Rig) -> None:
    rig.stream.room.extend([2, FULL, BROKEN])
    released: list[str] = []
    rig.talk.say(b"abc", lambda: released.append("abc"))
    rig.loop.run_soon()
    rig.writable()
    assert (released, rig.connection.closed) == ([], False)
    rig.writable()
    assert rig.closed == rig.talk.losses == [BROKEN]
    assert (rig.waits_for, released) == ((not READER, not WRITER), ["abc"])


# --- last words ----------------------------------------------------------------------------


def test_peer_that_breaks_the_protocol_is_told_and_left() -> None:
    pair = Pair(Store(100))
    rig = Rig(pair.server)
    rig.arrive(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(200))
    assert sent_types(bytes(rig.stream.sent)) == [FrameType.ERROR]
    assert (rig.stream.ends, rig.closed) == (1, [])
    rig.arrive(bytes(5000), encode_frame(FrameType.HELLO, 0, hello()))
    rig.arrive(b"")
    (reason,) = rig.closed
    assert isinstance(reason, RemoteProtocolError)
    assert pair.hooks.hellos == [], "what a broken stream brings is not looked at"
    assert sent_types(bytes(rig.stream.sent)) == [FrameType.ERROR]


def test_peer_that_never_closes_is_not_waited_for_long(rig: Rig) -> None:
    rig.arrive(bytes(HEADER_BYTES))
    assert (bytes(rig.stream.sent), rig.stream.ends) == (b"refused", 1)
    for _ in range(9):
        rig.loop.advance(0.1 * LAST_WORDS_S)
        rig.arrive(bytes(100))
        rig.talk.say(b"a report that is too late")
    assert not rig.closed
    rig.loop.advance(0.2 * LAST_WORDS_S)
    assert isinstance(rig.closed[0], RemoteProtocolError)
    assert rig.stream.sent == b"refused"
    assert rig.waits_for == (not READER, not WRITER)


def test_peer_with_no_end_of_input_does_not_hold_up_others_at_the_end(rig: Rig) -> None:
    rig.arrive(bytes(HEADER_BYTES))
    rig.stream.receives = 0
    rig.arrive(*[b"x"] * 50)
    assert rig.stream.receives == CALLS_PER_TURN_MAX


def test_stream_that_breaks_after_the_last_words_ends_them(rig: Rig) -> None:
    rig.arrive(bytes(HEADER_BYTES))
    rig.arrive(BROKEN)
    assert isinstance(rig.closed[0], RemoteProtocolError), "the first reason counts"


def test_who_does_not_explain_itself_does_not_wait(rig: Rig) -> None:
    rig.talk.refuse = lambda error: None  # type: ignore[method-assign]
    rig.stream.room.append(FULL)
    rig.talk.say(b"a request of ours")
    rig.loop.run_soon()
    rig.arrive(bytes(HEADER_BYTES))
    assert isinstance(rig.closed[0], RemoteProtocolError)


def test_last_words_come_after_what_was_queued_before_and_nothing_after_them(rig: Rig) -> None:
    rig.stream.room.extend([FULL, FULL, 4])
    rig.talk.say(b"queued ")
    rig.loop.run_soon()
    rig.talk.ready.append((b"payload", lambda: None))
    rig.arrive(bytes(HEADER_BYTES))
    # Nothing else is handled, and the one writer goes on.
    rig.arrive(ping(1))
    rig.arrive(b"")
    assert rig.waits_for == (not READER, WRITER)
    while not rig.closed:
        rig.writable()
    assert rig.stream.sent == b"queued refused"
    assert rig.talk.frames == []
    assert isinstance(rig.closed[0], RemoteProtocolError)
    assert rig.loop.changes.count(("+writer", DESCRIPTOR)) == 1
    assert rig.loop.changes.count(("-writer", DESCRIPTOR)) == 1


def test_peer_that_does_not_take_the_last_words_is_not_waited_for_long(rig: Rig) -> None:
    rig.stream.room.extend([3, *[FULL] * 100])
    rig.talk.say(b"abcdef")
    reason = RefusedError("no")
    rig.connection.close_when_sent(reason)
    rig.connection.close_when_sent(RefusedError("the first reason counts"))
    rig.loop.advance(0.9 * LAST_WORDS_S)
    rig.writable()
    assert not rig.closed
    rig.loop.advance(0.2 * LAST_WORDS_S)
    assert (rig.closed, rig.stream.closes) == ([reason], 1)
    assert rig.stream.sent == b"abc"
    assert rig.waits_for == (not READER, not WRITER)


def test_last_words_that_trickle_out_in_time_close_at_their_end(rig: Rig) -> None:
    rig.stream.room.extend([1] * 5)
    rig.talk.say(b"abcdef")
    reason = RefusedError("no")
    rig.connection.close_when_sent(reason)
    for _ in range(5):
        assert rig.stream.ends == 0
        rig.writable()
    assert (rig.stream.ends, bytes(rig.stream.sent)) == (1, b"abcdef")
    assert not rig.closed
    rig.arrive(b"")
    assert rig.closed == [reason]
    rig.loop.advance(2 * LAST_WORDS_S)
    assert (rig.closed, rig.stream.closes) == ([reason], 1)


def test_nothing_to_say_at_the_end_closes_at_once(rig: Rig) -> None:
    rig.connection.close_when_sent(BROKEN)
    assert rig.closed == [BROKEN]
    assert rig.loop.pending == []


def test_stream_that_breaks_under_the_last_words_ends_them(rig: Rig) -> None:
    rig.stream.room.extend([FULL, BROKEN])
    rig.talk.say(b"abc")
    rig.connection.close_when_sent(RefusedError("no"))
    rig.writable()
    assert rig.closed == [BROKEN]
    rig.loop.advance(2 * LAST_WORDS_S)
    assert rig.closed == [BROKEN]


def test_client_that_is_turned_away_closes_with_the_reason() -> None:
    pair = Pair(Store(100))
    answering = Rig(pair.server)
    asking = Rig(pair.client)
    asking.loop.run_soon()
    answering.arrive(encode_frame(FrameType.HELLO, 0, hello(version_min=99, version_max=99)))
    assert answering.stream.ends == 1
    asking.arrive(bytes(answering.stream.sent))
    while not asking.closed:
        asking.arrive()
    assert isinstance(asking.closed[0], VersionMismatch)
    answering.arrive(b"")
    assert isinstance(answering.closed[0], VersionMismatch)


# --- closed from inside --------------------------------------------------------------------


def test_protocol_may_close_the_connection_while_it_handles_a_frame(rig: Rig) -> None:
    rig.talk.at_frame = lambda: rig.connection.close(BROKEN)
    rig.arrive(b"".join(map(ping, range(1, 9))))
    while rig.stream.arriving and not rig.closed:
        rig.arrive()
    assert len(rig.talk.frames) == 1
    assert (rig.stream.sends, rig.closed, rig.talk.fills) == (0, [BROKEN], 1)
    assert rig.waits_for == (not READER, not WRITER)


def test_protocol_may_end_the_connection_with_last_words_while_it_handles_a_frame(
    rig: Rig,
) -> None:
    def leave() -> None:
        rig.stream.room.append(FULL)
        rig.talk.say(b"bye")
        rig.connection.close_when_sent(BROKEN)

    rig.talk.at_frame = leave
    rig.arrive(b"".join(map(ping, range(1, 9))))
    assert len(rig.talk.frames) == 1
    assert rig.stream.receives == 2, "it goes on handling although it is leaving"
    rig.writable()
    rig.arrive()
    assert (rig.stream.ends, bytes(rig.stream.sent)) == (1, b"bye")
    rig.arrive(b"")
    assert (rig.closed, len(rig.talk.frames)) == ([BROKEN], 1)


def test_protocol_may_close_the_connection_while_it_is_asked_for_payload(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.talk.at_fill = lambda: rig.connection.close(BROKEN)
    rig.talk.say(b"abc")
    rig.loop.run_soon()
    assert (rig.stream.sends, rig.closed) == (0, [BROKEN])
    assert caplog.records == []


@pytest.mark.parametrize("room", [3, 1])
def test_owner_of_memory_may_close_the_connection_when_it_gets_it_back(
    rig: Rig, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[str] = []

    def first() -> None:
        released.append("first")
        rig.connection.close(BROKEN)

    rig.stream.room.append(room)
    rig.talk.say(b"a", first)
    rig.talk.say(b"bc", lambda: released.append("second"))
    rig.talk.ready.extend((b"payload", lambda: released.append("payload")) for _ in range(2))
    fills = rig.talk.fills
    rig.loop.run_soon()
    assert released == ["first", "second", "payload"]
    assert (rig.stream.sends, rig.talk.fills - fills) == (1, 1)
    assert rig.closed == [BROKEN]
    assert rig.waits_for == (not READER, not WRITER)
    assert caplog.records == []


# --- mistakes of our own -------------------------------------------------------------------


def wrong() -> None:
    """What a mistake in a protocol comes to."""
    raise ValueError("a mistake")


@pytest.mark.parametrize("where", ["frame", "fill", "sent"])
def test_mistake_ends_this_connection_and_is_logged(
    rig: Rig, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[str] = []
    rig.stream.room.append(1)
    rig.talk.say(b"a", wrong if where == "sent" else None)
    rig.talk.say(b"b", lambda: released.append("b"))
    if where == "fill":
        rig.talk.at_fill = wrong
    elif where == "frame":
        rig.talk.at_frame = wrong
        rig.arrive(ping(1))
    rig.loop.run_soon()
    (reason,) = rig.closed
    assert isinstance(reason, TransportError)
    assert "internal error: ValueError('a mistake')" in str(reason)
    assert (rig.talk.losses, rig.stream.closes, released) == ([reason], 1, ["b"])
    (record,) = caplog.records
    assert (record.levelno, record.exc_info is not None) == (logging.ERROR, True)


def test_mistake_at_the_end_hides_it_from_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[str] = []
    rig.talk.say(b"abc", lambda: released.append("abc"))
    rig.talk.at_loss = wrong
    rig.connection.close(BROKEN)
    assert (rig.closed, released) == ([BROKEN], ["abc"])
    assert ["at its end" in record.getMessage() for record in caplog.records] == [True]


# --- what it had borrowed ------------------------------------------------------------------


def close(rig: Rig) -> None:
    """We close."""
    rig.connection.close(BROKEN)


def end(rig: Rig) -> None:
    """The peer closes."""
    rig.arrive(b"")


def break_while_sending(rig: Rig) -> None:
    """The stream breaks."""
    rig.stream.room.append(BROKEN)
    rig.writable()


@pytest.mark.parametrize("how", [close, end, break_while_sending])
@pytest.mark.parametrize("room", [0, 1, 5000])
def test_lost_connection_gives_back_every_chunk(how: Callable[[Rig], None], room: int) -> None:
    store = Store(3000, 1000)
    store.fill(*KEYS)
    store.chunk_bytes = 2500
    pair = Pair(store)
    rig = Rig(pair.server)
    rig.arrive(take(pair.client.writer, 10_000))
    call = FetchCall(store.geometry, KEYS)
    pair.client.fetch(1, call.message(), call.transfer, call.replies.append)
    rig.stream.room.append(room or FULL)
    rig.arrive(take(pair.client.writer, 10_000))
    assert store.lent > 0
    how(rig)
    assert store.lent == 0
    assert pair.hooks.ended == [1]
    assert pair.server.request_count == 0
    assert len(rig.closed) == 1


@pytest.mark.parametrize("how", [close, end])
@pytest.mark.parametrize("arrived", [0, 1, 5000])
def test_lost_connection_ends_every_reservation(how: Callable[[Rig], None], arrived: int) -> None:
    store = Store(3000, 1000)
    pair = Pair(store)
    rig = Rig(pair.server)
    rig.arrive(take(pair.client.writer, 10_000))
    call = PutCall(store, KEYS)
    pair.client.put(1, call.message(), call.transfer, call.replies.append)
    rig.arrive(take(pair.client.writer, 10_000))
    client = Rig(pair.client)
    client.arrive(bytes(rig.stream.sent))
    assert store.held == len(KEYS)
    if arrived:
        rig.arrive(bytes(client.stream.sent[:arrived]))
    how(rig)
    assert (store.held, pair.hooks.ended) == (0, [1])
    assert set(store.blocks) <= {KEYS[0]}


def test_lost_client_ends_its_calls_and_lets_go_of_its_memory() -> None:
    store = Store(3000, 1000)
    pair = Pair(store)
    pair.pump()
    rig = Rig(pair.client)
    rig.loop.run_soon()
    fetch, put = FetchCall(store.geometry, KEYS), PutCall(store, KEYS)
    pair.begin_fetch(fetch)
    pair.begin_put(put)
    rig.loop.run_soon()
    rig.connection.close(BROKEN)
    assert fetch.replies == put.replies == [BROKEN]
    assert fetch.transfer.abandoned
    assert put.transfer.idle
    assert FetchOutcome.HIT not in fetch.transfer.outcomes
    assert PutOutcome.STORED not in put.transfer.outcomes
