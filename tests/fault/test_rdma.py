"""RDMA when something breaks, on the imitation of verbs; and what only it can put to the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport.verbs import Verbs
from tests.rdma.fault_suite import ClientFaultTests
from tests.support.fakeverbs import FakeVerbs


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVerbs]:
    """An own network."""
    made = FakeVerbs(tmp_path)
    yield made
    made.close()


class TestFake(ClientFaultTests):
    """The suite."""

    @pytest.fixture
    def verbs(self, fake: FakeVerbs) -> Verbs:
        """An own network."""
        return fake
