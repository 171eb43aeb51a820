"""The system's own verbs keep the contract: on this machine, if it has RDMA devices, and in the
virtual machine of `make test-rdma`, which has."""

from __future__ import annotations

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import Opcode, Verbs
from tests.rdma.verbs_suite import VerbsTests
from tests.support.verbsdevices import real_rails
from tests.support.verbsends import End, connect, work

RAILS = real_rails()


class Real(VerbsTests):
    """The contract."""

    @pytest.fixture
    def environment(self) -> dict[str, str]:
        """What a process needs."""
        return {}


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
    near, far = End(PyVerbs(extended), RAILS[0]), End(PyVerbs(not extended), RAILS[0])
    try:
        connect(near, far)
        far.queue.post_receives(1)
        near.post(work(near, far.far, Opcode.WRITE_WITH_IMMEDIATE, 0, 0, immediate=0x01020304))
        assert far.take(1)[0].immediate == 0x01020304
    finally:
        near.close()
        far.close()
