"""Threads that spin: they use a processor while they are asked to, and end when they are."""

from __future__ import annotations

import threading

import pytest

from kvstore.errors import KVStoreError
from kvstore_bench import spinners as module
from kvstore_bench.spinners import Spinners
from tests.support.orphans import has_ended


def spinning() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("spin-")}


def until_more(spinners: Spinners, used_ns: int) -> None:
    while spinners.cpu_ns() <= used_ns:
        pass


@pytest.mark.asyncio
async def test_threads_spin_until_they_are_stopped() -> None:
    spinners = Spinners(2)
    await spinners.start()
    try:
        assert len(spinning()) == 2
        until_more(spinners, spinners.cpu_ns())
    finally:
        await spinners.stop()
    assert spinning() == set()
    assert spinners.cpu_ns() == 0
    await spinners.stop()


@pytest.mark.asyncio
async def test_none_is_none() -> None:
    for outside in (False, True):
        spinners = Spinners(0, outside)
        await spinners.start()
        assert spinning() == set()
        assert spinners.cpu_ns() == 0
        await spinners.stop()


@pytest.mark.slow
@pytest.mark.asyncio
async def test_outside_they_spin_in_a_process_that_ends_with_them() -> None:
    spinners = Spinners(1, outside=True)
    await spinners.start()
    assert spinners._child is not None
    pid = spinners._child.pid
    try:
        assert spinning() == set()
        until_more(spinners, spinners.cpu_ns())
    finally:
        await spinners.stop()
    assert has_ended(pid)
    assert spinners.cpu_ns() == 0


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is no number of threads ends it before its first word.
    spinners = Spinners("many", outside=True)  # type: ignore[arg-type]
    with pytest.raises(KVStoreError, match="spin ended with status 1:"):
        await spinners.start()
    assert spinners.cpu_ns() == 0
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0)
    with pytest.raises(KVStoreError, match="does not start"):
        await Spinners(1, outside=True).start()
