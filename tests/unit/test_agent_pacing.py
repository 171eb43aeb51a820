"""Fetches of other nodes at the pace of a budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvstore.messages import FetchOutcome
from kvstore_client.agent.egress import GRANT_BYTES_MIN, EgressBudget
from kvstore_client.agent.pacing import PacedFetch, Pacer
from tests.support.filling import FillBench, Reader

pytestmark = pytest.mark.asyncio

RATE = 1_000_000


class Clock:
    """A loop whose time stands until it is told to go on.

    Attributes:
        calls: What is to be called later: seconds from then, and what.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Clock:
        self.calls.append((self.now + delay_s, call))
        return self

    def cancel(self) -> None:
        self.calls.clear()

    def go_on(self) -> None:
        """Let the next timer fire."""
        at, call = self.calls.pop(0)
        self.now = max(self.now, at)
        call()


def paced(bench: FillBench, pacer: Pacer, *numbers: int) -> tuple[Reader, PacedFetch]:
    reader = bench.fetch(*numbers)
    stream = PacedFetch(reader.stream, pacer)
    stream.on_ready = bench._on_ready
    reader.stream = stream  # type: ignore[assignment]
    return reader, stream


def a_pacer(budget: EgressBudget) -> tuple[Pacer, Clock]:
    clock = Clock()
    return Pacer(clock, budget), clock  # type: ignore[arg-type]


async def test_a_fetch_gives_out_no_more_than_is_granted() -> None:
    bench = FillBench(blocks=256)
    for number in range(100):
        bench.hold(number)
    pacer, clock = a_pacer(EgressBudget(cap_Bps=RATE))
    reader, stream = paced(bench, pacer, *range(100))
    while not stream.finished:
        reader.read()
        given = 100 * bench.block_bytes - stream.queued_bytes
        assert given <= GRANT_BYTES_MIN + RATE * clock.now
        if not stream.finished:
            told = bench.ready_count
            clock.go_on()
            assert bench.ready_count > told
    assert reader.end() == [bench.expected(number) for number in range(100)]
    # All but the first burst had to be waited for.
    assert clock.now >= (100 * bench.block_bytes - 2 * GRANT_BYTES_MIN) / RATE
    bench.check_idle()


async def test_what_is_not_there_yet_costs_no_grant() -> None:
    bench = FillBench()
    budget = EgressBudget(cap_Bps=RATE)
    pacer, _ = a_pacer(budget)
    reader, _ = paced(bench, pacer, 1)
    for _ in range(100):
        assert reader.read() == 0
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert reader.end() == [bench.expected(1)]
    bench.check_idle()


async def test_a_stopped_fetch_waits_for_no_grant() -> None:
    bench = FillBench(blocks=64)
    for number in range(40):
        bench.hold(number)
    pacer, clock = a_pacer(EgressBudget(cap_Bps=RATE))
    reader, stream = paced(bench, pacer, *range(40))
    reader.read()
    assert pacer.waiting_count == 1
    stream.stop(FetchOutcome.UNAVAILABLE)
    assert pacer.waiting_count == 0
    assert not clock.calls
    bench.check_idle()


async def test_the_counter_of_the_interface_makes_it_yield() -> None:
    bench = FillBench(blocks=64)
    for number in range(40):
        bench.hold(number)
    clock = Clock()
    budget = EgressBudget(capacity_Bps=10 * RATE)
    counter = 0
    pacer = Pacer(clock, budget, lambda: counter)  # type: ignore[arg-type]
    reader, stream = paced(bench, pacer, *range(40))
    free_Bps = budget.allowed_Bps
    reader.read(chunks_max=1)
    clock.now, counter = 1.0, 9 * RATE  # the node itself has sent nearly all
    reader.read(chunks_max=1)
    assert budget.allowed_Bps < free_Bps / 4
    stream.stop(FetchOutcome.UNAVAILABLE)
    await asyncio.sleep(0)
    bench.check_idle()
