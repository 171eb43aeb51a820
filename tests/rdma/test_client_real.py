"""RDMA as users see it, on the system's own verbs: where there are devices, and in the virtual
machine of `make test-rdma`."""

from __future__ import annotations

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import Verbs
from tests.rdma.client_suite import ClientTests
from tests.rdma.fault_suite import ClientFaultTests
from tests.support.verbsdevices import real_rails

real_rails()


@pytest.fixture
def verbs() -> Verbs:
    """Those of the system."""
    return PyVerbs()


class TestClient(ClientTests):
    """What works."""


class TestFaults(ClientFaultTests):
    """What breaks."""
