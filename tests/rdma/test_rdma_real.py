"""RDMA keeps its promises on the system's own verbs: where there are devices, and in the virtual
machine of `make test-rdma`."""

from __future__ import annotations

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import Verbs
from tests.rdma.rdma_suite import RdmaTests
from tests.support.verbsdevices import real_rails

real_rails()


class TestReal(RdmaTests):
    """The suite."""

    @pytest.fixture
    def verbs(self) -> Verbs:
        """Those of the system."""
        return PyVerbs()
