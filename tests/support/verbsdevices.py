"""Devices for tests of verbs, imitated or the system's, and what tests do to all of one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.rdma_queue import RdmaQueue
from kvstore.transport.verbs import RailSetup, Verbs, VerbsError
from tests.support.fakeverbs import FakeVerbs
from tests.support.verbsends import PATIENCE_S, rail_setups

# A packet has 64 KiB: 16 MiB take a tenth of a second.
PACKET_DELAY_US_MAX = 1000


def real_rails() -> list[RailSetup]:
    """Ports of the system's own verbs. Where there are none, the module that asks is skipped."""
    try:
        found = rail_setups(PyVerbs())
    except VerbsError as error:
        pytest.skip(f"no RDMA here (make test-rdma): {error}", allow_module_level=True)
    if not found:
        pytest.skip("no RDMA device here (make test-rdma)", allow_module_level=True)
    return found


def in_guest() -> bool:
    """Whether devices may be taken down: it is the virtual machine of `make test-rdma`."""
    return bool(os.environ.get("RDMA_VM"))


@contextlib.contextmanager
def port_down(verbs: Verbs, device: str) -> Iterator[None]:
    """The port of a device is down for as long as the block lasts."""
    if isinstance(verbs, FakeVerbs):
        verbs.take_down(device)
        yield
        verbs.bring_up(device)
        return
    if not in_guest():
        pytest.skip("would take down a port of this machine")
    netdev = _netdev(verbs, device)
    subprocess.run(["ip", "link", "set", netdev, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", netdev, "up"], check=True)


@contextlib.contextmanager
def removed(verbs: Verbs, device: str) -> Iterator[None]:
    """A device is gone when the block is entered, and there again when it was left; what uses
    it is closed within the block."""
    if isinstance(verbs, FakeVerbs):
        verbs.remove(device)
        yield
        verbs.bring_up(device)
        return
    if not in_guest():
        pytest.skip("would remove a device of this machine")
    netdev = _netdev(verbs, device)
    # It waits until nobody uses the device any more.
    removal = subprocess.Popen(["rdma", "link", "delete", device])
    while any(one.name == device for one in verbs.devices()):
        assert not removal.poll(), "it was refused"
    try:
        yield
    finally:
        assert removal.wait(PATIENCE_S) == 0
        subprocess.run(["rdma", "link", "add", device, "type", "rxe", "netdev", netdev], check=True)


@contextlib.contextmanager
def indestructible(monkeypatch: pytest.MonkeyPatch, queues: Sequence[RdmaQueue]) -> Iterator[None]:
    """The system neither flushes nor destroys queue pairs for as long as the block lasts."""

    def refuse() -> None:
        raise VerbsError("the system refuses it")

    with monkeypatch.context() as patch:
        for queue in queues:
            patch.setattr(queue.pair, "flush", refuse)
            patch.setattr(queue.pair, "close", refuse)
        yield


def slow_down(verbs: Verbs, slow: bool = True) -> None:
    """Let transfers take a while, so that there is a middle of them. Real ones do anyway, where
    the processor is imitated."""
    if isinstance(verbs, FakeVerbs):
        verbs.jitter(1, PACKET_DELAY_US_MAX if slow else 0)


def queue_pair_count(verbs: Verbs) -> int:
    """Queue pairs that there are on this machine; 0 where nobody counts them."""
    if isinstance(verbs, FakeVerbs):
        return 0
    told = subprocess.run(["rdma", "-j", "resource", "show", "qp"], check=True, capture_output=True)
    return sum(1 for one in json.loads(told.stdout or b"[]") if one.get("type") == "RC")


def _netdev(verbs: Verbs, device: str) -> str:
    (port,) = (one.ports[0] for one in verbs.devices() if one.name == device)
    return port.netdev
