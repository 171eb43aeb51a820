"""What RDMA promises above verbs: fetches and puts of blocks, and what becomes of them when a
queue pair fails. Runs on every implementation of verbs that has the fixture `verbs`.
"""

from __future__ import annotations

import msgspec
import pytest

from kvstore.errors import LimitExceeded, LocalProtocolError, TransportError, TransportTimeout
from kvstore.memorymessages import RailAddress, Rails
from kvstore.transport import rdma_queue
from kvstore.transport.rdma import RdmaNode, RdmaOptions
from kvstore.transport.rdma_end import CONNECT_S, RailsUnreached
from kvstore.transport.rdma_queue import FLIGHT_BYTES_MAX, RECEIVES_MAX, SENDS_MAX, RdmaQueue
from kvstore.transport.rdma_reach import UNREACHED_S
from kvstore.transport.verbs import QueueAddress, QueueTuning, Verbs, VerbsClosed, VerbsError
from tests.support.loops import ManualLoop, turns
from tests.support.rdmaends import QUICK, Fetch, Pull, Request, Session, session
from tests.support.verbsdevices import indestructible

KIB = 1024
SHAPES = {
    "contiguous": {"gap": 0},
    "apart": {},
    "layered": {"layered": True},
    "layered side by side": {"layered": True, "gap": 0},
    "groups": {"layer_bytes": (1000, 2000, 3000, 10), "group_layers": 2},
    "layered groups": {"layer_bytes": (1000, 2000, 3000), "group_layers": 1, "layered": True},
    "some layers": {"layer_bytes": (1000, 2000, 3000, 10), "layer_first": 1, "layer_last": 3},
    "some layers, layered": {
        "layer_bytes": (1000, 2000, 3000, 10),
        "layer_first": 1,
        "layer_last": 4,
        "layered": True,
    },
}


def bad_request(made: Session, place: int = 0, **more: object) -> Request:
    """A request whose key is wrong on one rail."""
    region = made.pool_memory.described()
    keys = list(region.keys)
    keys[place] ^= 0x1100
    region = msgspec.structs.replace(region, keys=tuple(keys))
    return Request(made, region=region, **more)  # type: ignore[arg-type]


class RdmaTests:
    """See the module."""

    # --- fetch -----------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.parametrize("shape", list(SHAPES))
    @pytest.mark.parametrize("bytes_max", [700, 6000, 1 << 20])
    async def test_fetch_arrives_where_it_belongs_and_nowhere_else(
        self, verbs: Verbs, shape: str, bytes_max: int, seed: int
    ) -> None:
        async with session(verbs, memory_bytes=256 * KIB) as made:
            request = Request(made, **SHAPES[shape])  # type: ignore[arg-type]
            request.fill(made.arena, seed)
            request.fill(made.pool, seed + 1)
            before = bytes(made.pool.view)
            fetch = Fetch(request, bytes_max)
            await fetch.run()
            await fetch.arrived()
            assert made.pool.view == request.expected_pool(before)
            assert sorted(fetch.released) == list(range(fetch.taken))
            assert sorted(made.runs) == sorted(fetch.run_ids())
            assert len(set(made.runs)) == fetch.taken
            assert 0 not in made.runs
            assert sum(news.length for news in fetch.news) == sum(
                size for _, _, size in request.places
            )
            assert not any(news.verified for news in fetch.news)
            assert fetch.lost_runs() == []
            assert made.lost == ([], [])

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_more_runs_than_receives(self, verbs: Verbs, seed: int) -> None:
        async with session(verbs, memory_bytes=256 * KIB) as made:
            request = Request(made, layer_bytes=(16 * KIB,), key_count=4)
            request.fill(made.arena, seed)
            fetch = Fetch(request, bytes_max=32)
            await fetch.run()
            await fetch.arrived()
            assert fetch.taken > 2 * len(made.server.rail_names) * RECEIVES_MAX
            assert sorted(fetch.released) == list(range(fetch.taken))
            assert made.pool.view == request.expected_pool(bytes(256 * KIB))

    @pytest.mark.asyncio
    async def test_chunk_of_more_requests_than_are_posted_at_once(
        self, verbs: Verbs, seed: int
    ) -> None:
        layers = 3 * SENDS_MAX // 4
        async with session(verbs, memory_bytes=512 * KIB) as made:
            request = Request(made, layer_bytes=(16,) * layers, key_count=4, layered=True, gap=8)
            request.fill(made.arena, seed)
            fetch = Fetch(request, bytes_max=1 << 20)
            await fetch.run()
            await fetch.arrived()
            assert fetch.taken == len(made.runs) == 1
            assert fetch.released == [0]
            assert made.pool.view == request.expected_pool(bytes(512 * KIB))

    @pytest.mark.asyncio
    async def test_two_fetches_and_a_put_share_a_session(self, verbs: Verbs, seed: int) -> None:
        async with session(verbs, memory_bytes=512 * KIB) as made:
            first = Request(made)
            second = Request(made, first=64 * KIB)
            first.fill(made.arena, seed)
            into = Request(made, first=128 * KIB, layer_bytes=(30 * KIB,), key_count=2)
            into.arena_first = 256 * KIB
            made.pool.view[128 * KIB : 256 * KIB] = b"p" * 128 * KIB
            fetches = [Fetch(first, 100), Fetch(second, 100)]
            pull = Pull(into)
            pull.ask(0, 1)
            for _ in range(3):
                for fetch in fetches:
                    fetch.feed(5)
            for fetch in fetches:
                await fetch.run()
                await fetch.arrived()
            await pull.idle()
            for request in (first, second):
                for at, source, size in request.places:
                    assert made.pool.view[at : at + size] == made.arena.view[source : source + size]
            assert sorted(pull.pulled) == [0, 1]
            assert bytes(into.target(1)) == b"p" * 30 * KIB
            assert len(set(made.runs)) == sum(fetch.taken for fetch in fetches)

    @pytest.mark.asyncio
    async def test_news_of_missing_blocks_alone_is_no_run(self, verbs: Verbs) -> None:
        async with session(verbs, memory_bytes=64 * KIB) as made:
            fetch = Fetch(Request(made))
            chunk = next(fetch.request.chunks(100, fetch._release))
            fetch.sink.take(chunk._replace(length=0, buffers=[], checksums=b"", failed=(2, 3)))
            assert fetch.news[0].data.failed == (2, 3)
            assert fetch.news[0].data.run == 0
            assert fetch.released == [0]
            assert fetch.sink.idle

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_both_rails_carry_a_fetch(self, verbs: Verbs, seed: int) -> None:
        async with session(verbs, memory_bytes=4096 * KIB) as made:
            if len(made.server.rail_names) < 2:
                pytest.skip("one device only")
            request = Request(made, layer_bytes=(256 * KIB,), key_count=8)
            request.fill(made.arena, seed)
            fetch = Fetch(request, bytes_max=256 * KIB)
            fetch.feed()
            assert {queue.bytes_out for queue in made.active.queues} == {1024 * KIB}
            await fetch.run()
            await fetch.arrived()
            assert made.pool.view == request.expected_pool(bytes(4096 * KIB))

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_what_is_under_way_is_bounded(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flight_bytes = FLIGHT_BYTES_MAX // 4
        monkeypatch.setattr(rdma_queue, "FLIGHT_BYTES_MAX", flight_bytes)
        options = msgspec.structs.replace(QUICK, rails_max=1)
        async with session(verbs, memory_bytes=3 * flight_bytes, options=options) as made:
            request = Request(made, layer_bytes=(4096 * KIB,), key_count=10)
            fetch = Fetch(request, bytes_max=4096 * KIB)
            fetch.feed()
            assert fetch.taken == flight_bytes // (4096 * KIB)
            assert not fetch.sink.accepts
            await fetch.run()
            assert fetch.taken == 10
            assert sorted(fetch.released) == list(range(10))

    # --- put -------------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.parametrize("shape", ["contiguous", "apart", "layered", "layered side by side"])
    async def test_put_is_read_where_it_lies(self, verbs: Verbs, shape: str, seed: int) -> None:
        async with session(verbs, memory_bytes=256 * KIB) as made:
            request = Request(made, **SHAPES[shape])  # type: ignore[arg-type]
            request.fill(made.pool, seed)
            pool = bytes(made.pool.view)
            pull = Pull(request)
            pull.ask(0, 4, 2)
            assert not pull.puller.idle
            await pull.idle()
            pull.ask(1, 3)
            await pull.idle()
            assert sorted(pull.pulled) == [0, 1, 2, 3, 4]
            for at, target, size in request.places:
                assert made.arena.view[target : target + size] == pool[at : at + size]
            assert made.pool.view == pool
            assert made.runs == []

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_put_of_many_blocks_and_of_large_ones(self, verbs: Verbs, seed: int) -> None:
        for layer_bytes, key_count in (((64,), 500), ((5000 * KIB, 5000 * KIB), 2)):
            async with session(verbs, memory_bytes=24 * 1024 * KIB) as made:
                request = Request(made, layer_bytes=layer_bytes, key_count=key_count, layered=True)
                request.fill(made.pool, seed)
                pull = Pull(request)
                pull.ask(*range(key_count))
                await pull.idle()
                assert sorted(pull.pulled) == list(range(key_count))
                for at, target, size in request.places:
                    assert made.arena.view[target : target + size] == made.pool.view[at : at + size]

    @pytest.mark.asyncio
    async def test_stopped_put_becomes_idle_and_tells_no_block(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            pull = Pull(Request(made, layer_bytes=(100 * KIB,), key_count=20))
            pull.ask(*range(20))
            pull.puller.stop()
            await pull.idle()
            assert pull.pulled == []
            assert pull.puller.failure is None
            pull.ask(3)
            assert pull.puller.idle

    @pytest.mark.asyncio
    async def test_stopped_put_that_waits_for_room_is_told_that_it_is_idle(
        self, verbs: Verbs
    ) -> None:
        async with session(verbs) as made:
            pull = Pull(Request(made, layer_bytes=(4 * KIB,), key_count=200))
            pull.ask(*range(200))
            pull.puller.stop()
            assert not pull.puller.idle
            await made.watch.until(lambda: pull.ready_count > 0, "the call")
            assert pull.puller.idle

    # --- what fails ------------------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_wrong_key_fails_a_fetch_and_names_what_is_lost(self, verbs: Verbs) -> None:
        options = msgspec.structs.replace(QUICK, rails_max=1)
        async with session(verbs, options=options) as made:
            good = Fetch(Request(made), 1000)
            await good.run()
            fetch = Fetch(bad_request(made), 1000)
            fetch.feed()
            assert fetch.sink.failure is None
            await made.watch.until(lambda: fetch.ready_count > 0, "the failure")
            assert isinstance(fetch.sink.failure, TransportError)
            for word in (made.server.rail_names[0], "client", "wrong key"):
                assert word in str(fetch.sink.failure)
            assert fetch.sink.idle
            assert not fetch.sink.accepts
            assert sorted(fetch.released) == list(range(fetch.taken))
            assert sorted(fetch.lost_runs()) == fetch.run_ids()
            assert made.active.failed is not None
            assert [str(error) for error in made.lost[0]] == [str(fetch.sink.failure)]
            # Whoever had nothing under way is told, too, and nobody comes any more.
            assert good.sink.failure is not None
            assert good.lost_runs() == []
            with pytest.raises(TransportError, match="wrong key"):
                Fetch(Request(made))
            await made.watch.until(lambda: bool(made.lost[1]), "the other side")
            assert made.passive.failed is not None

    @pytest.mark.asyncio
    async def test_wrong_key_on_one_rail_leaves_the_other(self, verbs: Verbs, seed: int) -> None:
        async with session(verbs) as made:
            if len(made.server.rail_names) < 2:
                pytest.skip("one device only")
            request = Request(made, first=64 * KIB)
            fetch = Fetch(bad_request(made, place=1), 1000)
            fetch.feed()
            await made.watch.until(lambda: fetch.sink.failure is not None, "the failure")
            await made.watch.until(lambda: fetch.sink.idle, "the runs on the other rail")
            assert 0 < len(fetch.lost_runs()) < fetch.taken
            assert sorted(fetch.released) == list(range(fetch.taken))
            assert made.server.rail_names[1] in str(fetch.sink.failure)
            assert made.active.failed is None
            assert len(made.active.queues) == 1
            request.fill(made.arena, seed)
            again = Fetch(request)
            await again.run()
            await again.arrived()
            for at, source, size in request.places:
                assert made.pool.view[at : at + size] == made.arena.view[source : source + size]
            assert again.sink.failure is None

    @pytest.mark.asyncio
    async def test_wrong_key_fails_a_put(self, verbs: Verbs) -> None:
        options = msgspec.structs.replace(QUICK, rails_max=1)
        async with session(verbs, options=options) as made:
            pull = Pull(bad_request(made))
            pull.ask(0, 1, 2)
            await made.watch.until(lambda: pull.ready_count > 0, "the failure")
            assert "wrong key" in str(pull.puller.failure)
            assert pull.pulled == []
            assert pull.puller.idle
            pull.ask(3)
            assert pull.puller.idle

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_peer_that_is_gone(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            made.passive.close()
            fetch = Fetch(Request(made), 1000)
            pull = Pull(Request(made))
            fetch.feed()
            pull.ask(0)
            await made.watch.until(
                lambda: fetch.sink.idle and pull.puller.idle and made.active.failed is not None,
                "the failures",
            )
            assert "does not answer" in str(fetch.sink.failure)
            assert "does not answer" in str(pull.puller.failure)
            assert sorted(fetch.lost_runs()) == fetch.run_ids()
            assert sorted(fetch.released) == list(range(fetch.taken))

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_peer_that_takes_no_news_has_its_time(self, verbs: Verbs) -> None:
        options = msgspec.structs.replace(QUICK, rails_max=1, stall_s=1.0)
        loop = ManualLoop()  # nothing ever happens on it
        async with session(verbs, options=options, client_loop=loop.as_loop) as made:
            fetch = Fetch(Request(made, layer_bytes=(4096,), key_count=4), bytes_max=32)
            await fetch.run()
            assert isinstance(fetch.sink.failure, TransportTimeout)
            assert "nothing has completed for 1 s" in str(fetch.sink.failure)
            assert fetch.taken > RECEIVES_MAX
            assert len(fetch.lost_runs()) == fetch.taken - RECEIVES_MAX
            assert sorted(fetch.released) == list(range(fetch.taken))

    @pytest.mark.asyncio
    async def test_news_of_a_queue_pair_that_is_given_up_are_taken(self, verbs: Verbs) -> None:
        loop = ManualLoop()  # nobody looks at what has come
        async with session(verbs, client_loop=loop.as_loop) as made:
            fetch = Fetch(Request(made), 1000)
            await fetch.run()
            assert made.runs == []
            lost = made.passive.queues[-1]
            made.passive.fail(lost, TransportError("the port is down"))
            assert lost.closed
            assert not made.passive.stuck
            for queue in list(made.passive.queues):
                made.passive.fail(queue, TransportError("the port is down"))
            assert sorted(made.runs) == sorted(fetch.run_ids())

    @pytest.mark.asyncio
    async def test_queue_pair_that_can_neither_be_flushed_nor_closed_is_stuck(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with session(verbs) as made:
            request = Request(made, layer_bytes=(256 * KIB,), key_count=4)
            fetch = Fetch(request, 256 * KIB)
            fetch.feed()
            pull = Pull(request)
            pull.ask(0)
            queues = [*made.active.queues, *made.passive.queues]
            with indestructible(monkeypatch, queues):
                made.active.close()
                made.passive.close()
            assert made.active.stuck
            assert made.passive.stuck
            # The memory is used never again.
            assert fetch.released == []
            assert not pull.puller.idle
            assert pull.puller.failure is not None
            for queue in queues:
                queue.pair.close()

    @pytest.mark.asyncio
    async def test_memory_that_is_not_registered_is_a_mistake_of_ours(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            fetch, pull = Fetch(Request(made)), Pull(Request(made))
            made.arena_memory.close()
            fetch.feed()
            pull.ask(0)
            assert fetch.ready_count == pull.ready_count == 0
            await made.watch.until(lambda: bool(fetch.ready_count and pull.ready_count), "failures")
            for part in (fetch.sink, pull.puller):
                assert isinstance(part.failure, LocalProtocolError)
                assert "register" in str(part.failure)
                assert part.idle
            assert fetch.released == [0]
            assert sorted(fetch.lost_runs()) == fetch.run_ids()
            assert made.active.failed is None

    # --- ends ------------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_close_ends_what_is_under_way(self, verbs: Verbs) -> None:
        async with session(verbs, memory_bytes=24 * 1024 * KIB) as made:
            request = Request(made, layer_bytes=(512 * KIB,), key_count=20)
            fetch, pull = Fetch(request, 1024 * KIB), Pull(request)
            request.fill(made.arena, 1)
            fetch.feed()
            pull.ask(5, 6)
            made.active.close()
            assert sorted(fetch.released) == list(range(fetch.taken))
            seen = bytes(made.pool.view)
            assert fetch.sink.idle
            assert pull.puller.idle
            assert fetch.ready_count == 1
            assert pull.ready_count == 1
            assert sorted(fetch.lost_runs()) == fetch.run_ids()
            for part in (fetch.sink, pull.puller):
                assert "closed" in str(part.failure)
            made.active.close()
            await turns()
            assert made.pool.view == seen
            peer = Rails(rails=(RailAddress(),))
            for call in (
                made.active.addresses,
                lambda: made.active.connect(peer),
                lambda: Fetch(request),
                lambda: Pull(request),
            ):
                with pytest.raises(VerbsClosed, match="closed"):
                    call()

    @pytest.mark.asyncio
    async def test_sink_whose_connection_is_gone_releases_its_chunks(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            fetch = Fetch(Request(made), 1000)
            fetch.feed()
            fetch.sink.close()
            await made.watch.until(lambda: len(fetch.released) == fetch.taken, "the releases")
            assert fetch.ready_count == 0

    @pytest.mark.asyncio
    async def test_places_are_those_of_the_peer(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            active, passive = made.ends(connect=False)
            theirs = passive.addresses()
            assert len(theirs.rails) == len(made.client.rail_names)
            assert theirs.receives == RECEIVES_MAX
            with pytest.raises(LocalProtocolError, match="not connected"):
                Fetch(Request(made), end=active)
            with pytest.raises(LocalProtocolError, match="passive"):
                Fetch(Request(made), end=passive)
            active.connect(Rails(rails=(theirs.rails[0], RailAddress(), RailAddress())))
            ours = active.addresses()
            assert [bool(rail.number) for rail in ours.rails] == [True, False, False]
            with pytest.raises(LocalProtocolError, match="connected twice"):
                active.connect(theirs)
            passive.connect(ours)
            assert len(passive.queues) == len(active.queues) == 1

    @pytest.mark.asyncio
    async def test_peer_without_a_queue_pair_in_any_place(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            for peer in (
                Rails(rails=(RailAddress(),)),
                Rails(rails=(RailAddress(number=77, gid="fe80::zz"),) * 8),
                Rails(rails=(RailAddress(number=77, gid="fe80::1", mtu_bytes=999),) * 8),
            ):
                active, passive = made.ends(connect=False)
                with pytest.raises(TransportError, match="no rail could be connected"):
                    active.connect(peer)
                with pytest.raises(TransportError, match="no rail could be connected"):
                    active.addresses()
                active.close()
                passive.close()

    @pytest.mark.asyncio
    async def test_rail_that_the_passive_side_cannot_connect_is_left_out(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lost = {1}
        real = RdmaNode.connect

        def connect(self: RdmaNode, queue: RdmaQueue, peer: QueueAddress) -> None:
            if queue.place in lost and not queue.end.active:
                raise VerbsError("no route")
            real(self, queue, peer)

        monkeypatch.setattr(RdmaNode, "connect", connect)
        async with session(verbs, connect=False) as made:
            names = made.client.rail_names
            if len(names) < 2:
                pytest.skip("one device only")

            def places(peer: str = "server") -> list[bool]:
                end = made.client.end(peer, active=False)
                rails = end.addresses().rails
                end.close()
                return [bool(rail.number) for rail in rails]

            def connect_all() -> None:
                active, passive = made.ends(connect=False)
                active.connect(passive.addresses())
                try:
                    passive.connect(active.addresses())
                finally:
                    active.close()
                    passive.close()

            with pytest.raises(RailsUnreached, match=f"left out.*{names[1]}.*: no route"):
                connect_all()
            assert places() == [True, False]
            assert places("another") == [True, True]
            connect_all()
            # When there is no other, all are tried again.
            lost.add(0)
            with pytest.raises(TransportError, match=r"no rail could be connected.*: no route"):
                connect_all()
            assert places() == [True, True]
            for place in (0, 1):
                made.client.leave_out("server", [place])
            with pytest.raises(TransportError, match=r"lately.*lately"):
                places()
            assert places() == [True, True]

    @pytest.mark.asyncio
    async def test_address_that_nobody_answers_for_is_not_tried_again_soon(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = ManualLoop()
        async with session(verbs, server_loop=loop.as_loop, connect=False) as made:
            tried: list[int] = []

            def attempt(wait_s: float) -> str:
                active, passive = made.ends(connect=False)

                def wait(peer: QueueAddress, tuning: QueueTuning) -> None:
                    tried.append(peer.number)
                    loop.advance(wait_s)
                    raise VerbsError("timed out")

                with monkeypatch.context() as patch:
                    for queue in active.queues:
                        patch.setattr(queue.pair, "connect", wait)
                    with pytest.raises(TransportError, match="no rail could be connected") as told:
                        active.connect(passive.addresses())
                active.close()
                passive.close()
                return str(told.value)

            count = len(made.server.rail_names)
            assert "timed out" in attempt(wait_s=0.0)
            assert len(tried) == count
            text = attempt(wait_s=CONNECT_S)  # one of them, and then there is no time
            assert len(tried) == count + 1
            assert ("the others have taken" in text) is (count > 1)
            assert "nobody has answered for" in attempt(wait_s=0.0)
            assert len(tried) == 2 * count
            loop.advance(UNREACHED_S)
            attempt(wait_s=0.0)
            assert len(tried) == 3 * count

    @pytest.mark.asyncio
    async def test_named_device_that_is_not_there_keeps_its_place(
        self, verbs: Verbs, seed: int
    ) -> None:
        names = [device.name for device in verbs.devices()]
        options = msgspec.structs.replace(QUICK, devices=("nope", names[0]))
        async with session(verbs, options=options) as made:
            assert made.server.rail_names == [f"{names[0]}:1"]
            assert "'nope'" in str(made.server.left_out)
            assert "'nope'" in str(made.server.failures())
            assert [bool(rail.number) for rail in made.active.addresses().rails] == [False, True]
            assert made.pool_memory.rkeys[0] == 0
            request = Request(made)
            request.fill(made.arena, seed)
            fetch = Fetch(request)
            await fetch.run()
            await fetch.arrived()
            assert made.pool.view == request.expected_pool(bytes(len(made.pool.view)))

    @pytest.mark.asyncio
    async def test_region_needs_a_key_for_each_rail(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            if len(made.server.rail_names) < 2:
                pytest.skip("one device only")
            region = made.pool_memory.described()
            request = Request(made, region=msgspec.structs.replace(region, keys=region.keys[:1]))
            for kind in (Fetch, Pull):
                with pytest.raises(LimitExceeded, match="has 1 keys"):
                    kind(request)

    # --- the node ----------------------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_memory_is_found_by_address(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            node, whole = made.client, made.pool_memory
            assert whole.length == len(made.pool.view)
            assert len(whole.rkeys) == len(whole.lkeys) == len(node.rail_names)
            assert node.find(whole.address + 5, 10) is whole
            assert node.find(whole.address + whole.length - 10, 11) is None
            assert node.find(whole.address - 1, 2) is None
            inner = node.register(made.pool.view[4096:8192])
            assert node.find(whole.address + 4096, 4096) is inner
            assert node.find(whole.address + 4096, 4097) is whole
            inner.close()
            inner.close()
            assert inner.closed
            assert node.find(whole.address + 4096, 4096) is whole

    @pytest.mark.asyncio
    async def test_memory_that_is_refused_leaves_nothing(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            with pytest.raises(VerbsError):
                made.client.register(memoryview(b"read-only"[:0]))
            assert made.client.find(1, 1) is None

    @pytest.mark.asyncio
    async def test_closed_node_is_closed(self, verbs: Verbs) -> None:
        made = Session(verbs)
        fetch = Fetch(Request(made))
        fetch.feed()
        node = made.server
        node.close()
        node.close()
        assert made.active.closed
        assert made.arena_memory.closed
        assert sorted(fetch.released) == list(range(fetch.taken))
        for call in (
            lambda: node.register(made.arena.view),
            lambda: node.end("x", active=True),
            node.failures,
        ):
            with pytest.raises(VerbsClosed, match="closed"):
                call()
        made.close()

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_hundred_sessions_leave_nothing_behind(self, verbs: Verbs) -> None:
        async with session(verbs) as made:
            request = Request(made)
            for _ in range(200):
                ends = made.ends()
                fetch = Fetch(request, 1 << 20, end=ends[0])
                ends[1].on_run = made._on_run
                await fetch.run()
                assert fetch.sink.failure is None, fetch.sink.failure
                for end in ends:
                    end.close()
            assert [len(rail.queues) for rail in made.server._rails] == [1] * len(
                made.server.rail_names
            )

    @pytest.mark.asyncio
    async def test_options_reach_the_queue_pairs(self, verbs: Verbs) -> None:
        options = RdmaOptions(mtu_bytes=1024, rails_max=1)
        async with session(verbs, options=options) as made:
            assert len(made.server.rail_names) == 1
            (rail,) = made.active.addresses().rails
            assert rail.mtu_bytes == 1024
