"""When I/Os are due, and who gets which turn."""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np
import pytest

from kvstore_bench.job import Job
from kvstore_bench.pacing import Pacer, Timer, arrivals

SECOND = 1_000_000_000


def take(count: int, clone: int = 0, **options: object) -> list[int]:
    job = Job(name="job", **options)  # type: ignore[arg-type]
    return list(itertools.islice(arrivals(job, clone), count))


def test_linear_ios_are_due_at_even_distances() -> None:
    assert take(4, rate_iops=3) == [0, 333_333_333, 666_666_667, SECOND]


def test_nothing_adds_up_over_a_day() -> None:
    job = Job(name="job", rate_iops=7)
    assert next(itertools.islice(arrivals(job, 0), 7 * 86400, None)) == 86400 * SECOND


def test_poisson_ios_are_independent_of_each_other() -> None:
    times = take(20_000, rate_iops=1000, rate_process="poisson")
    gaps = np.diff([0, *times]) / 1e9
    assert np.mean(gaps) == pytest.approx(1e-3, rel=0.03)
    # Of an exponential distribution: the deviation is the mean, and e^-1 are longer than it.
    assert np.std(gaps) == pytest.approx(1e-3, rel=0.05)
    assert np.mean(gaps > 1e-3) == pytest.approx(np.exp(-1), abs=0.02)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_poisson_times_are_those_of_the_seed_and_the_clone() -> None:
    options = {"rate_iops": 10, "rate_process": "poisson"}
    assert take(5, **options) == take(5, **options)
    assert take(5, clone=1, **options) != take(5, **options)
    assert take(5, randseed=2, **options) != take(5, **options)


def pacer(start_ns: int, end_ns: int = 0, rate_iops: int = 1000) -> Pacer:
    return Pacer(Job(name="job", rate_iops=rate_iops), 0, start_ns, end_ns)


@pytest.mark.asyncio
async def test_turns_that_are_due_come_at_once_and_in_order() -> None:
    start = time.monotonic_ns() - SECOND
    one = pacer(start)
    assert [await one.turn() for _ in range(3)] == [start, start + 10**6, start + 2 * 10**6]
    one.close()


@pytest.mark.asyncio
async def test_no_turn_comes_before_it_is_due() -> None:
    start = time.monotonic_ns()
    one = pacer(start)
    turns = []
    for _ in range(3):
        due = await one.turn()
        assert due is not None
        assert time.monotonic_ns() >= due
        turns.append(due)
    assert turns == [start, start + 10**6, start + 2 * 10**6]
    one.close()


@pytest.mark.asyncio
async def test_there_is_no_turn_at_the_end_or_later() -> None:
    start = time.monotonic_ns() - SECOND
    one = pacer(start, start + 2 * 10**6)
    assert await one.turn() == start
    assert one.behind_ns == 10**6
    assert await one.turn() == start + 10**6
    assert await one.turn() is None
    assert one.behind_ns == 0
    one.close()


@pytest.mark.asyncio
async def test_closing_lets_those_go_that_wait() -> None:
    one = pacer(time.monotonic_ns() + 3600 * SECOND)
    waiting = [asyncio.create_task(one.turn()) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    one.close()
    one.close()
    assert await asyncio.gather(*waiting) == [None] * 3
    assert await one.turn() is None
    assert one.behind_ns == 0


@pytest.mark.asyncio
async def test_a_timer_wakes_in_the_order_of_times_whoever_came_first() -> None:
    timer = Timer()
    woken: list[int] = []

    async def wait(number: int, at_ns: int) -> None:
        await timer.until(at_ns)
        woken.append(number)

    now = time.monotonic_ns()
    await asyncio.gather(wait(2, now + 2 * 10**6), wait(1, now + 10**6), wait(0, now - 1))
    assert woken == [0, 1, 2]
    timer.close()


@pytest.mark.asyncio
async def test_a_waiter_that_was_cancelled_wakes_nobody() -> None:
    timer = Timer()
    soon = time.monotonic_ns() + 10**6
    cancelled = asyncio.create_task(timer.until(soon))
    other = asyncio.create_task(timer.until(soon))
    await asyncio.sleep(0)
    cancelled.cancel()
    await other
    assert cancelled.cancelled()
    timer.close()
