"""Payload beside the stream, from one side to the other: news, their order, and the last word."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import RemoteProtocolError
from kvstore.messages import Data, Done, Error, ErrorCode, FetchOutcome, PutDone, PutOutcome
from kvstore.protocol import (
    ClientProtocol,
    client as client_module,
    copying,
    strands,
)
from kvstore.wire import Flags, FrameType
from tests.support.engine import key
from tests.support.frames import (
    BLOCK,
    KEYS,
    LAYERS,
    LOST,
    MIB,
    FetchCall,
    PutCall,
    Store,
    check_idle,
    deliver,
    frame,
    sent_types,
    take,
    welcomed_client,
)
from tests.support.placed import SOMEWHERE, PlacedPair, RunSink, SlowPuller, run_sink

HIT, MISS, CORRUPT, TIMEOUT, UNAVAILABLE = FetchOutcome
STORED, EXISTS = PutOutcome.STORED, PutOutcome.EXISTS
PARTS_MAX = 2
PLACED, VERIFIED = Flags.PLACED, Flags.PLACED | Flags.VERIFIED


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is copied is so much that a worker does it, and takes no more than two blocks."""
    monkeypatch.setattr(copying, "HERE_BYTES_MAX", 0)
    monkeypatch.setattr(strands, "PARTS_MAX", PARTS_MAX)


@pytest.fixture
def store() -> Store:
    return Store(*LAYERS)


@pytest.fixture
def pair(store: Store) -> PlacedPair:
    made = PlacedPair(store)
    made.pump()
    assert len(made.welcomes) == 1
    return made


# --- copied by the server ------------------------------------------------------------------


def test_no_payload_is_in_the_stream(pair: PlacedPair, store: Store) -> None:
    store.fill(*KEYS)
    pair.begin_fetch(FetchCall(store.geometry, KEYS))
    pair.up(MIB)
    pair.server.fill()
    said = take(pair.server.writer, MIB)
    assert store.block(KEYS[0])[:40] not in said
    assert len(said) < 6 * BLOCK
    deliver(pair.client, said)


def test_corrupt_blocks_are_known_as_such(pair: PlacedPair, store: Store) -> None:
    store.fill(*KEYS)
    store.damaged = {KEYS[2]}
    call = FetchCall(store.geometry, KEYS, group_layers=1)
    pair.begin_fetch(call)
    pair.pump()
    assert call.check() == [HIT, HIT, CORRUPT, HIT, HIT, HIT]
    assert call.transfer.corrupt == [2]
    assert call.failed == [(2, CORRUPT)]
    check_idle(pair)


@pytest.mark.parametrize("chunk", [20, MIB])
def test_cancelled_fetch_has_its_last_word_after_the_last_byte(store: Store, chunk: int) -> None:
    store.fill(*KEYS[:4])
    store.late = {KEYS[4]}
    store.chunk_bytes = chunk
    pair = PlacedPair(store)
    pair.pump()
    call = FetchCall(store.geometry, KEYS)
    number = pair.begin_fetch(call)
    pair.pump()
    # What is here was told, although more is to come.
    assert call.check() == [HIT] * 4 + [None] * 2
    found = pair.cancel(number)
    assert not call.replies
    pair.pump()
    assert len(found) == 1
    assert [type(reply) for reply in call.replies] == [Done]
    assert call.replies[0].outcomes == bytes([0, 0, 0, 0, 4, 4])  # type: ignore[union-attr]
    check_idle(pair)


def test_deadline_at_the_server_ends_a_fetch(pair: PlacedPair, store: Store) -> None:
    store.fill(KEYS[0])
    store.late = set(KEYS[1:])
    call = FetchCall(store.geometry, KEYS)
    number = pair.begin_fetch(call)
    pair.pump()
    assert pair.server.stop_request(number)
    pair.pump()
    assert call.check() == [HIT] + [TIMEOUT] * 5
    check_idle(pair)


def test_others_have_their_turn_while_much_is_copied(store: Store) -> None:
    store.fill(*KEYS)
    store.chunk_bytes = BLOCK
    pair = PlacedPair(store)
    pair.pump()
    call, worker = FetchCall(store.geometry, KEYS), pair.hooks.worker
    pair.begin_fetch(call)
    pair.up(MIB)
    turns = 0
    while not call.replies:
        pair.server.fill()
        assert not pair.server.unfilled  # it is the worker's turn
        assert pair.hooks.strands.count <= PARTS_MAX
        worker.work(len(worker.jobs))
        worker.tell()
        turns += 1
        deliver(pair.client, take(pair.server.writer, MIB))
    assert turns >= len(KEYS)
    assert call.check() == [HIT] * 6


@pytest.mark.parametrize("begun", [0, 1])
@pytest.mark.parametrize("way", ["lose", "refuse"])
def test_nothing_is_copied_when_the_connection_ends(store: Store, way: str, begun: int) -> None:
    store.fill(*KEYS)
    store.chunk_bytes = BLOCK
    pair = PlacedPair(store)
    pair.pump()
    call = FetchCall(store.geometry, KEYS)
    pair.begin_fetch(call)
    pair.up(MIB)
    pair.server.fill()
    pair.hooks.worker.work(begun)
    if way == "refuse":
        pair.server.refuse(LOST)
        pair.server.fill()
        pair.hooks.worker.finish()  # what the worker had been given
        begun = PARTS_MAX
    pair.lose(LOST)
    assert store.lent == (begun if way == "lose" else 0)
    pair.hooks.worker.finish()
    assert call.replies == [LOST]
    assert [call.data(index) for index in range(begun)] == list(map(call.expected, range(begun)))
    assert [call.data(index) for index in range(begun, 6)] == [bytes(BLOCK)] * (6 - begun)
    assert (store.lent, pair.hooks.ended) == (0, [1])
    check_idle(pair)


# --- puts that the server takes by itself --------------------------------------------------


def give_up(pair: PlacedPair, number: int, how: str, way: RunSink | SlowPuller) -> None:
    """A request is given up at either side, or the way of its payload fails."""
    if how == "cancel":
        pair.cancel(number)
    elif how == "deadline":
        assert pair.server.stop_request(number)
    else:
        way.fail(LOST)
    pair.pump()


def the_puller(pair: PlacedPair) -> SlowPuller:
    """The puller of the only put."""
    (puller,) = pair.hooks.pullers
    assert isinstance(puller, SlowPuller)
    return puller


def test_nothing_is_asked_for_in_the_stream(pair: PlacedPair, store: Store) -> None:
    pair.begin_put(PutCall(store, KEYS))
    pair.up(MIB)
    pair.hooks.worker.finish()
    pair.server.fill()
    assert sent_types(take(pair.server.writer, MIB)) == [FrameType.PUT_DONE]


def test_what_does_not_match_its_checksums_is_not_stored(pair: PlacedPair, store: Store) -> None:
    call = PutCall(store, KEYS[:2])
    memory = call.transfer._memory
    spoilt = memoryview(bytearray(BLOCK))
    number = pair._next_id
    pair.begin_put(call)
    pair.hooks.memory[number] = [memory[0], spoilt]
    pair.pump()
    assert call.outcomes() == [STORED, PutOutcome.CORRUPT]
    assert KEYS[1] not in store.blocks
    check_idle(pair)


def test_puts_share_the_room_in_turns(store: Store) -> None:
    pair = PlacedPair(store, in_flight_bytes_max=2 * BLOCK)
    pair.pump()
    calls = [PutCall(store, [key(10 * n + m) for m in range(5)]) for n in range(4)]
    calls.append(PutCall(store, []))
    for call in calls[:4]:
        pair.begin_put(call)
    most = 0
    while pair.up(61) + pair.down(61) or pair.hooks.worker.finish():
        most = max(most, store.held)
    assert [call.outcomes() for call in calls[:4]] == [[STORED] * 5] * 4
    assert most <= 2
    check_idle(pair)


def test_pulling_leaves_turns_to_others(store: Store) -> None:
    pair = PlacedPair(store)
    pair.pump()
    call, worker = PutCall(store, KEYS), pair.hooks.worker
    pair.begin_put(call)
    pair.up(MIB)
    while pair.server.request_count:
        before = len(store.blocks)
        pair.server.fill()
        assert not pair.server.unfilled
        worker.work(len(worker.jobs))
        worker.tell()
        assert len(store.blocks) - before <= 1
    pair.pump()
    assert call.outcomes() == [STORED] * 6


def test_payload_for_a_put_that_has_named_its_memory_is_refused(
    pair: PlacedPair, store: Store
) -> None:
    pair.hooks.make_puller = SlowPuller
    pair.begin_put(PutCall(store, KEYS[:1]))
    pair.pump()
    with pytest.raises(RemoteProtocolError, match="which is no put"):
        deliver(pair.server, frame(FrameType.DATA, 1, b"", bytes(BLOCK)))


def test_empty_data_for_a_put_that_has_named_its_memory_is_refused(
    pair: PlacedPair, store: Store
) -> None:
    pair.hooks.make_puller = SlowPuller
    pair.begin_put(PutCall(store, KEYS[:1]))
    pair.pump()
    with pytest.raises(RemoteProtocolError, match="whose memory was named"):
        deliver(pair.server, frame(FrameType.DATA, 1))


@pytest.mark.parametrize("how", ["cancel", "deadline", "failure"])
def test_last_word_of_a_put_waits_for_what_is_under_way(store: Store, how: str) -> None:
    pair = PlacedPair(store, in_flight_bytes_max=2 * BLOCK)
    pair.hooks.make_puller = SlowPuller
    pair.pump()
    call = PutCall(store, KEYS)
    number = pair.begin_put(call)
    pair.pump()
    puller = the_puller(pair)
    assert len(puller.asked) == 2
    give_up(pair, number, how, puller)
    assert puller.stopped
    assert not call.replies
    assert store.held == 2  # nobody else gets what is written into
    puller.land()
    pair.pump()
    assert not call.replies
    puller.land()
    pair.pump()
    assert [type(reply) for reply in call.replies] == [PutDone]
    last = PutOutcome.TIMEOUT if how == "deadline" else PutOutcome.UNAVAILABLE
    told = [PutOutcome(outcome) for outcome in call.replies[0].outcomes]  # type: ignore[union-attr]
    assert told[2:] == [last] * 4
    check_idle(pair)


def test_reads_that_break_off_end_a_put(pair: PlacedPair, store: Store) -> None:
    pair.hooks.make_puller = SlowPuller
    call = PutCall(store, KEYS[:2])
    pair.begin_put(call)
    pair.pump()
    puller = the_puller(pair)
    puller.land()
    puller.failure = LOST
    puller.break_off()
    pair.pump()
    assert call.outcomes() == [STORED, PutOutcome.UNAVAILABLE]
    check_idle(pair)


@pytest.mark.parametrize("end", ["land", "break_off"])
def test_blocks_that_are_written_into_stay_reserved_when_the_connection_is_lost(
    pair: PlacedPair, store: Store, end: str
) -> None:
    pair.hooks.make_puller = SlowPuller
    pair.begin_put(PutCall(store, KEYS[:1]))
    pair.pump()
    puller = the_puller(pair)
    pair.lose(LOST)
    assert store.held == 1
    getattr(puller, end)()
    assert store.held == 0
    assert not store.blocks
    check_idle(pair)


# --- runs by RDMA --------------------------------------------------------------------------


@pytest.fixture
def rails(store: Store) -> PlacedPair:
    """A pair whose writes end when a test says so, four at a time."""
    store.fill(*KEYS)
    store.chunk_bytes = BLOCK
    pair = PlacedPair(store)
    pair.hooks.make_sink = run_sink(4)
    pair.pump()
    return pair


def the_sink(pair: PlacedPair) -> RunSink:
    """The sink of the only fetch."""
    (sink,) = pair.hooks.sinks
    assert isinstance(sink, RunSink)
    return sink


def asked(pair: PlacedPair, count: int, group_layers: int = 0) -> FetchCall:
    """A fetch of the first keys, as far as it goes before a run has landed."""
    call = FetchCall(pair.store.geometry, KEYS[:count], group_layers=group_layers)
    pair.begin_fetch(call)
    pair.pump()
    return call


def arrive(pair: PlacedPair) -> None:
    """All runs that are under way land, and their news come."""
    for run in list(the_sink(pair).runs):
        pair.client.run_arrived(run.land())
    pair.pump()


def test_a_block_counts_when_both_its_news_are_here(rails: PlacedPair, store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:3])
    rails.begin_fetch(call)
    rails.up(MIB)
    rails.server.fill()
    sink = the_sink(rails)
    early = sink.runs[0].land()
    rails.client.run_arrived(early)  # before its DATA
    assert call.check() == [None] * 3
    rails.pump()
    assert call.check() == [HIT, None, None]
    rails.client.run_arrived(sink.runs[0].land())  # after it
    assert call.check() == [HIT, HIT, None]
    rails.client.run_arrived(sink.runs[0].land())
    assert not call.replies
    rails.pump()
    assert call.check() == [HIT] * 3
    assert len(call.replies) == 1
    check_idle(rails)


def test_runs_that_overtake_each_other_count_in_order(rails: PlacedPair) -> None:
    call = asked(rails, 4, group_layers=1)
    sink = the_sink(rails)
    while sink.runs:
        for number in [run.land() for run in reversed(list(sink.runs))]:
            rails.client.run_arrived(number)
        rails.pump()
    assert call.check() == [HIT] * 4
    assert call.arrived == [(index, group) for group in range(3) for index in range(4)]
    check_idle(rails)


def test_last_word_may_overtake_the_runs(rails: PlacedPair, store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:3])
    missing: list[int] = []
    rails.client.on_news_missing = missing.append
    request = rails.begin_fetch(call)
    rails.pump()
    numbers = [run.land() for run in list(the_sink(rails).runs)]
    assert not missing
    rails.pump()  # DONE is here
    assert rails.server.request_count == 0
    for number in numbers:
        assert not call.replies
        assert missing == [request]  # told once
        assert rails.client.news_missing(request)
        rails.client.run_arrived(number)
    assert call.check() == [HIT] * 3
    assert len(call.replies) == 1
    assert not rails.client.news_missing(request)
    check_idle(rails)


@pytest.mark.parametrize("lost", [0, 2])
def test_nothing_is_missing_that_has_come_or_was_lost(
    rails: PlacedPair, store: Store, lost: int
) -> None:
    call = FetchCall(store.geometry, KEYS[:3])
    missing: list[int] = []
    rails.client.on_news_missing = missing.append
    rails.begin_fetch(call)
    rails.pump()
    for index, run in enumerate(list(the_sink(rails).runs)):
        if index == lost:
            run.fail()
        else:
            rails.client.run_arrived(run.land())
    rails.pump()
    assert len(call.replies) == 1
    assert not missing
    check_idle(rails)


@pytest.mark.parametrize("how", ["cancel", "deadline", "failure"])
def test_last_word_of_a_fetch_waits_for_what_is_under_way(
    rails: PlacedPair, store: Store, how: str
) -> None:
    call = FetchCall(store.geometry, KEYS)
    number = rails.begin_fetch(call)
    rails.pump()
    sink = the_sink(rails)
    assert len(sink.runs) == 4
    give_up(rails, number, how, sink)
    assert not call.replies
    for run in list(sink.runs):
        assert rails.server.request_count == 1
        rails.client.run_arrived(run.land())
        rails.pump()
    assert len(call.replies) == 1
    last = TIMEOUT if how == "deadline" else UNAVAILABLE
    assert call.replies[0].outcomes == bytes([0] * 4 + [last] * 2)  # type: ignore[union-attr]
    if how != "cancel":
        assert call.check() == [HIT] * 4 + [last] * 2
    check_idle(rails)


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_lost_ends_a_fetch_and_what_lies_behind_it_does_not_count(
    rails: PlacedPair, lost: int, when: str
) -> None:
    call = asked(rails, 4)
    sink = the_sink(rails)
    numbers = []
    for index, run in enumerate(list(sink.runs)):
        if index == lost:
            run.fail()
        else:
            numbers.append(run.land())
    if when == "before":
        for number in numbers:
            rails.client.run_arrived(number)
    rails.pump()
    if when == "after":
        for number in numbers:
            rails.client.run_arrived(number)
    assert call.check() == [HIT] * lost + [UNAVAILABLE] * (4 - lost)
    assert len(call.replies) == 1
    check_idle(rails)


def test_run_of_a_request_that_has_ended_is_not_kept(rails: PlacedPair) -> None:
    """A number that was kept for ever would one day stand for bytes that are not here yet."""
    call = asked(rails, 3)
    sink = the_sink(rails)
    sink.runs[0].fail()
    numbers = [run.land() for run in list(sink.runs)]
    rails.pump()
    assert len(call.replies) == 1
    for number in numbers:
        rails.client.run_arrived(number)
    check_idle(rails)


def test_misses_behind_a_run_wait_for_it(store: Store) -> None:
    store.fill(KEYS[0], KEYS[2])
    store.chunk_bytes = BLOCK
    pair = PlacedPair(store)
    pair.hooks.make_sink = run_sink(4)
    pair.pump()
    call = asked(pair, 4)
    assert call.check() == [None] * 4
    arrive(pair)
    assert call.check() == [HIT, MISS, HIT, MISS]
    check_idle(pair)


def test_bytes_that_are_not_those_of_the_checksums_are_found_by_the_reader(
    rails: PlacedPair, store: Store
) -> None:
    store.damaged = {KEYS[1]}
    call = asked(rails, 3)
    arrive(rails)
    assert call.check() == [HIT, CORRUPT, HIT]
    assert call.transfer.corrupt == [1]
    check_idle(rails)


def test_lost_connection_ends_what_waits_for_runs(rails: PlacedPair, store: Store) -> None:
    call = asked(rails, 4)
    sink = the_sink(rails)
    rails.lose(LOST)
    assert call.replies == [LOST]
    assert store.lent == 4  # the device still reads there
    for run in list(sink.runs):
        run.land()
    check_idle(rails)


def test_abandoned_fetch_is_answered_when_its_runs_are_here(
    rails: PlacedPair, store: Store
) -> None:
    call = FetchCall(store.geometry, KEYS[:2])
    number = rails.begin_fetch(call)
    rails.pump()
    rails.client.abandon(number)
    numbers = [run.land() for run in list(the_sink(rails).runs)]
    rails.pump()
    assert not call.replies
    for run in numbers:
        rails.client.run_arrived(run)
    assert len(call.replies) == 1
    assert call.arrived == []
    check_idle(rails)


# --- liars ---------------------------------------------------------------------------------


def asking(*keys: bytes, memory: Any = SOMEWHERE) -> tuple[ClientProtocol, FetchCall]:
    """A client with one fetch under way, id 9."""
    client, call = welcomed_client(), FetchCall(Store(*LAYERS).geometry, keys)
    client.fetch(9, call.message(memory=memory), call.transfer, call.replies.append)
    return client, call


def placed(length: int, flags: int = VERIFIED, piece: int = 0, at: int = 0, **data: Any) -> bytes:
    """A DATA frame that tells of bytes elsewhere; a header counts them, none follow."""
    whole = frame(FrameType.DATA, 9, Data(**data), bytes(length), piece, at, flags)
    return whole[: len(whole) - length]


SUMS = bytes(3 * 8)


def test_placed_data_for_a_request_without_memory_is_refused() -> None:
    client, _ = asking(KEYS[0], memory=None)
    with pytest.raises(RemoteProtocolError, match="named no memory"):
        deliver(client, placed(BLOCK, checksums=SUMS))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"length": BLOCK + 1, "checksums": SUMS}, "piece 1, the request has 1"),
        ({"length": 1, "piece": 1, "checksums": SUMS}, "piece 1, the request has 1"),
        ({"length": 5, "at": 1}, "byte 1 of piece 0, expected byte 0"),
        ({"length": BLOCK}, "0 bytes of checksums, expected 24"),
        ({"length": BLOCK, "checksums": SUMS, "corrupt": (1,)}, "key 1 as corrupt"),
        ({"length": BLOCK, "checksums": SUMS, "failed": (1,)}, "key 1 as failed"),
    ],
)
def test_news_that_cannot_be_are_refused(lie: dict[str, Any], words: str) -> None:
    client, call = asking(KEYS[0])
    with pytest.raises(RemoteProtocolError, match=words):
        deliver(client, placed(**lie))
    assert not call.replies


def test_news_of_the_same_bytes_twice_are_refused() -> None:
    client, _ = asking(*KEYS[:2])
    deliver(client, placed(40, checksums=SUMS))
    with pytest.raises(RemoteProtocolError, match="byte 0 of piece 0, expected byte 40"):
        deliver(client, placed(40, checksums=SUMS))


def test_hit_of_which_no_news_came_is_refused() -> None:
    client, _ = asking(KEYS[0])
    with pytest.raises(RemoteProtocolError, match="HIT for key 0, but bytes are missing"):
        deliver(client, frame(FrameType.DONE, 9, Done(outcomes=bytes([HIT]))))


def test_bytes_that_nobody_has_verified_are_verified_here() -> None:
    client, call = asking(KEYS[0])
    deliver(client, placed(BLOCK, PLACED, checksums=SUMS))
    assert call.failed == [(0, CORRUPT)]


def test_nothing_follows_the_last_word_while_runs_are_waited_for() -> None:
    client, _ = asking(KEYS[0])
    done = frame(FrameType.DONE, 9, Done(outcomes=bytes([HIT])))
    deliver(client, placed(BLOCK, PLACED, checksums=SUMS, run=7))
    deliver(client, done)
    with pytest.raises(RemoteProtocolError, match="DONE after DONE"):
        deliver(client, done)
    client, _ = asking(KEYS[0])
    deliver(client, placed(BLOCK, PLACED, checksums=SUMS, run=7))
    deliver(client, done)
    with pytest.raises(RemoteProtocolError, match="DATA after DONE"):
        deliver(client, placed(0, PLACED))


def test_runs_that_nobody_tells_of_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RUNS_EARLY_MAX", 3)
    client = welcomed_client()
    for run in (1, 2, 3):
        client.run_arrived(run)
    with pytest.raises(RemoteProtocolError, match="3 runs of which no DATA frame tells"):
        client.run_arrived(4)


def test_request_that_is_refused_waits_for_no_runs() -> None:
    client, call = asking(KEYS[0])
    deliver(client, placed(BLOCK, PLACED, checksums=SUMS, run=7))
    deliver(client, frame(FrameType.ERROR, 9, Error(code=ErrorCode.BUSY, message="no"), flags=1))
    assert len(call.replies) == 1
    assert client._late_runs == {7}
    client.run_arrived(7)
    assert not client._runs
    assert not client._run_waiters
    assert not client._late_runs


def test_runs_that_never_come_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RUNS_EARLY_MAX", 1)
    client, _ = asking(*KEYS[:2])
    for run in (7, 8):
        deliver(client, placed(BLOCK, PLACED, piece=run - 7, checksums=SUMS, run=run))
    refusal = Error(code=ErrorCode.BUSY, message="no")
    with pytest.raises(RemoteProtocolError, match="2 runs that never came"):
        deliver(client, frame(FrameType.ERROR, 9, refusal, flags=1))
