"""The engine `kv`, as far as nothing has to be started."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from kvstore.errors import TransportError
from kvstore.messages import FetchOutcome, PutOutcome, Tier
from kvstore_bench.engines import kv as module
from kvstore_bench.engines.base import JobFailed, Task
from kvstore_bench.engines.kv import KvEngine, unasked
from kvstore_bench.job import Job
from kvstore_bench.meter import Travelled
from kvstore_client import FetchResult, PutResult, Run
from kvstore_client.views import Views

BY_TCP = Travelled("relay", "tcp", 4096)
BY_UNIX = Travelled("direct", "unix", 4096)
BY_SHM = Travelled("direct", "shm", 4096)


class Ended:
    """A handle whose result is there."""

    def __init__(self, result: FetchResult | PutResult) -> None:
        self.result = result

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self.result


def run(transport: str, size_bytes: int = 8192) -> Run:
    return Run(
        path="direct",
        transport=transport,
        peer="a",
        block_count=2,
        bytes=size_bytes,
        elapsed_us=1,
    )


def fetched(*runs: Run, outcome: FetchOutcome = FetchOutcome.HIT) -> Any:
    outcomes = [FetchOutcome.HIT, outcome]
    return Ended(
        FetchResult(
            outcomes=outcomes,
            tiers=[Tier.NONE] * 2,
            runs=list(runs),
            run_of_block=[0, 0],
            bytes=8192,
            elapsed_s=0.0,
            errors=[],
        )
    )


def stored(*runs: Run, outcome: PutOutcome = PutOutcome.STORED) -> Any:
    outcomes = [PutOutcome.STORED, outcome]
    return Ended(
        PutResult(
            outcomes=outcomes,
            runs=list(runs),
            run_of_block=[0, 0],
            bytes=8192,
            elapsed_s=0.0,
            errors=[],
        )
    )


def engine(transport: str) -> KvEngine:
    job = Job(name="a", batch=2, bs=4096, size=8192, transport=transport)
    return KvEngine(Task(job=job, endpoints=("unix:///run/x",)))


@pytest.mark.parametrize(
    ("transport", "travelled"),
    [("auto", [BY_TCP, BY_SHM]), ("tcp", [BY_TCP]), ("shm", [BY_SHM, BY_SHM]), ("rdma", [])],
)
def test_bytes_that_came_as_asked_are_no_error(transport: str, travelled: list[Travelled]) -> None:
    assert unasked(Job(name="a", transport=transport), travelled) == ""


def test_bytes_that_came_otherwise_are_an_error() -> None:
    said = unasked(Job(name="a", transport="shm"), [BY_SHM, BY_UNIX, BY_TCP])
    assert said == "bytes travelled by tcp, unix: transport=shm was asked for"


@pytest.mark.parametrize(
    ("required", "said"),
    [
        (("shm", "unix"), ""),
        (("shm",), "bytes travelled by unix: require_transport=shm was asked for"),
        (("tcp", "rdma"), "bytes travelled by shm, unix: require_transport=rdma,tcp was asked for"),
    ],
)
def test_a_fallback_is_an_error_where_it_is_not_among_those_required(
    required: tuple[str, ...], said: str
) -> None:
    assert unasked(Job(name="a", require_transport=required), [BY_SHM, BY_UNIX]) == said


def test_the_layout_of_a_models_blocks_names_it() -> None:
    job = Job(name="a", model="qwen3-8b", bs=16 * 147_456, layers=36, page_tokens=16)
    found = module.layout(job)
    assert (found.model_id, found.dtype, found.block_tokens) == ("qwen3-8b", "bfloat16", 16)
    assert found.layer_bytes == (65_536,) * 36


@pytest.mark.parametrize("layout", ["block", "layer"])
def test_memory_is_given_as_the_layout_says(layout: str) -> None:
    job = Job(name="a", batch=3, bs=64, size=192, layers=2, layout=layout, iodepth=2)
    one = KvEngine(Task(job=job, endpoints=("unix:///run/x",)))
    region = memoryview(bytearray(range(192)) * 2)
    one._lay_out(region)
    region[:192] = bytes(range(192))
    if layout == "block":
        assert one._memory(0, 2) == region[:128]
        return
    first, second = one._memory(0, 2)  # type: ignore[misc]
    assert [bytes(piece) for piece in first] == [bytes(range(32)), bytes(range(96, 128))]
    assert [bytes(piece) for piece in second] == [bytes(range(32, 64)), bytes(range(128, 160))]


@pytest.mark.asyncio
@pytest.mark.parametrize("outcome", [FetchOutcome.HIT, FetchOutcome.MISS])
async def test_a_read_that_came_otherwise_ends_the_job(outcome: FetchOutcome) -> None:
    done = await engine("shm")._fetched(fetched(run("shm"), run("unix"), outcome=outcome))
    assert done.error == "bytes travelled by unix: transport=shm was asked for"
    assert done.travelled == [("direct", "shm", 8192), ("direct", "unix", 8192)]


@pytest.mark.asyncio
@pytest.mark.parametrize("outcome", [PutOutcome.STORED, PutOutcome.FULL])
async def test_a_write_that_went_otherwise_ends_the_job(outcome: PutOutcome) -> None:
    done = await engine("unix")._put(stored(run("tcp"), outcome=outcome))
    assert done.error == "bytes travelled by tcp: transport=unix was asked for"


@pytest.mark.asyncio
async def test_a_peer_that_brought_nothing_does_not_count() -> None:
    done = await engine("shm")._fetched(fetched(run("unix", 0), run("shm")))
    assert (done.error, done.travelled) == ("", [("direct", "shm", 8192)])


@pytest.mark.asyncio
async def test_what_went_wrong_is_told_before_how_it_travelled() -> None:
    lost = fetched(run("unix"), outcome=FetchOutcome.UNAVAILABLE)
    done = await engine("shm")._fetched(lost)
    assert done.error == "read: 1 of 2 blocks UNAVAILABLE: no reason was given"


class Starting:
    """A client whose daemon answers at the last of some questions."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    async def status(self) -> dict[str, Any]:
        self.left -= 1
        return {"tcp://h:1": None if self.left <= 0 else TransportError("not connected yet")}


@pytest.mark.asyncio
async def test_a_daemon_of_ours_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_INTERVAL_S", 0)
    one = KvEngine(Task(job=Job(name="a"), endpoints=("tcp://h:1",), server_pids=(1,)))
    one._client = client = Starting(3)  # type: ignore[assignment]
    await one._reach()
    assert client.left == 0
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0)
    client.left = 3
    with pytest.raises(JobFailed, match="tcp://h:1: not connected yet"):
        await one._reach()


@pytest.mark.asyncio
async def test_a_daemon_that_was_given_is_asked_once() -> None:
    one = KvEngine(Task(job=Job(name="a"), endpoints=("tcp://h:1",)))
    one._client = client = Starting(2)  # type: ignore[assignment]
    with pytest.raises(JobFailed, match="not connected yet"):
        await one._reach()
    assert client.left == 1


class Viewed:
    """A client whose views are those of a script."""

    def __init__(self, views: Views, holds: bool) -> None:
        self.views = views
        self.holds = holds

    async def view(self, *args: object, verify: bool) -> Viewed:
        assert not verify
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.views, name)

    async def release(self) -> bool:
        return self.holds


def viewing(outcomes: list[FetchOutcome], holds: bool) -> KvEngine:
    views = Views(len(outcomes))
    views.outcomes = outcomes
    views.verify_us = 7
    job = Job(name="a", path="views", bs=8, batch=2, verify_checksums=False)
    one = KvEngine(Task(job=job, endpoints=("unix:///x",)))
    one._client = Viewed(views, holds)  # type: ignore[assignment]
    one._namespace = None  # type: ignore[assignment]
    return one


@pytest.mark.asyncio
async def test_views_that_held_are_read() -> None:
    one = viewing([FetchOutcome.HIT, FetchOutcome.MISS], holds=True)
    done = await one._viewed(0, [b"a", b"b"])
    assert (done.good, done.outcomes, done.error) == ([True, False], ["hit", "miss"], "")
    assert (done.travelled, done.verify_us) == ([("views", "shm", 8)], 7)


@pytest.mark.asyncio
async def test_views_whose_lease_was_lost_were_not_read() -> None:
    done = await viewing([FetchOutcome.HIT] * 2, holds=False)._viewed(0, [b"a", b"b"])
    assert (done.good, done.outcomes, done.error) == ([False] * 2, ["lost"] * 2, "")


@pytest.mark.asyncio
async def test_views_of_a_daemon_that_is_gone_end_the_job() -> None:
    outcomes = [FetchOutcome.UNAVAILABLE] * 2
    done = await viewing(outcomes, holds=True)._viewed(0, [b"a", b"b"])
    assert done.error == "view: 2 of 2 blocks UNAVAILABLE: no reason was given"
