"""Puts from one side to the other, and what a broken connection leaves: nothing."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from kvstore.errors import RemoteProtocolError
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
from kvstore.protocol import ServerProtocol, server as module
from kvstore.wire import HEADER_BYTES, FrameType
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
    connected_server,
    cuts,
    deliver,
    frame,
    said,
    take,
    welcomed_client,
)
from tests.support.placed import PlacedPair

STORED, EXISTS, CONFLICT, FULL = (
    PutOutcome.STORED,
    PutOutcome.EXISTS,
    PutOutcome.CONFLICT,
    PutOutcome.FULL,
)
UNAVAILABLE = PutOutcome.UNAVAILABLE


@pytest.fixture
def store() -> Store:
    return Store(*LAYERS)


@pytest.fixture
def pair(store: Store) -> Pair:
    made = Pair(store)
    made.pump()
    return made


@pytest.mark.parametrize(("kind", "sent_bytes"), [(Pair, 4 * BLOCK), (PlacedPair, 0)])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("budget", [1, BLOCK, 3 * BLOCK, MIB])
def test_a_put(
    store: Store, budget: int, scattered: bool, kind: type[Pair], sent_bytes: int
) -> None:
    """Through the stream, and beside it."""
    store.fill(KEYS[1])
    store.blocks[KEYS[4]] = store.block(KEYS[4], version=1)
    pair = kind(store, cuts(budget), budget)
    pair.pump()
    call = PutCall(store, KEYS, scattered)
    pair.begin_put(call)
    pair.pump()
    assert call.outcomes() == [STORED, EXISTS, STORED, STORED, CONFLICT, STORED]
    assert [type(reply) for reply in call.replies] == [PutDone]
    assert all(store.blocks[name] == store.block(name) for name in KEYS if name != KEYS[4])
    assert store.blocks[KEYS[4]] == store.block(KEYS[4], version=1)
    assert call.transfer.sent_bytes == sent_bytes
    assert call.transfer.idle
    assert all(target.intact for target in store.targets)
    check_idle(pair)


@pytest.mark.parametrize("budget", [1, BLOCK, 2 * BLOCK, 4 * BLOCK])
def test_reservations_stay_within_the_budget(store: Store, budget: int) -> None:
    pair = Pair(store, cuts(3), budget)
    pair.pump()
    call = PutCall(store, KEYS)
    pair.begin_put(call)
    most = 0
    while pair.up(29) + pair.down(29):
        most = max(most, store.held * BLOCK)
    assert call.outcomes() == [STORED] * 6
    assert most == max(budget, BLOCK)


def test_puts_share_the_budget_and_each_goes_on(store: Store) -> None:
    pair = Pair(store, cuts(4), 2 * BLOCK)
    pair.pump()
    calls = [PutCall(store, [key(10 * n + m) for m in range(10)]) for n in range(5)]
    for call in calls:
        pair.begin_put(call)
    most = 0
    while pair.up(61) + pair.down(61):
        most = max(most, store.held)
    assert [call.outcomes() for call in calls] == [[STORED] * 10] * 5
    assert most == 2


def test_puts_whose_client_sends_nothing_reserve_no_more_than_the_budget(store: Store) -> None:
    server, hooks = connected_server(store, 4 * BLOCK)
    calls = {n: PutCall(store, [key(10 * n + m) for m in range(2)]) for n in range(1, 9)}
    for number, call in calls.items():
        deliver(server, frame(FrameType.PUT, number, call.message()))
    assert store.held == 4
    # What has to be sent for none of its blocks does not wait.
    store.fill(*KEYS[:2])
    deliver(server, frame(FrameType.PUT, 20, PutCall(store, KEYS[:2]).message()))
    assert hooks.ended == [20]
    # The first of them ends at its deadline: those that came next get its room, in order.
    assert server.stop_request(1)
    assert server.stop_request(2)
    said(server)
    assert (store.held, [n for n in calls if reserved(server, n)]) == (4, [3, 4])
    for number in range(3, 9):
        assert server.stop_request(number)
    assert (store.held, server.request_count, len(hooks.ended)) == (0, 0, 9)


def reserved(server: ServerProtocol, request_id: int) -> int:
    """What a put has reserved."""
    put = server._puts.get(request_id)
    return put.stream.reserved_bytes if put else 0


def test_puts_take_turns_when_room_comes(store: Store) -> None:
    server, _ = connected_server(store, BLOCK)
    calls = [PutCall(store, [key(10 * n + m) for m in range(4)]) for n in range(3)]
    for number, call in enumerate(calls, 1):
        deliver(server, frame(FrameType.PUT, number, call.message()))
    turns = []
    while server.request_count:
        (number,) = (n for n in (1, 2, 3) if reserved(server, n))
        turns.append(number)
        index = turns.count(number) - 1
        data = store.block(calls[number - 1].keys[index])
        deliver(server, frame(FrameType.DATA, number, b"", data, piece=index))
    # The first was alone, and wanted more before the others came.
    assert turns == [1, *[1, 2, 3] * 3, 2, 3]
    assert len(store.blocks) == 12


def test_a_block_larger_than_the_budget_travels_alone(store: Store) -> None:
    server, _ = connected_server(store, BLOCK // 2)
    for number, name in enumerate(KEYS[:3], 1):
        deliver(server, frame(FrameType.PUT, number, PutCall(store, [name]).message()))
    for number, name in enumerate(KEYS[:3], 1):
        assert store.held == 1
        deliver(server, frame(FrameType.DATA, number, b"", store.block(name)))
    assert store.blocks.keys() == set(KEYS[:3])


def test_puts_get_room_a_few_at_a_time(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PUTS_PER_TURN_MAX", 2)
    server, hooks = connected_server(store, BLOCK)
    deliver(server, frame(FrameType.PUT, 1, PutCall(store, KEYS[:1]).message()))
    for number in range(2, 12):
        deliver(server, frame(FrameType.PUT, number, PutCall(store, KEYS[1:2]).message()))
    # All of them wait for the same block, which is there by then.
    store.fill(KEYS[1])
    assert server.stop_request(1)
    counts = [len(hooks.ended)]
    while True:
        server.fill()
        counts.append(len(hooks.ended))
        if not server.unfilled:
            break
    assert counts == [3, 5, 7, 9, 11]
    assert server.request_count == 0


def test_a_full_store_is_an_outcome(store: Store, pair: Pair) -> None:
    store.room = 2
    call = PutCall(store, KEYS)
    pair.begin_put(call)
    pair.pump()
    assert call.outcomes() == [STORED, STORED, FULL, FULL, FULL, FULL]


def test_bytes_that_are_not_those_announced_are_not_stored(store: Store, pair: Pair) -> None:
    call = PutCall(store, KEYS[:3])
    sums = bytearray(call.checksums)
    sums[30] ^= 1
    pair.begin_put(call, checksums=bytes(sums))
    pair.pump()
    assert call.outcomes() == [STORED, PutOutcome.CORRUPT, STORED]
    assert store.blocks.keys() == {KEYS[0], KEYS[2]}


def test_a_put_that_is_decided_at_once_sends_nothing(store: Store, pair: Pair) -> None:
    store.fill(*KEYS)
    call = PutCall(store, KEYS)
    pair.begin_put(call)
    pair.up(MIB)
    assert said(pair.server) == [FrameType.PUT_DONE]


def test_a_source_decides_late(store: Store, pair: Pair) -> None:
    call = PutCall(store, KEYS[:1])
    request_id = pair.begin_put(call)
    pair.up(MIB)
    stream = pair.server._puts[request_id].stream
    stream.stop(FULL)
    stream.on_decided()
    stream.on_decided()
    pair.pump()
    assert call.outcomes() == [FULL]
    assert len(call.replies) == 1


def cancelled_put(steps: int) -> PutCall:
    store = Store(*LAYERS)
    pair = Pair(store, lambda: 37, 2 * BLOCK)
    pair.pump()
    call = PutCall(store, KEYS[:4])
    request_id = pair.begin_put(call)
    for _ in range(steps):
        pair.up(37)
        pair.down(37)
    cancelled = pair.cancel(request_id)
    pair.pump()
    assert len(call.replies) == len(cancelled) == 1
    assert isinstance(call.replies[0], PutDone)
    assert isinstance(cancelled[0], CancelReply)
    assert call.transfer.idle
    check_idle(pair)
    for name, outcome in zip(KEYS, call.outcomes(), strict=False):
        assert (name in store.blocks) == (outcome is STORED)
        assert store.blocks.get(name, store.block(name)) == store.block(name)
    assert all(target.intact for target in store.targets)
    after = PutCall(store, KEYS)
    pair.begin_put(after)
    pair.pump()
    assert set(after.outcomes()) <= {STORED, EXISTS}
    return call


def test_a_put_can_be_cancelled_at_any_point() -> None:
    seen = set()
    for steps in range(45):
        seen.update(cancelled_put(steps).outcomes())
    assert seen == {STORED, UNAVAILABLE}


@pytest.mark.parametrize("arrived", [0, 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + BLOCK])
def test_a_put_that_is_stopped_takes_no_more_bytes(store: Store, arrived: int) -> None:
    """What still comes of a frame, and of further ones, goes to scratch."""
    server, hooks = connected_server(store)
    call = PutCall(store, KEYS)
    deliver(server, frame(FrameType.PUT, 5, call.message()))
    data = frame(FrameType.DATA, 5, b"", b"".join(map(store.block, KEYS[:3])))
    deliver(server, data[:arrived])
    before = [bytes(target.view) for target in store.targets]
    assert server.stop_request(5)
    assert hooks.ended == [5]
    deliver(server, data[arrived:] + frame(FrameType.DATA, 5, b"", bytes(BLOCK), piece=3))
    deliver(server, frame(FrameType.DATA, 5) + frame(FrameType.PING, 6))
    assert said(server) == [FrameType.WANT, FrameType.PUT_DONE, FrameType.PING]
    assert [bytes(target.view) for target in store.targets] == before
    assert (store.held, store.blocks) == (0, {})
    assert not server.stop_request(5)


def test_the_last_block_and_more_of_a_put_that_has_ended(store: Store) -> None:
    server, hooks = connected_server(store)
    deliver(server, frame(FrameType.PUT, 5, PutCall(store, KEYS[:1]).message()))
    data = frame(FrameType.DATA, 5, b"", store.block(KEYS[0]))
    deliver(server, data + data)
    assert hooks.ended == [5]
    assert store.blocks == {KEYS[0]: store.block(KEYS[0])}


@pytest.mark.parametrize(
    ("piece", "offset", "length"),
    [
        (0, 0, 1),  # again
        (0, 9, 1),
        (0, 11, 1),
        (1, 1, 1),
        (2, 0, 1),  # not asked for
        (1, 0, BLOCK + 1),
        (0, 10, BLOCK - 10 + BLOCK + 1),
        (6, 0, 1),
        ((1 << 32) - 1, 0, 1),
        (1, BLOCK, 1),
        (0, (1 << 32) - 1, 1),
        (3, BLOCK, BLOCK),
    ],
)
def test_data_that_was_not_asked_for_is_refused(
    store: Store, piece: int, offset: int, length: int
) -> None:
    store.fill(KEYS[2], KEYS[5])
    server, _ = connected_server(store, 2 * BLOCK)
    deliver(server, frame(FrameType.PUT, 5, PutCall(store, KEYS).message()))
    deliver(server, frame(FrameType.DATA, 5, b"", store.block(KEYS[0])[:10]))
    with pytest.raises(RemoteProtocolError, match="which was not asked for"):
        deliver(server, frame(FrameType.DATA, 5, b"", bytes(length), piece, offset))
    server.lost(LOST)
    assert all(target.intact for target in store.targets)
    assert store.held == 0


def test_a_full_block_is_not_filled_again_before_it_is_taken(store: Store) -> None:
    """One frame that goes on at the end of a block that is complete."""
    server, _ = connected_server(store)
    deliver(server, frame(FrameType.PUT, 5, PutCall(store, KEYS).message()))
    data = frame(FrameType.DATA, 5, b"", store.block(KEYS[0]))
    with pytest.raises(RemoteProtocolError, match="byte 164 of block 0"):
        deliver(server, data + frame(FrameType.DATA, 5, b"", bytes(9), 0, BLOCK))


def test_an_empty_frame_costs_nothing_wherever_it_claims_to_be() -> None:
    # Blocks of one byte: the offset would stand for four billion of them.
    store = Store(1)
    server, hooks = connected_server(store)
    deliver(server, frame(FrameType.PUT, 5, PutCall(store, KEYS).message()))
    far = (1 << 32) - 1
    deliver(server, frame(FrameType.DATA, 5, b"", b"", far, far))
    assert hooks.ended == []
    server.lost(LOST)


@pytest.mark.parametrize("payload", [b"", b"payload"])
def test_data_for_what_is_no_put_is_refused(store: Store, payload: bytes) -> None:
    store.late.update(KEYS)
    server, _ = connected_server(store)
    deliver(server, frame(FrameType.FETCH, 5, FetchCall(store.geometry, KEYS).message()))
    for request_id in (5, 6, 0):
        with pytest.raises(RemoteProtocolError, match="which is no put"):
            deliver(server, frame(FrameType.DATA, request_id, b"", payload))


def test_a_server_forgets_puts_that_ended_long_ago(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "ENDED_PUTS_MAX", 2)
    store.fill(*KEYS)
    server, _ = connected_server(store)
    for request_id in range(1, 5):
        deliver(server, frame(FrameType.PUT, request_id, PutCall(store, KEYS).message()))
    deliver(server, frame(FrameType.DATA, 4, b"", b"late") + frame(FrameType.DATA, 3, b"", b"late"))
    with pytest.raises(RemoteProtocolError, match="request 2, which is no put"):
        deliver(server, frame(FrameType.DATA, 2, b"", b"late"))


@pytest.mark.parametrize(
    ("type", "message"),
    [
        (FrameType.DONE, Done(outcomes=b"\1")),
        (FrameType.DATA, Data(failed=(0,))),
        (FrameType.PUT, Empty()),
        (FrameType.WANT, Want(indices=(1,))),
        (FrameType.PUT_DONE, PutDone(outcomes=b"\0\0")),
        (FrameType.PUT_DONE, PutDone(outcomes=b"\x09")),
    ],
)
def test_a_put_is_answered_by_want_and_put_done(
    store: Store, type: FrameType, message: Any
) -> None:
    client = welcomed_client()
    call = PutCall(store, KEYS[:1])
    client.put(7, call.message(), call.transfer, call.replies.append)
    with pytest.raises(RemoteProtocolError):
        deliver(client, frame(type, 7, message, flags=1))
    client.lost(LOST)
    assert call.replies == [LOST]


def test_an_error_or_an_end_stops_a_put_under_way(store: Store) -> None:
    for last in (
        frame(FrameType.ERROR, 7, b"\x82\xa4code\xa7refused\xa7message\xa2no"),
        frame(FrameType.PUT_DONE, 7, PutDone(outcomes=b"\4" * 6)),
    ):
        client = welcomed_client()
        call = PutCall(store, KEYS)
        client.put(7, call.message(), call.transfer, call.replies.append)
        take(client.writer, MIB)
        deliver(client, frame(FrameType.WANT, 7, Want(indices=(0, 1))))
        client.fill()
        assert not call.transfer.idle
        deliver(client, frame(FrameType.WANT, 7, Want(indices=(2, 3))) + last)
        assert len(call.replies) == 1
        sent = take(client.writer, MIB)
        assert len(sent) == HEADER_BYTES + 2 * BLOCK
        client.fill()
        assert take(client.writer, MIB) == b""
        assert call.transfer.idle


def test_a_hostile_server_cannot_make_a_client_remember(store: Store) -> None:
    """A server that asks again and again and reads nothing."""
    client = welcomed_client()
    call = PutCall(store, KEYS)
    client.put(7, call.message(), call.transfer, call.replies.append)
    with pytest.raises(RemoteProtocolError, match="Want: "):
        deliver(client, frame(FrameType.WANT, 7, Want(indices=())))
    with pytest.raises(RemoteProtocolError, match="WANT for block 0 of 6"):
        deliver(client, frame(FrameType.WANT, 7, Want(indices=(0,))) * 2)


# --- connections that break ------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(0, 60, 3))
def test_when_the_wire_breaks_all_ends_and_all_is_given_back(steps: int) -> None:
    store = Store(*LAYERS)
    store.fill(*KEYS[:3])
    store.chunk_bytes = 50
    pair = Pair(store, lambda: 41, 2 * BLOCK)
    pair.pump()
    fetches = [FetchCall(store.geometry, KEYS[:3], group_layers=group) for group in (0, 1)]
    put = PutCall(store, KEYS[3:])
    for call in fetches:
        pair.begin_fetch(call)
    pair.begin_put(put)
    pings = pair.call(FrameType.PING, Empty())
    for _ in range(steps):
        pair.up(41)
        pair.down(41)
    pair.lose(LOST)
    for call in (*fetches, put):
        assert len(call.replies) == 1
        call.transfer.fail_rest(FetchOutcome.UNAVAILABLE)  # type: ignore[arg-type]
    assert len(pings) == 1
    for call in fetches:
        assert call.transfer.abandoned or isinstance(call.replies[0], Done)
        before = [call.data(index) for index in range(3)]
        # Nothing that the reader still offers is memory of the caller.
        for buffer in pair.client.reader.buffers():
            buffer[:] = b"\xff" * len(buffer)
        assert [call.data(index) for index in range(3)] == before
        assert None not in call.check()
    assert put.transfer.idle
    assert (store.lent, store.held) == (0, 0)
    assert (pair.client.call_count, pair.server.request_count) == (0, 0)
    assert sorted(pair.hooks.ended) == sorted(set(pair.hooks.ended))
    assert (pair.client.writer.queued_bytes, pair.server.writer.queued_bytes) == (0, 0)
    assert all(target.intact for target in store.targets)


def test_one_that_fails_at_the_end_keeps_nothing_from_the_others(store: Store) -> None:
    store.fill(*KEYS)
    store.late.add(KEYS[-1])
    pair = Pair(store)
    pair.pump()
    calls = [FetchCall(store.geometry, KEYS) for _ in range(3)]
    for call in calls:
        pair.begin_fetch(call)
    put = PutCall(store, [key(99)])
    pair.begin_put(put)
    pair.client._calls[2].on_reply = lambda reply: 1 / 0  # type: ignore[arg-type, return-value]
    pair.up(MIB)
    pair.server.fill()
    assert (store.lent, store.held) == (3, 1)
    pair.hooks.fetch_done = lambda request_id, stream: 1 / 0
    for side in (pair.client, pair.server):
        with pytest.raises(ZeroDivisionError):
            side.lost(LOST)
    assert calls[0].replies == calls[2].replies == put.replies == [LOST]
    assert (store.lent, store.held, pair.server.request_count) == (0, 0, 0)


def test_what_comes_after_the_end_is_not_looked_at(store: Store) -> None:
    """A frame makes the shell close the connection; the next one came with the same call."""
    server, hooks = connected_server(store)
    ping, status = frame(FrameType.PING, 1, Empty()), frame(FrameType.STATUS, 2)
    request = hooks.request

    def close(type: FrameType, request_id: int, message: Any) -> None:
        request(type, request_id, message)
        server.lost(LOST)

    hooks.request = close  # type: ignore[method-assign]
    deliver(server, ping[:HEADER_BYTES])
    body, header = server.reader.buffers()
    body[:], header[:] = ping[HEADER_BYTES:], status
    server.receive(len(body) + len(header))
    assert [request_id for _, request_id, _ in hooks.requests] == [1]


def test_no_object_of_block_size_is_made() -> None:
    """Payload goes from the memory of one side to that of the other through the reader alone."""
    store = Store(4 * MIB)
    store.fill(KEYS[0])
    pair = Pair(store)
    pair.pump()
    call = FetchCall(store.geometry, KEYS[:1])
    pair.begin_fetch(call)
    pair.up(MIB)
    tracemalloc.start()
    try:
        while not call.replies:
            pair.server.fill()
            for source in pair.server.writer.buffers():
                part = memoryview(source)
                while len(part):
                    target = pair.client.reader.buffers()[0]
                    count = min(len(target), len(part))
                    target[:count] = part[:count]
                    pair.client.receive(count)
                    part = part[count:]
            pair.server.writer.sent(pair.server.writer.queued_bytes)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert call.check() == [FetchOutcome.HIT]
    # A packer of MessagePack has a buffer of 256 KiB; a chunk is 1 MiB.
    assert peak_bytes < MIB // 2
