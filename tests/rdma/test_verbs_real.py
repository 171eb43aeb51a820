"""The system's own verbs keep the contract: on this machine, if it has RDMA devices, and in the
virtual machine of `make test-rdma`, which has."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import Opcode, RailSetup, Verbs, VerbsError
from tests.rdma.verbs_suite import VerbsTests
from tests.support.verbsends import PATIENCE_S, End, connect, rail_setups, work

try:
    _found = rail_setups(PyVerbs())
except VerbsError as error:
    pytest.skip(f"no RDMA here (make test-rdma): {error}", allow_module_level=True)
if not _found:
    pytest.skip("no RDMA device here (make test-rdma)", allow_module_level=True)


class Real(VerbsTests):
    """The contract."""

    @pytest.fixture
    def environment(self) -> dict[str, str]:
        """What a process needs."""
        return {}

    @contextlib.contextmanager
    def take_down(self, verbs: Verbs, setup: RailSetup) -> Iterator[None]:
        if not os.environ.get("RDMA_VM"):
            pytest.skip("would take down a port of this machine")
        (netdev,) = (
            device.ports[0].netdev for device in verbs.devices() if device.name == setup.device
        )
        subprocess.run(["ip", "link", "set", netdev, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "link", "set", netdev, "up"], check=True)

    @contextlib.contextmanager
    def remove(self, verbs: Verbs, setup: RailSetup) -> Iterator[None]:
        if not os.environ.get("RDMA_VM"):
            pytest.skip("would remove a device of this machine")
        (port,) = (device.ports[0] for device in verbs.devices() if device.name == setup.device)
        # It waits until nobody uses the device any more.
        removal = subprocess.Popen(["rdma", "link", "delete", setup.device])
        while any(device.name == setup.device for device in verbs.devices()):
            assert not removal.poll(), "it was refused"
        yield
        assert removal.wait(PATIENCE_S) == 0
        subprocess.run(
            ["rdma", "link", "add", setup.device, "type", "rxe", "netdev", port.netdev], check=True
        )


class TestExtended(Real):
    """Posting by the extended interface."""

    @pytest.fixture
    def verbs(self) -> Verbs:
        """Those of the system."""
        return PyVerbs()


class TestPlain(Real):
    """Posting by the interface that every device has."""

    @pytest.fixture
    def verbs(self) -> Verbs:
        """Those of the system, without what some devices do not have."""
        return PyVerbs(extended=False)


@pytest.mark.parametrize("extended", [True, False])
def test_both_interfaces_send_the_same_immediate(extended: bool) -> None:
    near, far = End(PyVerbs(extended), _found[0]), End(PyVerbs(not extended), _found[0])
    try:
        connect(near, far)
        far.queue.post_receives(1)
        near.post(work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=0x01020304))
        assert far.take(1)[0].immediate == 0x01020304
    finally:
        near.close()
        far.close()
