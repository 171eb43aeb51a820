"""The life of a process that serves: what a signal does, and a second one."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import TransportError
from kvstore.service.lifetime import SIGNALS, serve, try_addresses


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """`serve` is the last that a process does: it blocks signals and freezes what there is."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    gc.unfreeze()


class FakeService:
    """Notes what is done to it, and sends a signal to this process when it is time for one."""

    endpoints = (parse_endpoint("tcp://127.0.0.1:1"), parse_endpoint("unix:///s"))
    busy_count = 3

    def __init__(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.number = number
        self.calls: list[str] = []
        self.hangs = False
        self.failure: Exception | None = None

    def signal_soon(self) -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), self.number)

    async def start(self) -> None:
        self.calls.append("start")
        if self.failure is not None:
            raise self.failure
        self.signal_soon()

    async def stop(self, drain_s: float) -> None:
        self.calls.append(f"stop({drain_s:g})")
        if self.hangs and drain_s:
            self.signal_soon()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.calls.append("cancelled")
                raise


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log, without what asyncio says of a slow machine."""
    return [record.getMessage() for record in caplog.records if record.name != "asyncio"]


@pytest.mark.asyncio
@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_stops_it(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service = FakeService(number)
    await serve(service, "node n, arena of 1GiB", 5.0)
    assert service.calls == ["start", "stop(5)"]
    version, *lines = said(caplog)
    assert version.endswith("node n, arena of 1GiB")
    assert lines == [
        "listening on tcp://127.0.0.1:1",
        "listening on unix:///s",
        f"{number.name}: 3 requests are under way and have 5 s; a second signal stops at once",
        "stopped",
    ]
    assert set(SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.asyncio
async def test_a_second_signal_stops_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service = FakeService()
    service.hangs = True
    await serve(service, "node n", 3600.0)
    assert service.calls == ["start", "stop(3600)", "cancelled", "stop(0)"]
    assert said(caplog)[-2:] == ["second signal", "stopped"]


@pytest.mark.asyncio
async def test_what_keeps_it_from_starting_is_told() -> None:
    service = FakeService()
    service.failure = TransportError("taken")
    with pytest.raises(TransportError, match="taken"):
        await serve(service, "node n", 5.0)
    assert service.calls == ["start"]


def test_an_address_that_is_taken_is_told(tmp_path: Path) -> None:
    free = Endpoint("unix", path=str(tmp_path / "s"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TransportError, match="Address already in use"):
            try_addresses([free, Endpoint("tcp", "127.0.0.1", taken.getsockname()[1])])
    # Nothing stays bound.
    assert not list(tmp_path.iterdir())
    try_addresses([free, free])
