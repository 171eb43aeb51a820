"""RDMA as users see it, on the system's own verbs: where there are devices, and in the virtual
machine of `make test-rdma`."""

from __future__ import annotations

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import Verbs, VerbsError
from tests.rdma.client_suite import ClientTests
from tests.rdma.fault_suite import ClientFaultTests
from tests.support.verbsends import rail_setups

try:
    _found = rail_setups(PyVerbs())
except VerbsError as error:
    pytest.skip(f"no RDMA here (make test-rdma): {error}", allow_module_level=True)
if not _found:
    pytest.skip("no RDMA device here (make test-rdma)", allow_module_level=True)


@pytest.fixture
def verbs() -> Verbs:
    """Those of the system."""
    return PyVerbs()


class TestClient(ClientTests):
    """What works."""


class TestFaults(ClientFaultTests):
    """What breaks."""
