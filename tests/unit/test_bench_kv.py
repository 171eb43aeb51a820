"""The engine `kv`, as far as nothing has to be started."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from kvstore.messages import FetchOutcome, PutOutcome, Tier
from kvstore_bench.engines.base import Task
from kvstore_bench.engines.kv import KvEngine, unasked
from kvstore_bench.job import Job
from kvstore_bench.meter import Travelled
from kvstore_client import FetchResult, PutResult, Run

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
    assert unasked(transport, travelled) == ""


def test_bytes_that_came_otherwise_are_an_error() -> None:
    said = unasked("shm", [BY_SHM, BY_UNIX, BY_TCP])
    assert said == "bytes travelled by tcp, unix: transport=shm was asked for"


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
