"""Threads beside the loop: everything that they are given is done, and told on the loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from kvstore.copier import THREADS_MAX, Copier, thread_count
from kvstore.protocol.strands import Strand, Strands
from tests.support.cluster import until


def threads() -> list[str]:
    """Those of copiers."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("copy-")]


@pytest_asyncio.fixture
async def copier() -> AsyncIterator[Copier]:
    """With two threads; none is left in the end."""
    copier = Copier(asyncio.get_running_loop(), 2)
    yield copier
    copier.close()
    copier.close()
    assert threads() == []


@pytest.mark.asyncio
async def test_no_thread_before_there_is_work(copier: Copier) -> None:
    assert threads() == []
    copier.submit(int)
    assert threads() == ["copy-0"]
    for _ in range(5):
        copier.submit(int)
    assert threads() == ["copy-0", "copy-1"]


@pytest.mark.asyncio
async def test_work_is_done_elsewhere_and_told_here(copier: Copier) -> None:
    here = threading.get_ident()
    strand, told = Strand(Strands(copier)), list[tuple[int, int]]()
    for _ in range(1000):
        strand.add(threading.get_ident, lambda result: told.append((result, threading.get_ident())))
    await until(lambda: len(told) == 1000)
    assert {there for there, _ in told}.isdisjoint({here})
    assert {where for _, where in told} == {here}


@pytest.mark.asyncio
async def test_order_holds_with_many_strands_and_threads(copier: Copier) -> None:
    told: list[list[int]] = [[] for _ in range(20)]
    strands = Strands(copier)
    running = [Strand(strands) for _ in told]
    for number in range(200):
        for strand, heard in zip(running, told, strict=True):
            strand.add(partial(int, number), heard.append)
        if number % 50 == 0:
            await asyncio.sleep(0)
    await until(lambda: not strands.count)
    assert told == [list(range(200))] * 20


@pytest.mark.asyncio
async def test_close_ends_what_was_begun_and_tells_of_everything(copier: Copier) -> None:
    begun, go, told = threading.Event(), threading.Event(), list[object]()
    strands = Strands(copier)

    def held() -> str:
        begun.set()
        go.wait()
        return "held"

    Strand(strands).add(held, told.append)
    others = Strand(strands)
    for number in range(2000):  # deeper than calls may be nested
        others.add(partial(int, number), told.append)
    begun.wait()
    assert told == []
    go.set()
    copier.close()
    assert sorted(told, key=str) == sorted(["held", *range(2000)], key=str)
    assert strands.count == 0


@pytest.mark.asyncio
async def test_work_after_the_end_is_done_at_once(copier: Copier) -> None:
    copier.submit(int)
    copier.close()
    strand, told = Strand(Strands(copier)), list[object]()
    for number in range(2000):
        strand.add(partial(int, number), told.append)
    await until(lambda: len(told) == 2000)
    assert told == list(range(2000))
    assert threads() == []


@pytest.mark.asyncio
async def test_work_is_done_where_the_system_has_no_thread_left(
    copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        strand, told = Strand(Strands(copier)), list[object]()
        for number in range(2000):
            strand.add(partial(int, number), told.append)
        await until(lambda: len(told) == 2000)
        assert told == list(range(2000))
    copier.submit(int)
    assert threads() == ["copy-0"], "there may be one later"


@pytest.mark.asyncio
async def test_failure_of_a_call_is_logged_and_others_are_made(
    copier: Copier, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    copier.post(lambda: told.append(1 // 0))
    copier.post(lambda: told.append(1))
    await until(lambda: bool(told))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert told == [1]


@pytest.mark.asyncio
async def test_threads_leave_cores_to_others() -> None:
    assert 1 <= thread_count() <= THREADS_MAX


def test_post_to_a_loop_that_is_closed_waits_for_close() -> None:
    loop = asyncio.new_event_loop()
    copier = Copier(loop, 1)
    told: list[object] = []
    Strand(Strands(copier)).add(int, told.append)
    loop.close()
    copier.close()
    assert told == [0]
