"""RDMA as users see it, on the imitation of verbs."""

from __future__ import annotations

import pytest

from kvstore.transport.verbs import Verbs
from tests.rdma.client_suite import ClientTests
from tests.support.fakeverbs import FakeVerbs


class TestFake(ClientTests):
    """The suite."""

    @pytest.fixture
    def verbs(self, fake: FakeVerbs) -> Verbs:
        """Imitated."""
        return fake
