"""What an agent reports of the link that blocks come by from storage."""

from __future__ import annotations

import pytest

from kvstore.loadreport import LinkLoad
from kvstore_client.agent.storagelink import StorageLink, StorageMeter
from kvstore_client.selector import STORAGE_LINK
from kvstore_client.selector.gain import GainMeter

STEP_S = 0.05


class Link:
    """A link under a test, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meter = StorageMeter(GainMeter())
        self.link = StorageLink(self.meter, self.now)

    def carry(self, size_bytes: int) -> LinkLoad:
        """What was asked for comes within a step; its sample."""
        self.now += STEP_S
        if size_bytes:
            self.meter.arrived(self.now, size_bytes)
        return self.link.sample(self.now)


@pytest.fixture(name="link")
def _link() -> Link:
    return Link()


def test_the_queue_is_what_was_asked_for_and_is_not_here(link: Link) -> None:
    link.meter.sent(link.now, 1000)
    load = link.carry(400)
    assert (load.name, load.queued_bytes) == (STORAGE_LINK, 600)
    link.meter.gone(link.now, 600)
    assert link.carry(0).queued_bytes == 0


def test_a_link_that_was_never_busy_has_no_capacity(link: Link) -> None:
    for _ in range(40):
        link.meter.sent(link.now, 1_000_000)
        load = link.carry(1_000_000)
    assert load.sent_Bps == pytest.approx(20e6, rel=0.2)
    assert load.capacity_Bps == 0


def test_capacity_is_the_rate_while_blocks_are_awaited(link: Link) -> None:
    link.meter.sent(link.now, 10_000_000)
    for _ in range(8):
        load = link.carry(1_000_000)
    assert load.capacity_Bps == pytest.approx(20e6, rel=0.01)


def test_no_capacity_is_below_the_rate_that_is_seen(link: Link) -> None:
    link.meter.sent(link.now, 1_000_000)
    for _ in range(10):
        load = link.carry(100_000)
    assert load.capacity_Bps == pytest.approx(2e6, rel=0.01)
    for _ in range(80):
        # All of it has come whenever somebody looks: no window of being busy.
        link.meter.sent(link.now, 5_000_000)
        load = link.carry(5_000_000)
    assert load.sent_Bps == pytest.approx(100e6, rel=0.1)
    assert load.capacity_Bps == load.sent_Bps
