"""The imitation of verbs keeps their contract; and what only it can do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport.verbs import Verbs, VerbsError
from tests.rdma.verbs_suite import FLUSHED, NO_ACCESS, NO_ANSWER, VerbsTests
from tests.support.fakeverbs import PACKET_BYTES, VARIABLE, FakeVerbs
from tests.support.tree import ROOT
from tests.support.verbsends import (
    SETUP,
    TUNING,
    End,
    connect,
    connected,
    rail_setups,
    statuses,
    write,
)


class TestFake(VerbsTests):
    """The contract."""

    @pytest.fixture
    def verbs(self, fake: FakeVerbs) -> Verbs:
        """Imitated."""
        return fake

    @pytest.fixture
    def environment(self, tmp_path: Path) -> dict[str, str]:
        """What a process needs to be on it."""
        return {VARIABLE: str(tmp_path)}


# --- what only the imitation can do ----------------------------------------------------------


@pytest.fixture
def pair(fake: FakeVerbs) -> Iterator[tuple[End, End]]:
    """Two connected ends."""
    with connected(fake, rail_setups(fake)[0]) as ends:
        yield ends


def test_held_work_is_done_packet_by_packet(fake: FakeVerbs, pair: tuple[End, End]) -> None:
    near, far = pair
    near.view[:] = b"\1" * len(near.view)
    fake.hold()
    near.post(
        write(near, far.far, 0, 2 * PACKET_BYTES + 1, id=1),
        write(near, far.far, 3 * PACKET_BYTES, 10, id=2),
    )
    assert fake.waiting() == 2
    assert set(far.view) == {0}
    fake.step()
    assert far.view[: PACKET_BYTES + 1] == b"\1" * PACKET_BYTES + b"\0"
    fake.step(2)
    assert near.take(1)[0].id == 1
    assert far.view[2 * PACKET_BYTES] == 1
    assert far.view[3 * PACKET_BYTES] == 0
    assert fake.waiting() == 1
    fake.release()
    assert near.take(1)[0].id == 2
    assert far.view[3 * PACKET_BYTES] == 1
    assert fake.waiting() == 0
    assert fake.executed() == 4


def test_nothing_moves_when_hold_has_returned(fake: FakeVerbs, pair: tuple[End, End]) -> None:
    near, far = pair
    works = [write(near, far.far, index * 1024, 1024) for index in range(250)]
    cuts = set()
    late = 0
    for number in range(1, 21):
        near.view[:] = bytes([number]) * len(near.view)
        before = fake.executed()
        near.post(*works)
        fake.wait(lambda before=before: fake.executed() > before, "the first packet")
        fake.hold()
        count, seen = fake.executed(), bytes(far.view)
        for _ in range(20):  # long enough for another packet
            assert bytes(far.view) == seen
        late += fake.executed() - count
        cuts.add(seen.count(number))
        fake.release()
        near.take(250)
    assert late == 0
    assert len(cuts) > 1


@pytest.mark.parametrize("end", ["flush", "close", "region", "rail"])
def test_what_was_cut_off_is_written_no_more(
    fake: FakeVerbs, pair: tuple[End, End], end: str
) -> None:
    near, far = pair
    near.view[:] = b"\1" * len(near.view)
    fake.hold()
    near.post(write(near, far.far, 0, 4 * PACKET_BYTES))
    fake.step()
    {
        "flush": far.queue.flush,
        "close": far.queue.close,
        "region": far.region.close,
        "rail": far.rail.close,
    }[end]()
    fake.release()
    assert near.take(1)[0].status == (NO_ACCESS if end == "region" else NO_ANSWER)
    assert far.view[: PACKET_BYTES + 1] == b"\1" * PACKET_BYTES + b"\0"


def test_held_work_can_be_flushed_and_closed(fake: FakeVerbs, pair: tuple[End, End]) -> None:
    near, far = pair
    fake.hold()
    near.post(write(near, far.far, 0, 1, signalled=False), write(near, far.far, 0, 1))
    near.queue.flush()
    assert statuses(near.take(2)) == [FLUSHED, FLUSHED]
    far.post(write(far, near.far, 0, 1))
    far.rail.close()
    assert fake.waiting() == 0


def test_removed_device_completes_nothing(fake: FakeVerbs, pair: tuple[End, End]) -> None:
    near, far = pair
    fake.hold()
    near.post(write(near, far.far, 0, 1))
    fake.remove("fake0")
    fake.release()
    near.queue.flush()
    for call in (
        lambda: near.post(write(near, far.far, 0, 1)),
        lambda: near.queue.post_receives(1),
        lambda: near.rail.queue_pair(SETUP),
        lambda: near.rail.register(near.address, 1),
    ):
        with pytest.raises(VerbsError, match="fake0:1: the device was removed"):
            call()
    assert near.rail.poll() == []
    assert far.view[0] == 0
    near.close()
    fake.bring_up("fake0")


@pytest.mark.parametrize("changes", [{"psn": 5}, {"number": 0xFFFFFF}])
def test_ends_that_do_not_know_each_other_never_connect(
    fake: FakeVerbs, changes: dict[str, int]
) -> None:
    with contextlib.ExitStack() as stack:
        near, far = (End(fake, rail_setups(fake)[0]) for _ in range(2))
        stack.callback(near.close)
        stack.callback(far.close)
        near.queue.connect(far.queue.address(), TUNING)
        far.queue.connect(near.queue.address()._replace(**changes), TUNING)
        near.post(write(near, far.far, 0, 1))
        assert near.take(1)[0].status == NO_ANSWER


def test_devices_of_different_networks_do_not_reach_each_other(fake: FakeVerbs) -> None:
    with contextlib.ExitStack() as stack:
        near, far = (End(fake, setup) for setup in rail_setups(fake))
        stack.callback(near.close)
        stack.callback(far.close)
        connect(near, far)
        near.post(write(near, far.far, 0, 1))
        assert near.take(1)[0].status == NO_ANSWER


def test_room_comes_back_when_completions_are_polled(pair: tuple[End, End]) -> None:
    near, far = pair
    one = write(near, far.far, 0, 1)
    near.post(*[one._replace(signalled=False)] * 299, one)
    with pytest.raises(VerbsError, match="301 under way: at most 300"):
        near.post(one)
    near.take(1)
    near.post(*[one] * 300)
    near.take(300)


def test_completions_that_nobody_has_room_for_are_an_error(fake: FakeVerbs) -> None:
    setup = rail_setups(fake)[0]._replace(completions_max=4)
    with connected(fake, setup) as (near, far):
        near.post(*[write(near, far.far, 0, 1)] * 5)
        fake.wait(lambda: fake.waiting() == 0, "five completions")
        with pytest.raises(VerbsError, match="more than 4 completions"):
            near.rail.poll()


def test_jitter_changes_no_order(fake: FakeVerbs, pair: tuple[End, End], seed: int) -> None:
    near, far = pair
    fake.jitter(seed, 300)
    near.post(*(write(near, far.far, 0, 1, id=number) for number in range(100)))
    assert [done.id for done in near.take(100)] == list(range(100))


@pytest.mark.slow
def test_processes_started_with_it_use_it_and_are_held_too(fake: FakeVerbs, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from kvstore.transport import verbs\n"
        "rail = verbs.system_verbs().open(verbs.RailSetup('fake1', 1, 1))\n"
        "print(sys.argv[1:], rail.gid)\n"
        "rail.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fakeverbs", "program", "--option"],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(fake.directory), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['--option'] ::ffff:10.77.1.1\n", done.stderr
