"""The contract of verbs: what `Rail`, `QueuePair` and `MemoryRegion` promise.

An implementation joins with a subclass that has the fixtures `verbs` and `environment`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest

from kvstore.buffers import Region
from kvstore.transport.verbs import (
    MemoryRegion,
    NoDevice,
    Opcode,
    Piece,
    QueueAddress,
    QueuePair,
    QueueSetup,
    QueueTuning,
    Rail,
    RailSetup,
    Verbs,
    VerbsClosed,
    VerbsError,
    Work,
)
from tests.rdma.rails_suite import (
    FLUSHED as FLUSHED,
    NO_ACCESS as NO_ACCESS,
    NO_ANSWER as NO_ANSWER,
    SUCCESS as SUCCESS,
    RailTests,
    fill,
)
from tests.support.loops import LOOPS, run_on
from tests.support.tree import ROOT
from tests.support.verbsends import (
    SETUP,
    TUNING,
    End,
    Far,
    address_of,
    connect,
    connected,
    statuses,
    work,
    write,
)

# A wrong local key: soft devices say 2 (operation), others 4 (protection).
LOCAL_ERRORS = (2, 4)
KIB = 1024


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


class VerbsTests(RailTests):
    """See the module."""

    # --- devices ---------------------------------------------------------------------------

    def test_devices_say_what_a_connection_needs(self, verbs: Verbs) -> None:
        devices = verbs.devices()
        assert devices
        for device in devices:
            assert device.name
            for port in device.ports:
                assert port.mtu_bytes in (256, 512, 1024, 2048, 4096)
                assert port.link_layer in ("Ethernet", "InfiniBand")
                assert port.netdev
                assert any(gid.is_ipv4 and gid.kind == "RoCE v2" for gid in port.gids)
                assert not any(gid.address == "::" for gid in port.gids)

    def test_rail_says_what_it_can(self, verbs: Verbs, setup: RailSetup) -> None:
        rail = verbs.open(setup)
        assert rail.name == f"{setup.device}:{setup.port}"
        assert rail.gid in {
            gid.address for device in verbs.devices() for gid in device.ports[0].gids
        }
        assert rail.completions_max == setup.completions_max
        assert rail.pieces_max >= 4
        assert rail.reads_max >= 1
        assert rail.message_bytes_max >= 1024 * KIB
        assert rail.failed() == ""
        rail.close()

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"device": "nope0"}, "no .*device 'nope0'; there are: "),
            ({"port": 7}, "no port 7"),
            ({"gid_index": 200}, "no gid 200; it has"),
        ],
    )
    def test_what_is_not_there_is_named_with_what_is(
        self, verbs: Verbs, setup: RailSetup, changes: Mapping[str, object], told: str
    ) -> None:
        before = descriptors()
        with pytest.raises(NoDevice, match=told):
            verbs.open(setup._replace(**changes))  # type: ignore[arg-type]
        assert descriptors() == before

    # --- memory ----------------------------------------------------------------------------

    def test_sealed_shared_memory_can_be_registered(self, verbs: Verbs, setup: RailSetup) -> None:
        rail = verbs.open(setup)
        memory = Region(64 * KIB)
        address = address_of(memory.view)
        first = rail.register(address, 64 * KIB, remote_write=True)
        second = rail.register(address + 5, 1000)  # again, and no whole pages
        assert (second.address, second.length) == (address + 5, 1000)
        assert first.rkey != second.rkey
        first.close()
        second.close()
        rail.close()
        memory.close()

    def test_memory_that_is_not_there_is_refused(self, verbs: Verbs, setup: RailSetup) -> None:
        rail = verbs.open(setup)
        with mmap.mmap(-1, 16 * KIB) as mapping:
            view = memoryview(mapping)
            address = address_of(view)
            view.release()
        for length in (16 * KIB, 0):
            with pytest.raises(VerbsError, match=f"{length} bytes"):
                rail.register(address, length, remote_write=True)
        rail.close()

    # --- transfer --------------------------------------------------------------------------

    def test_write_arrives_where_it_was_sent_and_nowhere_else(self, pair: tuple[End, End]) -> None:
        near, far = pair
        near.post(write(near, far.far, 4096, 10000, id=77))
        (done,) = near.take(1)
        assert done == (near.queue.number, 77, SUCCESS, False, 0)
        expected = bytearray(b"\2" * len(far.view))
        expected[4096:14096] = b"\1" * 10000
        assert far.view == expected
        assert far.rail.poll() == []

    def test_read_brings_what_is_there(self, pair: tuple[End, End]) -> None:
        near, far = pair
        near.post(work(near, far.far, Opcode.READ, 512, 300 * KIB, id=(1 << 63) - 1))
        (done,) = near.take(1)
        assert done == (near.queue.number, (1 << 63) - 1, SUCCESS, False, 0)
        assert near.view[512 : 512 + 300 * KIB] == b"\2" * 300 * KIB
        assert near.view[:512] == b"\1" * 512
        assert near.view[512 + 300 * KIB :] == b"\1" * (len(near.view) - 512 - 300 * KIB)

    def test_news_never_overtakes_data(self, pair: tuple[End, End]) -> None:
        near, far = pair
        rounds, size = 32, 16 * KIB
        far.queue.post_receives(rounds)
        for number in range(rounds):
            offset = number * size
            near.view[offset : offset + size] = bytes([number + 1]) * size
            near.post(
                write(near, far.far, offset, size, signalled=False),
                work(
                    near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=0x89ABCD00 + number
                ),
            )
        seen = []
        while len(seen) < rounds:
            (news,) = far.take(1)
            assert (news.queue, news.status, news.received) == (far.queue.number, SUCCESS, True)
            number = news.immediate - 0x89ABCD00
            assert far.view[number * size : (number + 1) * size] == bytes([number + 1]) * size
            seen.append(number)
        assert seen == list(range(rounds))
        assert statuses(near.take(rounds)) == [SUCCESS] * rounds

    def test_news_may_carry_data(self, pair: tuple[End, End]) -> None:
        near, far = pair
        far.queue.post_receives(1)
        near.post(
            work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 200 * KIB, immediate=0xFFFFFFFF)
        )
        (news,) = far.take(1)
        assert news.immediate == 0xFFFFFFFF
        assert far.view[: 200 * KIB] == b"\1" * 200 * KIB
        assert near.take(1)[0].status == SUCCESS

    def test_one_completion_tells_of_a_batch(self, pair: tuple[End, End]) -> None:
        near, far = pair
        for _ in range(3):  # room for each batch is there when the one before was polled
            works = [
                write(near, far.far, index * 1024, 1024, id=index, signalled=index == 256)
                for index in range(257)
            ]
            fill(far, 2)
            near.post(*works)
            (done,) = near.take(1)
            assert (done.id, done.status) == (256, SUCCESS)
            assert far.view[: 257 * 1024] == b"\1" * (257 * 1024)
        assert near.rail.poll() == []

    def test_pieces_are_gathered_and_scattered_in_order(self, pair: tuple[End, End]) -> None:
        near, far = pair
        sizes = (1, 70 * KIB, 3000, 5)
        for number, size in enumerate(sizes):
            near.view[number * 100000 : number * 100000 + size] = bytes([10 + number]) * size
        pieces = [near.piece(number * 100000, size) for number, size in enumerate(sizes)]
        gathered = b"".join(bytes([10 + number]) * size for number, size in enumerate(sizes))
        near.post(write(near, far.far, 64, 1, pieces=pieces))  # type: ignore[arg-type]
        assert near.take(1)[0].status == SUCCESS
        assert far.view[64 : 64 + len(gathered)] == gathered
        assert far.view[64 + len(gathered)] == 2

        far.view[64 : 64 + len(gathered)] = bytes(reversed(gathered))
        near.post(
            work(near, far.far, Opcode.READ, 64, 1, pieces=pieces)  # type: ignore[arg-type]
        )
        assert near.take(1)[0].status == SUCCESS
        scattered = b"".join(
            near.view[number * 100000 : number * 100000 + size] for number, size in enumerate(sizes)
        )
        assert scattered == bytes(reversed(gathered))

    def test_both_ends_send_at_once(self, pair: tuple[End, End]) -> None:
        near, far = pair
        half = len(near.view) // 2
        near.post(*(write(near, far.far, index * 4096, 4096) for index in range(half // 4096)))
        far.post(*(write(far, near.far, half + index * 4096, 4096) for index in range(64)))
        assert set(statuses(near.take(half // 4096) + far.take(64))) == {SUCCESS}
        assert far.view[:half] == b"\1" * half
        assert near.view[half : half + 64 * 4096] == b"\2" * 64 * 4096

    def test_largest_message(self, verbs: Verbs, setup: RailSetup) -> None:
        size = 8 * 1024 * KIB
        with connected(verbs, setup, memory_bytes=size) as (near, far):
            assert near.rail.message_bytes_max >= size
            near.view[:] = bytes(range(256)) * (size // 256)
            near.post(write(near, far.far, 0, size))
            assert near.take(1)[0].status == SUCCESS
            assert far.view == near.view

    def test_news_waits_for_a_receive(self, pair: tuple[End, End]) -> None:
        near, far = pair
        far.queue.post_receives(1)
        near.post(
            *(
                work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=number, id=number)
                for number in range(4)
            )
        )
        assert [news.immediate for news in far.take(1)] == [0]
        assert [done.id for done in near.take(1)] == [0]
        far.queue.post_receives(2)
        assert [news.immediate for news in far.take(2)] == [1, 2]
        far.queue.post_receives(1)
        assert [news.immediate for news in far.take(1)] == [3]
        assert [(done.id, done.status) for done in near.take(3)] == [(1, 0), (2, 0), (3, 0)]

    # --- the descriptor --------------------------------------------------------------------

    @pytest.mark.parametrize("loop", list(LOOPS))
    def test_event_loop_is_woken(self, pair: tuple[End, End], loop: str) -> None:
        near, far = pair
        far.queue.post_receives(2)

        async def main() -> list[int]:
            found: list[int] = []
            done = asyncio.Event()
            running = asyncio.get_running_loop()

            def readable() -> None:
                while True:
                    batch = far.rail.poll(1)
                    found.extend(one.immediate for one in batch)
                    if len(found) == 2:
                        done.set()
                    if not batch:
                        return
                    # The second is sent when the first was seen: it must wake us again.
                    if found == [5]:
                        near.post(
                            work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=6)
                        )

            running.add_reader(far.rail.fileno(), readable)
            running.call_soon(
                near.post, work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=5)
            )
            await done.wait()
            running.remove_reader(far.rail.fileno())
            return found

        assert run_on(loop, main()) == [5, 6]

    def test_descriptor_is_readable_while_something_was_not_polled(
        self, pair: tuple[End, End]
    ) -> None:
        near, far = pair
        for _ in range(3):
            assert near.rail.poll() == []
            assert select.select([near.rail], [], [], 0)[0] == []
            near.post(*(write(near, far.far, index * 64, 64, id=index) for index in range(10)))
            found: list[int] = []
            while len(found) < 10:
                assert select.select([near.rail], [], [], 30)[0], found
                while batch := near.rail.poll(3):
                    assert len(batch) <= 3
                    found += [done.id for done in batch]
            assert found == list(range(10))

    # --- mistakes --------------------------------------------------------------------------

    def test_work_needs_a_connection(self, verbs: Verbs, setup: RailSetup) -> None:
        end = End(verbs, setup)
        with pytest.raises(VerbsError, match="not connected"):
            end.post(write(end, end.far, 0, 1))
        end.queue.post_receives(3)  # these it takes before
        end.close()

    def test_what_exceeds_a_limit_is_refused(self, pair: tuple[End, End]) -> None:
        near, far = pair
        one = write(near, far.far, 0, 1)
        with pytest.raises(VerbsError, match="300"):
            near.post(*[one] * 301)
        pieces = [near.piece(0, 1)] * 5
        with pytest.raises(VerbsError, match="5 pieces: at most 4"):
            near.post(one._replace(pieces=pieces))
        near.queue.post_receives(60)
        with pytest.raises(VerbsError, match="65 receives out: at most 64"):
            near.queue.post_receives(5)
        for bad in ({"sends_max": 0}, {"receives_max": 1 << 30}, {"pieces_max": 1000}):
            with pytest.raises(VerbsError, match=f"{next(iter(bad))}="):
                near.rail.queue_pair(SETUP._replace(**bad))

    def test_values_of_a_peer_that_cannot_be_are_refused(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        end = End(verbs, setup)
        good = end.queue.address()
        with pytest.raises(VerbsError, match="gid"):
            end.queue.connect(good._replace(gid="fe80::zz"), TUNING)
        with pytest.raises(VerbsError, match="gid"):
            end.queue.connect(good._replace(gid=""), TUNING)
        with pytest.raises(VerbsError, match="mtu_bytes=1500"):
            end.queue.connect(good._replace(mtu_bytes=1500), TUNING)
        with pytest.raises(VerbsError, match="retry_count=7"):
            end.queue.connect(good, TUNING._replace(retry_count=7))
        end.queue.connect(good, TUNING)
        with pytest.raises(VerbsError, match="connected"):
            end.queue.connect(good, TUNING)
        end.close()

    def test_address_is_the_same_each_time_and_the_psn_is_drawn(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        end = End(verbs, setup)
        assert end.queue.address() == end.queue.address()
        others = [end.rail.queue_pair(SETUP) for _ in range(4)]
        assert len({queue.address().psn for queue in others}) > 1
        assert all(0 <= queue.address().psn < 1 << 24 for queue in others)
        end.close()

    @pytest.mark.parametrize("opcode", [Opcode.WRITE, Opcode.READ])
    @pytest.mark.parametrize("wrong", ["key", "behind", "across", "before", "closed", "rights"])
    def test_memory_without_access_is_out_of_reach(
        self, pair: tuple[End, End], opcode: Opcode, wrong: str
    ) -> None:
        near, far = pair
        far.queue.post_receives(2)
        bad = work(near, far.far, opcode, 0, 4096, id=5)
        end_of_memory = far.address + len(far.view)
        if wrong == "key":
            bad = bad._replace(rkey=bad.rkey ^ 0x1100)
        elif wrong == "behind":
            bad = bad._replace(remote_address=end_of_memory)
        elif wrong == "across":
            bad = bad._replace(remote_address=end_of_memory - 4095)
        elif wrong == "before":
            bad = bad._replace(remote_address=far.address - 1)
        elif wrong == "closed":
            far.region.close()
        else:
            other = far.rail.register(
                far.address,
                4096,
                remote_write=opcode != Opcode.WRITE,
                remote_read=opcode != Opcode.READ,
            )
            bad = bad._replace(rkey=other.rkey)
        near.post(bad._replace(signalled=False), write(near, far.far, 8192, 10, id=6))
        done = near.take(2)
        assert [one.id for one in done] == [5, 6]
        assert statuses(done) == [NO_ACCESS, FLUSHED]
        assert set(far.view) == {2}
        assert set(near.view) == {1}
        # Both ends are of no use any more.
        near.post(write(near, far.far, 0, 10, id=7))
        assert [(one.id, one.status) for one in near.take(1)] == [(7, FLUSHED)]
        lost = far.take(2)
        assert all(one.received and one.status != SUCCESS for one in lost)

    def test_local_memory_that_is_not_registered_is_not_sent(self, pair: tuple[End, End]) -> None:
        near, far = pair
        near.post(
            write(
                near,
                far.far,
                0,
                10,
                pieces=[  # type: ignore[arg-type]
                    Piece(near.address, 10, near.region.lkey ^ 0x1100)
                ],
            )
        )
        assert near.take(1)[0].status in LOCAL_ERRORS
        assert set(far.view) == {2}

    # --- ends ------------------------------------------------------------------------------

    def test_flush_completes_what_is_outstanding(self, pair: tuple[End, End]) -> None:
        near, far = pair
        near.queue.post_receives(3)
        # The peer takes no news: these wait.
        near.post(
            *(
                work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, id=number)
                for number in range(3)
            ),
        )
        near.queue.flush()
        near.queue.flush()
        done = near.take(6)
        assert {one.status for one in done} == {FLUSHED}
        assert [one.id for one in done if not one.received] == [0, 1, 2]
        assert sum(one.received for one in done) == 3

    def test_flushed_end_is_written_by_nobody(self, pair: tuple[End, End]) -> None:
        near, far = pair
        far.queue.flush()
        near.post(write(near, far.far, 0, 4096))
        assert near.take(1)[0].status == NO_ANSWER
        assert set(far.view) == {2}

    def test_closed_end_is_written_by_nobody(self, pair: tuple[End, End]) -> None:
        near, far = pair
        far.queue.close()
        near.post(write(near, far.far, 0, 4096, signalled=False), write(near, far.far, 0, 1, id=2))
        done = near.take(2)
        assert statuses(done) == [NO_ANSWER, FLUSHED]
        assert set(far.view) == {2}

    def test_end_that_nobody_connected_to_does_not_answer(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        with contextlib.ExitStack() as stack:
            near, far = End(verbs, setup), End(verbs, setup)
            stack.callback(near.close)
            stack.callback(far.close)
            near.queue.connect(far.queue.address(), TUNING)
            near.post(write(near, far.far, 0, 10))
            assert near.take(1)[0].status == NO_ANSWER

    def test_no_completion_of_a_closed_queue_pair_is_polled(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        with contextlib.ExitStack() as stack:
            near, far = End(verbs, setup), End(verbs, setup)
            stack.callback(near.close)
            stack.callback(far.close)
            pairs = []
            for _ in range(3):
                ours, theirs = near.rail.queue_pair(SETUP), far.rail.queue_pair(SETUP)
                ours.connect(theirs.address(), TUNING)
                theirs.connect(ours.address(), TUNING)
                pairs.append(ours)
            one = write(near, far.far, 0, 100)
            for number, queue in enumerate(pairs):
                queue.post_receives(1)
                queue.post([one._replace(id=number * 100 + index) for index in range(40)])
            pairs[1].close()
            assert pairs[1].closed
            done = near.take(80)
            assert {one.queue for one in done} == {pairs[0].number, pairs[2].number}
            assert sorted(one.id for one in done) == [*range(40), *range(200, 240)]
            assert near.rail.poll() == []
            # The descriptor has not gone to sleep over it.
            pairs[2].post([one])
            assert near.take(1)[0].status == SUCCESS

    def test_closing_twice_is_harmless_and_nothing_else_is_possible(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        with connected(verbs, setup) as (near, far):
            one = write(near, far.far, 0, 10)
            peer = far.queue.address()
            near.region.close()
            near.region.close()
            spare = near.rail.queue_pair(SETUP)
            for queue in (spare, near.queue):
                if queue is near.queue:
                    near.rail.close()  # closes what was made of it
                    near.rail.close()
                else:
                    queue.close()
                assert queue.closed
                queue.close()
                self.check_closed(
                    queue.address,
                    lambda queue=queue: queue.connect(peer, TUNING),
                    lambda queue=queue: queue.post([one]),
                    lambda queue=queue: queue.post_receives(1),
                    queue.flush,
                )
            assert near.rail.closed
            self.check_closed(
                near.rail.fileno,
                lambda: near.rail.register(near.address, 4096),
                lambda: near.rail.queue_pair(SETUP),
                near.rail.poll,
                near.rail.failed,
            )

    def check_closed(self, *calls: Callable[[], object]) -> None:
        """Each of them says that it was closed."""
        for call in calls:
            with pytest.raises(VerbsClosed, match="closed"):
                call()

    def test_rail_closes_regions_and_queue_pairs(self, verbs: Verbs, setup: RailSetup) -> None:
        before = descriptors()
        with connected(verbs, setup) as (near, far):
            far.queue.post_receives(5)
            near.post(*[write(near, far.far, 0, 64 * KIB)] * 20)
            made: list[MemoryRegion | QueuePair | Rail] = [near.region, near.queue, near.rail]
            near.rail.close()
            far.rail.close()
            for part in made:
                part.close()
        assert descriptors() == before

    @pytest.mark.slow
    def test_thousand_queue_pairs_leave_nothing_behind(
        self, verbs: Verbs, setup: RailSetup
    ) -> None:
        with connected(verbs, setup) as (near, far):
            small = QueueSetup(sends_max=8, receives_max=8, pieces_max=1)
            near.post(write(near, far.far, 0, 10))
            near.take(1)
            before = descriptors()
            for number in range(1000):
                ours, theirs = near.rail.queue_pair(small), far.rail.queue_pair(small)
                if number % 10 == 0:
                    ours.connect(theirs.address(), TUNING)
                    theirs.connect(ours.address(), TUNING)
                    theirs.post_receives(1)
                    ours.post([work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 64)])
                    assert near.take(1)[0].status == SUCCESS
                    assert far.take(1)[0].received
                ours.close()
                theirs.close()
            assert descriptors() == before

    # --- what breaks -----------------------------------------------------------------------

    @pytest.mark.slow
    def test_peer_that_was_killed_does_not_answer(
        self, verbs: Verbs, setup: RailSetup, environment: Mapping[str, str]
    ) -> None:
        near = End(verbs, setup)
        peer = subprocess.Popen(
            [sys.executable, "-m", "tests.support.verbsends", json.dumps(setup)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with peer, contextlib.ExitStack() as stack:
            stack.callback(near.close)
            stack.callback(peer.kill)
            assert peer.stdin is not None
            assert peer.stdout is not None
            queue, address, rkey = json.loads(peer.stdout.readline())
            far = Far(QueueAddress(*queue), address, rkey)
            peer.stdin.write(json.dumps(near.queue.address()) + "\n")
            peer.stdin.flush()
            assert peer.stdout.readline() == "ready\n"
            near.queue.connect(far.queue, TUNING)
            # Its memory is reached from here, in both directions.
            near.view[:5] = b"hello"
            near.post(write(near, far, 0, 5))
            near.post(
                work(
                    near,
                    far,
                    Opcode.READ,
                    0,
                    5,
                    pieces=[near.piece(100, 5)],  # type: ignore[arg-type]
                )
            )
            assert statuses(near.take(2)) == [SUCCESS, SUCCESS]
            assert near.view[100:105] == b"hello"
            peer.kill()
            peer.wait()
            near.post(
                write(near, far, 0, 5, signalled=False),
                write(near, far, 0, 5),
                write(near, far, 0, 5),
            )
            assert statuses(near.take(3)) == [NO_ANSWER, FLUSHED, FLUSHED]

    def test_patience_with_a_peer_has_an_end(self, verbs: Verbs, setup: RailSetup) -> None:
        with contextlib.ExitStack() as stack:
            near, far = End(verbs, setup), End(verbs, setup)
            stack.callback(near.close)
            stack.callback(far.close)
            connect(near, far, QueueTuning(timeout=8, retry_count=0))
            far.queue.close()
            near.post(Work(1, Opcode.WRITE, [near.piece(0, 1)], far.address, far.region.rkey))
            assert near.take(1)[0].status == NO_ANSWER
