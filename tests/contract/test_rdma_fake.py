"""RDMA keeps its promises on the imitation of verbs; and those that only it can put to the test."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kvstore.errors import Busy, TransportError
from kvstore.transport import rdma, rdma_rails
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_queue import SENDS_MAX
from kvstore.transport.verbs import NoDevice, Rail, RailSetup, Verbs, VerbsError, VerbsForbidden
from tests.rdma.rdma_suite import RdmaTests
from tests.support.fakedevice import READS_MAX
from tests.support.fakeverbs import PACKET_BYTES, FakeVerbs
from tests.support.loops import LOOPS, ManualLoop, run_on, turns
from tests.support.rdmaends import QUICK, Fetch, Pull, Request, session

ONE_RAIL = msgspec.structs.replace(QUICK, rails_max=1)


class TestFake(RdmaTests):
    """The suite."""

    @pytest.fixture
    def verbs(self, fake: FakeVerbs) -> Verbs:
        """Imitated."""
        return fake


@pytest.mark.asyncio
async def test_nothing_is_released_before_it_has_moved(fake: FakeVerbs) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        request = Request(made, layer_bytes=(2 * PACKET_BYTES,), key_count=4)
        fetch = Fetch(request, 2 * PACKET_BYTES)
        fake.hold()
        fetch.feed()
        await turns()
        assert fetch.taken == len(fetch.news) == 4
        assert fetch.released == made.runs == []
        assert not fetch.sink.idle
        fake.step(3)
        await made.watch.until(lambda: bool(fetch.released and made.runs), "a run")
        assert fetch.released == [0]
        assert made.runs == fetch.run_ids()[:1]
        fake.release()
        await fetch.run()
        assert fetch.released == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_nothing_is_touched_after_close(fake: FakeVerbs, seed: int) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        request = Request(made, layer_bytes=(4 * PACKET_BYTES,), key_count=4)
        request.fill(made.arena, seed)
        fetch, pull = Fetch(request, 4 * PACKET_BYTES), Pull(Request(made, first=4096 * 1024))
        fake.hold()
        fetch.feed()
        pull.ask(0)
        fake.step(6)
        made.active.close()
        assert sorted(fetch.released) == [0, 1, 2, 3]
        assert pull.pulled == []
        seen, held = bytes(made.pool.view), bytes(made.arena.view)
        assert seen.count(0) < len(seen)
        fake.release()
        await turns()
        assert made.pool.view == seen
        assert made.arena.view == held
        assert fake.waiting() == 0


@pytest.mark.asyncio
async def test_asker_that_closes_is_written_no_more(fake: FakeVerbs, seed: int) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        request = Request(made, layer_bytes=(4 * PACKET_BYTES,), key_count=4)
        request.fill(made.arena, seed)
        fetch = Fetch(request, 4 * PACKET_BYTES)
        fake.hold()
        fetch.feed()
        fake.step(6)
        made.passive.close()
        seen = bytes(made.pool.view)
        fake.release()
        await made.watch.until(lambda: fetch.sink.idle, "the failure")
        assert "does not answer" in str(fetch.sink.failure)
        assert made.pool.view == seen
        # The first was done; of the others nobody knows.
        assert fetch.lost_runs() == fetch.run_ids()[1:]


@pytest.mark.asyncio
@pytest.mark.slow
async def test_device_that_is_removed_in_flight(fake: FakeVerbs, seed: int) -> None:
    options = msgspec.structs.replace(QUICK, stall_s=1.0)
    async with session(fake, options=options) as made:
        request = Request(made, layer_bytes=(PACKET_BYTES,), key_count=8)
        request.fill(made.arena, seed)
        fetch = Fetch(request, PACKET_BYTES)
        fake.hold()
        fetch.feed()
        fake.remove("fake1")
        fake.release()
        await made.watch.until(lambda: fetch.sink.idle, "the failure")
        assert "the device was removed" in str(fetch.sink.failure)
        assert len(fetch.lost_runs()) == 4
        assert sorted(fetch.released) == list(range(8))
        assert made.active.failed is None
        await made.watch.until(lambda: bool(made.lost[1]), "the other side")
        assert list(made.server.failures()) == ["fake1:1"]

        # New ends have one rail, and memory has no key for the other.
        active, passive = made.ends()
        passive.on_run = made._on_run
        assert [bool(rail.number) for rail in active.addresses().rails] == [True, False]
        again = Fetch(Request(made, first=4096 * 1024), end=active)
        await again.run()
        await again.arrived()
        assert again.sink.failure is None
        more = made.server.register(made.arena.view[:4096])
        assert more.lkeys[0]
        assert more.lkeys[1] == 0
        # It has no key for that memory: it stays away when it is there again.
        fake.bring_up("fake1")
        assert list(made.server.failures()) == ["fake1:1"]
        assert [queue.place for queue in made.server.end("x", active=True).queues] == [0]


@pytest.mark.asyncio
async def test_no_rail_is_left(fake: FakeVerbs) -> None:
    async with session(fake) as made:
        for name in ("fake0", "fake1"):
            fake.take_down(name)
        with pytest.raises(
            TransportError, match=r"no rail works: fake0:1: the port is down; fake1"
        ):
            made.server.end("x", active=True)
        with pytest.raises(NoDevice, match=r"up; there are: fake0:1 \(down"):
            RdmaNode(made.server.loop, fake)
        fake.bring_up("fake1")
        end = made.server.end("x", active=True)
        assert [queue.place for queue in end.queues] == [1]


@pytest.mark.asyncio
async def test_sessions_have_room_for_their_completions(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rdma_rails, "COMPLETIONS_MAX", 2 * SENDS_MAX)
    async with session(fake) as made:
        second = made.server.end("second", active=True)
        with pytest.raises(Busy, match=f"fake0:1: {2 * SENDS_MAX} completions of other sessions"):
            made.server.end("third", active=True)
        second.close()
        made.server.end("third", active=True).close()


class Unwilling(FakeVerbs):
    """Lets nobody open a device, or one of them."""

    refused: tuple[str, ...] = ()

    def open(self, setup: RailSetup) -> Rail:
        if setup.device in self.refused:
            raise VerbsForbidden(f"{setup.device}: not for you")
        return super().open(setup)


@pytest.mark.asyncio
async def test_rails_that_cannot_be_opened_are_left_out(tmp_path: Path) -> None:
    verbs = Unwilling(tmp_path)
    verbs.refused = ("fake0",)
    loop = ManualLoop()
    node = RdmaNode(loop.as_loop, verbs)
    assert node.rail_names == ["fake1:1"]
    assert [str(error) for error in node.left_out] == ["fake0: not for you"]
    assert len(loop.readers) == 1
    node.close()
    assert not loop.readers
    verbs.refused = ("fake0", "fake1")
    with pytest.raises(VerbsForbidden, match="fake0: not for you; fake1: not for you"):
        RdmaNode(loop.as_loop, verbs)
    verbs.close()


@pytest.mark.asyncio
async def test_refused_memory_is_given_back_on_all_rails(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(fake) as made:
        first, second = (rail.rail for rail in made.server._rails)

        def refuse(*_: object, **__: object) -> None:
            raise VerbsForbidden("locked memory")

        monkeypatch.setattr(second, "register", refuse)
        before = dict(first.regions)  # type: ignore[attr-defined]
        with pytest.raises(VerbsForbidden, match="locked memory"):
            made.server.register(made.arena.view[:4096])
        assert first.regions == before  # type: ignore[attr-defined]


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["take", "waiting", "receive"])
async def test_device_that_takes_no_work(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        layers = SENDS_MAX + 10 if call == "waiting" else 1
        fetch = Fetch(Request(made, layer_bytes=(16,) * layers, layered=True), 1 << 20)
        (queue,) = (made.passive if call == "receive" else made.active).queues

        def refuse(*_: object) -> None:
            raise VerbsError("no more")

        if call == "waiting":
            fake.hold()
            fetch.feed()
        monkeypatch.setattr(queue.pair, "post_receives" if call == "receive" else "post", refuse)
        if call == "receive":
            many = Fetch(fetch.request, 2)
            many.feed()
            await made.watch.until(lambda: bool(made.lost[1]), "the failure")
            assert "no more" in str(made.lost[1][0])
            assert len(made.runs) >= 32
            return
        fake.release()
        fetch.feed()
        await made.watch.until(lambda: fetch.ready_count > 0, "the failure")
        assert "no more" in str(fetch.sink.failure)
        assert fetch.released == [0]
        assert len(fetch.news) == 1
        assert fetch.lost_runs() == fetch.run_ids()


@pytest.mark.asyncio
async def test_completions_that_nobody_has_room_for_end_a_rail(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(fake, options=QUICK) as made:

        def broken(_: int) -> None:
            raise VerbsError("more completions than there is room for")

        monkeypatch.setattr(made.server._rails[0].rail, "poll", broken)
        fetch = Fetch(Request(made), 1000)
        fetch.feed()
        await made.watch.until(lambda: fetch.sink.idle, "the failure")
        assert "more completions" in str(fetch.sink.failure)
        assert "more completions" in made.server.failures()["fake0:1"]
        assert [queue.place for queue in made.active.queues] == [1]


@pytest.mark.parametrize("loop", list(LOOPS))
def test_both_event_loops_take_completions(fake: FakeVerbs, loop: str, seed: int) -> None:
    async def main() -> None:
        async with session(fake, memory_bytes=256 * 1024) as made:
            request = Request(made)
            request.fill(made.arena, seed)
            fetch, pull = Fetch(request, 100), Pull(Request(made, first=128 * 1024))
            await fetch.run()
            await fetch.arrived()
            pull.ask(0, 1, 2, 3, 4)
            await pull.idle()
            assert len(pull.pulled) == 5

    run_on(loop, main())


@pytest.mark.asyncio
async def test_callback_that_fails_costs_others_nothing(fake: FakeVerbs) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        reported: list[dict[str, object]] = []
        made.server.loop.set_exception_handler(lambda _, context: reported.append(context))
        request = Request(made)
        fetch = Fetch(request, 1000)

        def fail(*_: object) -> None:
            raise ValueError("on purpose")

        made.passive.on_run = fail
        fetch.sink.on_ready = fail
        other = Pull(request)
        other.ask(0, 1, 2)
        await fetch.run()
        await other.idle()
        assert sorted(fetch.released) == list(range(fetch.taken))
        await made.watch.until(lambda: len(other.pulled) == 3, "the put")
        assert all("on purpose" in repr(context["exception"]) for context in reported)
        assert {context["message"] for context in reported} <= {
            "rdma to client: a callback failed",
            "rdma to server: a callback failed",
        }
        assert reported


@pytest.mark.asyncio
async def test_no_more_news_under_way_than_the_peer_takes(fake: FakeVerbs) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        active, passive = made.ends(connect=False)
        active.connect(msgspec.structs.replace(passive.addresses(), receives=2))
        passive.connect(active.addresses())
        fetch = Fetch(Request(made), 1000, end=active)
        fake.hold()
        fetch.feed()
        assert fetch.taken == 2
        # Room is told of, also while something is under way.
        fake.step()
        await made.watch.until(lambda: fetch.ready_count == 1, "room")
        assert not fetch.sink.idle
        fetch.feed()
        assert fetch.taken == 3
        fake.release()
        await fetch.run()


@pytest.mark.asyncio
async def test_reads_under_way_are_bounded(fake: FakeVerbs) -> None:
    async with session(fake, options=ONE_RAIL) as made:
        pull = Pull(Request(made, layer_bytes=(64,), key_count=100))
        fake.hold()
        pull.ask(*range(100))
        assert fake.waiting() == 2 * READS_MAX
        # Writes have their room beside them.
        fetch = Fetch(Request(made, first=4096 * 1024), 1000)
        fetch.feed(1)
        assert fetch.taken == 1
        fake.release()
        await pull.idle()
        assert sorted(pull.pulled) == list(range(100))


@pytest.mark.asyncio
async def test_packets_are_no_larger_than_both_sides_take(fake: FakeVerbs) -> None:
    options = msgspec.structs.replace(ONE_RAIL, mtu_bytes=1024)
    async with session(fake, options=options) as made:
        for theirs, both in ((4096, 1024), (512, 512)):
            active, passive = made.ends(connect=False)
            (rail,) = passive.addresses().rails
            peer = msgspec.structs.replace(rail, mtu_bytes=theirs)
            active.connect(msgspec.structs.replace(passive.addresses(), rails=(peer,)))
            assert active.queues[0].pair.peer.mtu_bytes == both  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_loop_that_had_no_time_is_no_stall(fake: FakeVerbs) -> None:
    loop = ManualLoop()
    async with session(fake, options=ONE_RAIL, server_loop=loop.as_loop) as made:
        fetch = Fetch(Request(made), 1000)
        fetch.feed()
        fake.wait(lambda: fake.waiting() == 0, "all packets")
        loop.advance(100.0)
        assert fetch.sink.failure is None
        assert fetch.sink.idle
        assert sorted(fetch.released) == list(range(fetch.taken))
        # It goes on watching, for as long as there are sessions.
        assert len(loop.pending) == 1
        made.active.close()
        loop.advance(100.0)
        assert not loop.pending


@pytest.mark.asyncio
async def test_nothing_is_forgotten_when_others_have_their_turn(
    fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rdma, "_POLL_COUNT", 2)
    async with session(fake, options=ONE_RAIL) as made:
        fetch = Fetch(Request(made), 100)
        fake.hold()
        fetch.feed()
        fake.release()
        fake.wait(lambda: fake.waiting() == 0, "all packets")
        await fetch.run()
        await fetch.arrived()
