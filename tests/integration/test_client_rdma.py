"""RDMA as users see it, on the imitation of verbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport.verbs import Verbs
from tests.rdma.client_suite import ClientTests
from tests.support.fakeverbs import FakeVerbs


class TestFake(ClientTests):
    """The suite."""

    @pytest.fixture
    def verbs(self, tmp_path: Path) -> Iterator[Verbs]:
        """An own network."""
        made = FakeVerbs(tmp_path)
        yield made
        made.close()
