"""RDMA at its edges: turns of the loop that stay short, callbacks that fail, rails never tried."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.transport import rdma, rdma_queue, verbs
from kvstore.transport.rdma_end import CONNECT_S, RailsUnreached
from kvstore.transport.rdma_nodes import RdmaNodes
from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.rdma_queue import RECEIVES_MAX, SENDS_MAX
from kvstore.transport.rdma_rails import choose_rails
from kvstore.transport.verbs import (
    Completion,
    DeviceInfo,
    Gid,
    NoDevice,
    PortInfo,
    QueueAddress,
    QueueTuning,
    VerbsClosed,
    VerbsError,
)
from tests.support.fakedevice import FakeRail
from tests.support.fakeverbs import FakeVerbs
from tests.support.loops import ManualLoop, turns
from tests.support.rdmaends import QUICK, Fetch, Pull, Request, session

ONE_RAIL = msgspec.structs.replace(QUICK, rails_max=1)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVerbs]:
    """An own network."""
    made = FakeVerbs(tmp_path)
    yield made
    made.close()


# --- the loop ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_one_batch_in_a_turn_however_many_wait(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor of the system's verbs stays readable until the last batch is taken, and the
    loop calls for it in each turn, beside the calls that were asked for."""
    async with session(fake, options=ONE_RAIL) as made:
        rail = made.client._rails[0].rail
        assert isinstance(rail, FakeRail)
        taken = 0
        real = rail.poll

        def poll(count_max: int) -> list[Completion]:
            nonlocal taken
            found = real(count_max)
            taken += len(found)
            if len(found) == count_max:
                os.eventfd_write(rail._event, 1)
            return found

        monkeypatch.setattr(rail, "poll", poll)
        fetch = Fetch(Request(made), 200)
        fake.hold()
        fetch.feed()
        assert fetch.taken == 200
        fake.release()
        fake.wait(lambda: fake.waiting() == 0, "all packets")
        in_turns = []
        for _ in range(fetch.taken):
            before = taken
            await asyncio.sleep(0)
            in_turns.append(taken - before)
        assert max(in_turns) == rdma._POLL_COUNT, in_turns
        assert sorted(made.runs) == sorted(fetch.run_ids())


@pytest.mark.asyncio
async def test_others_on_a_rail_do_not_keep_us_at_the_news_of_one(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        batches = []

        def always(count_max: int) -> list[Completion]:
            batches.append(count_max)
            return [Completion(0, 0, 0, True, 1)] * count_max

        with monkeypatch.context() as patch:
            patch.setattr(made.client._rails[0].rail, "poll", always)
            made.passive.fail(made.passive.queues[0], VerbsError("on purpose"))
            # No more can lie there than its only queue pair has receives.
            assert sum(batches) <= RECEIVES_MAX + rdma._POLL_COUNT
            batches.clear()
            await turns()
            assert batches, "nobody looks at the others any more"


@pytest.mark.asyncio
async def test_layers_with_places_of_their_own_are_no_more_work_than_a_queue_pair_takes(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        counts = []
        (queue,) = made.active.queues
        post = queue.pair.post

        def counted(works: list[object]) -> None:
            counts.append(len(works))
            post(works)  # type: ignore[arg-type]

        monkeypatch.setattr(queue.pair, "post", counted)
        request = Request(made, layer_bytes=(16,) * 64, key_count=16, layered=True, gap=16)
        fetch = Fetch(request, Fetch(request).sink.chunk_bytes)
        fake.hold()
        fetch.feed(1)
        assert fetch.taken == 1
        assert not queue._waiting
        assert 64 <= sum(counts) <= SENDS_MAX
        fake.release()
        await fetch.run()
        await fetch.arrived()
        assert made.pool.view == request.expected_pool(bytes(len(made.pool.view)))


# --- callbacks that fail ----------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["close", "fail"])
async def test_release_that_fails_costs_others_nothing(fake: FakeVerbs, end: str) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        reported: list[dict[str, object]] = []
        made.server.loop.set_exception_handler(lambda _, context: reported.append(context))
        request = Request(made)
        bad, good = Fetch(request, 1000), Fetch(request, 1000)
        pull = Pull(request)

        def fail(*_: object) -> None:
            raise ValueError("on purpose")

        bad._chunks = request.chunks(1000, fail)
        bad.sink.on_ready = fail
        fake.hold()
        bad.feed(2)
        good.feed(2)
        pull.ask(0)
        assert bad.taken == good.taken == 2
        if end == "close":
            made.active.close()
        else:
            made.active.fail(made.active.queues[0], VerbsError("on purpose"))
        assert good.released == [0, 1]
        assert bad.sink.idle
        assert good.sink.idle
        assert pull.puller.idle
        await turns()
        assert good.ready_count > 0
        assert pull.ready_count > 0
        assert good.lost_runs() == good.run_ids()
        assert len(reported) >= 2
        fake.release()


# --- who waits for whom -----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_fetch_has_room_beside_a_put_without_end(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rdma_queue, "FLIGHT_BYTES_MAX", 64 * 1024)
    async with session(fake, options=ONE_RAIL) as made:
        request = Request(made, layer_bytes=(64 * 1024,), key_count=10)
        pull = Pull(request)
        fake.hold()
        pull.ask(*range(10))
        assert fake.waiting() == 1
        fetch = Fetch(Request(made, first=4096 * 1024), 1000)
        fetch.feed(1)
        assert fetch.taken == 1
        # And the other way round.
        fake.step(2)
        await made.watch.until(lambda: pull.pulled == [0] and fetch.released == [0], "both")
        fetch.feed()
        assert fetch.taken > 10
        fake.release()
        await pull.idle()
        assert pull.pulled == list(range(10))


# --- rails that were never tried --------------------------------------------------------------


@pytest.mark.asyncio
async def test_rails_that_there_was_no_time_for_are_tried_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVerbs(tmp_path, device_count=4)
    loop = ManualLoop()
    async with session(fake, client_loop=loop.as_loop, connect=False) as made:

        def wait(peer: QueueAddress, tuning: QueueTuning) -> None:
            loop.advance(CONNECT_S)
            raise VerbsError("timed out")

        active, passive = made.active, made.passive
        active.connect(passive.addresses())
        monkeypatch.setattr(passive.queues[1].pair, "connect", wait)
        with pytest.raises(RailsUnreached, match="the others have taken"):
            passive.connect(active.addresses())
        again = made.client.end("server", active=False)
        assert [queue.place for queue in again.queues] == [0, 2, 3]

        # What is slow and succeeds would take the time of the others again and again.
        active, passive = made.server.end("x", active=True), made.client.end("y", active=False)
        active.connect(passive.addresses())
        real = passive.queues[0].pair.connect

        def slow(peer: QueueAddress, tuning: QueueTuning) -> None:
            real(peer, tuning)
            loop.advance(CONNECT_S)

        monkeypatch.setattr(passive.queues[0].pair, "connect", slow)
        with pytest.raises(RailsUnreached, match="the others have taken"):
            passive.connect(active.addresses())
        assert [queue.place for queue in made.client.end("y", active=False).queues] == [0]
    fake.close()


# --- setting up -------------------------------------------------------------------------------


def test_gid_that_no_address_of_a_peer_can_name_is_not_chosen() -> None:
    far = Gid(256, "::ffff:10.0.0.1", "RoCE v2")
    port = PortInfo(1, True, "Ethernet", 0, 4096, "eth0", (Gid(3, "fe80::1", "RoCE v2"), far))
    (setup,) = choose_rails([DeviceInfo("a", (port,))], RdmaOptions(), "10.0.0.1")
    assert setup.gid_index == 3
    with pytest.raises(NoDevice):
        choose_rails([DeviceInfo("a", (port._replace(gids=(far,)),))], RdmaOptions())


@pytest.mark.asyncio
async def test_nodes_are_not_made_after_close(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "system_verbs", lambda: fake)
    nodes = RdmaNodes(asyncio.get_running_loop())
    node = nodes.node(RdmaOptions(), "")
    assert nodes.node(RdmaOptions(), "") is node
    nodes.close()
    nodes.close()
    assert node.closed
    with pytest.raises(VerbsClosed):
        nodes.node(RdmaOptions(), "")
