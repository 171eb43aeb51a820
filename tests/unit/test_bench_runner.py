"""The loop of an engine, the size of an arena, the gate and the progress line."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Sequence

import pytest

from kvstore_bench.engines.base import Completion, OnStep, SlotEngine, Task
from kvstore_bench.engines.null import NullEngine
from kvstore_bench.job import Job
from kvstore_bench.jobservers import AGENT_BYTES_MIN, agent_bytes, arena_bytes, listen_uri
from kvstore_bench.meter import Meter, Travelled, clock_ns
from kvstore_bench.progress import ProgressLine, Quiet
from kvstore_bench.runner import Gate
from kvstore_bench.worker import Progress, Step
from kvstore_bench.workload import Operation, Workload

MIB = 1024 * 1024


class ScriptedEngine(SlotEngine):
    """Answers I/O n with the n-th completion of a script, the last one for ever."""

    def __init__(self, job: Job, script: Sequence[Completion], wrong: int = 0) -> None:
        super().__init__(Task(job=job))
        self.script = list(script)
        self.wrong = wrong
        self.in_flight = 0
        self.in_flight_max = 0

    async def open(self, workload: Workload, on_step: OnStep) -> None: ...

    def prepare(self, slot: int, operation: Operation) -> None: ...

    def submit(self, slot: int, operation: Operation) -> Awaitable[Completion]:
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        return self._answer()

    def check(self, slot: int, operation: Operation, good: Sequence[bool]) -> int:
        return self.wrong

    async def _answer(self) -> Completion:
        await asyncio.sleep(0)
        self.in_flight -= 1
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


def small_job(**options: object) -> Job:
    return Job(name="job", bs=4096, batch=2, size=80 * 1024, **options)  # type: ignore[arg-type]


async def run(engine: SlotEngine) -> Meter:
    meter = Meter(engine.job, (), lambda read, written: None)
    await engine.run(Workload(engine.job, 0), meter)
    return meter


GOOD = Completion([True, True], ["hit", "hit"])
SHORT = Completion([True, False], ["hit", "miss"])
FAILED = Completion([False, False], ["timeout", "timeout"], "read: 2 of 2 blocks TIMEOUT")


@pytest.mark.asyncio
async def test_iodepth_ios_are_in_flight_until_size_is_done() -> None:
    engine = ScriptedEngine(small_job(iodepth=3), [GOOD])
    meter = await run(engine)
    assert (engine.in_flight_max, engine.in_flight) == (3, 0)
    assert (meter.read.ios, meter.read.bytes, meter.read.short_ios) == (10, 80 * 1024, 0)
    assert meter.outcomes == {"hit": 20}


@pytest.mark.asyncio
async def test_blocks_that_are_missing_do_not_count_as_bytes() -> None:
    meter = await run(ScriptedEngine(small_job(), [SHORT, GOOD]))
    assert (meter.read.ios, meter.read.bytes, meter.read.short_ios) == (10, 76 * 1024, 1)
    assert meter.outcomes == {"hit": 19, "miss": 1}
    assert meter.error == ""


@pytest.mark.asyncio
async def test_how_the_bytes_of_ios_travelled_adds_up() -> None:
    runs = [Travelled("relay", "tcp", 4096), Travelled("direct", "shm", 100)]
    first = Completion([True, True], ["hit", "hit"], "", runs)
    then = Completion([True, True], ["hit", "hit"], "", runs[:1])
    totals = (await run(ScriptedEngine(small_job(), [first, then]))).totals()
    assert totals.read.transports == {"tcp": 40960, "shm": 100}
    assert totals.read.paths == {"relay": 40960, "direct": 100}
    assert totals.write.transports == totals.write.paths == {}


@pytest.mark.asyncio
async def test_how_the_bytes_of_the_ramp_travelled_does_not_count() -> None:
    travelled = Completion([True, True], ["hit", "hit"], "", [Travelled("direct", "tcp", 1)])
    ended = Completion([True, True], ["hit", "hit"], "over", [Travelled("direct", "tcp", 1)])
    job = small_job(ramp_time=3600.0, iodepth=1)
    totals = (await run(ScriptedEngine(job, [travelled, ended]))).totals()
    assert totals.read.transports == {}


@pytest.mark.asyncio
async def test_an_error_ends_the_job() -> None:
    meter = await run(ScriptedEngine(small_job(iodepth=1), [GOOD, FAILED, GOOD]))
    assert meter.error == "read: 2 of 2 blocks TIMEOUT"
    assert meter.read.ios == 2


@pytest.mark.asyncio
async def test_wrong_bytes_end_the_job_and_are_counted() -> None:
    meter = await run(ScriptedEngine(small_job(iodepth=1, verify=True), [GOOD], wrong=1))
    assert meter.totals().wrong_blocks == 1
    assert meter.totals().error == "1 blocks of I/O 0 hold wrong bytes"
    assert meter.read.ios == 1


@pytest.mark.asyncio
async def test_the_first_layers_come_after_an_io_was_due() -> None:
    now = clock_ns() + 10**12
    script = [Completion([True] * 2, ["hit"] * 2, first_ns=now), GOOD]
    first = (await run(ScriptedEngine(small_job(iodepth=1), script))).totals().read.first
    assert first is not None
    assert first.count == 1
    assert 0 < 10**12 - first.total < 10**12


@pytest.mark.asyncio
async def test_misses_that_must_be_are_not_short() -> None:
    engine = NullEngine(Task(job=small_job(hit_rate=75.0)))
    meter = await run(engine)
    assert meter.outcomes == {"hit": 15, "miss": 5}
    assert (meter.read.bytes, meter.read.short_ios, meter.error) == (60 * 1024, 0, "")


@pytest.mark.asyncio
async def test_a_hit_that_was_never_stored_ends_the_job() -> None:
    meter = await run(ScriptedEngine(small_job(iodepth=1, hit_rate=50.0), [GOOD]))
    assert meter.error == "I/O 0: a block that was never stored"


@pytest.mark.asyncio
async def test_an_io_of_a_rate_waits_from_when_it_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 10**10, 1000))
    monkeypatch.setattr("kvstore_bench.engines.base.clock_ns", lambda: next(clock))
    monkeypatch.setattr("kvstore_bench.meter.clock_ns", lambda: 10**9)
    # All are due within the first millisecond, which by that clock is over.
    monkeypatch.setattr("kvstore_bench.pacing.time.monotonic_ns", lambda: 2 * 10**9)
    meter = await run(ScriptedEngine(small_job(iodepth=1, rate_iops=1_000_000), [GOOD]))
    read = meter.totals().read
    assert read.wait is not None
    assert read.ios == read.wait.count == 10
    assert read.lat.total == read.wait.total + read.slat.total + read.clat.total


@pytest.mark.asyncio
async def test_an_error_does_not_wait_for_the_next_turn() -> None:
    # The second slot has its turn in five seconds, and then no more.
    job = small_job(iodepth=2, rate=1638)
    meter = await run(ScriptedEngine(job, [FAILED]))
    assert meter.error == "read: 2 of 2 blocks TIMEOUT"
    assert meter.read.ios == 1


@pytest.mark.asyncio
async def test_null_says_of_both_kinds_what_a_store_would() -> None:
    meter = await run(NullEngine(Task(job=small_job(rw="rw", iodepth=2))))
    assert meter.read.ios + meter.write.ios == 10
    assert set(meter.outcomes) == {"hit", "stored"}


def test_a_reading_job_gets_an_arena_that_holds_all_of_it() -> None:
    job = Job(name="a", size=64 * MIB, iodepth=1)
    assert 64 * MIB < arena_bytes(job) < 256 * MIB
    assert arena_bytes(Job(name="a", size=64 * MIB, iodepth=1, numjobs=3)) == 3 * arena_bytes(job)


def test_a_writing_job_gets_an_arena_of_size_so_that_it_evicts() -> None:
    assert arena_bytes(Job(name="a", rw="write", size=64 * MIB)) == 64 * MIB


def test_an_agent_gets_memory_for_what_is_under_way_and_no_more() -> None:
    job = Job(name="a", size=512 * MIB, iodepth=2, path="agent")
    assert agent_bytes(job) == 3 * 16 * MIB
    assert agent_bytes(Job(name="a", size=512 * MIB, iodepth=2, numjobs=4)) == 9 * 16 * MIB
    assert agent_bytes(Job(name="a", bs=512, batch=1)) == AGENT_BYTES_MIN


def test_an_agent_that_holds_all_has_as_much_memory_as_the_daemon() -> None:
    job = Job(name="a", size=512 * MIB, path="agent", held=True)
    assert agent_bytes(job) == arena_bytes(job) > 512 * MIB


@pytest.mark.parametrize(
    ("transport", "uri"),
    [
        ("auto", "tcp://127.0.0.1:0"),
        ("tcp", "tcp://127.0.0.1:0"),
        ("rdma", "rdma://127.0.0.1:0"),
        ("unix", "unix:///run/x/kvstored"),
        ("shm", "unix:///run/x/kvstored"),
    ],
)
def test_servers_listen_where_the_transport_is_offered(transport: str, uri: str) -> None:
    assert listen_uri(Job(name="a", transport=transport), "/run/x", "kvstored") == uri


def test_views_are_of_a_daemon_on_a_unix_socket() -> None:
    assert listen_uri(Job(name="a", path="views"), "/run/x", "d") == "unix:///run/x/d"


def test_small_blocks_take_a_page_each() -> None:
    assert arena_bytes(Job(name="a", rw="write", bs=512, size=MIB)) == 8 * MIB


@pytest.mark.asyncio
async def test_the_gate_opens_when_all_are_there_or_have_failed() -> None:
    opened: list[bool] = []
    gate = Gate(3, lambda: opened.append(True))
    waiting = [asyncio.create_task(gate.ready()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not opened
    gate.dropped()
    await asyncio.gather(*waiting)
    assert opened == [True]


def test_the_progress_line_says_how_far_it_is() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream, trials=5)
    job = Job(name="kv", rw="randrw", size=4 * MIB)
    line.group_begins(2, [job])
    line.report(job, 0, Step("store working set", MIB, 4 * MIB))
    line.going()
    line.report(job, 0, Progress(MIB, MIB))
    line.warning("lost the daemon")
    line.group_ends([])
    shown = stream.getvalue().split("\r\x1b[K")
    assert shown[1:3] == ["[2/5] kv: start", "[2/5] kv: store working set 1MiB/4MiB"]
    assert shown[3].startswith("[2/5] Jobs: 1 (f=1): [m(1)][50.0%][r=")
    assert shown[4:] == ["kvbench run: lost the daemon\n", ""]


def test_without_a_terminal_only_warnings_are_shown() -> None:
    stream = io.StringIO()
    quiet = Quiet(stream)
    quiet.group_begins(1, [Job(name="kv")])
    quiet.report(Job(name="kv"), 0, Progress(1, 1))
    quiet.warning("lost the daemon")
    assert stream.getvalue() == "kvbench run: lost the daemon\n"
