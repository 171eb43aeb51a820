"""The contract of verbs where there are several rails, and what its whole suite stands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvstore.transport.verbs import NoDevice, RailSetup, Verbs
from tests.support.verbsdevices import port_down, removed
from tests.support.verbsends import End, connected, rail_setups, write

SUCCESS, FLUSHED, NO_ACCESS, NO_ANSWER = 0, 5, 10, 12


def fill(end: End, value: int) -> None:
    """Give all of an end's memory one value."""
    end.view[:] = bytes([value]) * len(end.view)


class RailTests:
    """See the module."""

    @pytest.fixture
    def setups(self, verbs: Verbs) -> list[RailSetup]:
        """Ports that can be used."""
        found = rail_setups(verbs)
        assert found, verbs.devices()
        return found

    @pytest.fixture
    def setup(self, setups: list[RailSetup]) -> RailSetup:
        """A port that can be used."""
        return setups[0]

    @pytest.fixture
    def pair(self, verbs: Verbs, setup: RailSetup) -> Iterator[tuple[End, End]]:
        """Two connected ends, whose memories differ in every byte."""
        with connected(verbs, setup) as (near, far):
            fill(near, 1)
            fill(far, 2)
            yield near, far

    def test_rails_are_independent(self, verbs: Verbs, setups: list[RailSetup]) -> None:
        if len(setups) < 2:
            pytest.skip("one device only")
        with contextlib.ExitStack() as stack:
            pairs = [stack.enter_context(connected(verbs, setup)) for setup in setups[:2]]
            assert pairs[0][0].rail.gid != pairs[1][0].rail.gid
            for near, far in pairs:
                fill(near, 1)
                near.post(write(near, far.far, 0, 1000))
            for near, far in pairs:
                assert near.take(1)[0].queue == near.queue.number
                assert far.view[:1000] == b"\1" * 1000
            # Memory of one is not known to the other.
            (near, far), (_, other) = pairs
            near.post(write(near, other.far, 0, 1000, rkey=other.region.rkey ^ 0xFF00))
            assert near.take(1)[0].status == NO_ACCESS
            assert pairs[1][0].rail.failed() == ""

    @pytest.mark.slow
    def test_port_that_goes_down_says_so_and_the_other_one_works(
        self, verbs: Verbs, setups: list[RailSetup]
    ) -> None:
        if len(setups) < 2:
            pytest.skip("one device only")
        with (
            connected(verbs, setups[0]) as (near, far),
            connected(verbs, setups[1]) as (lost, beyond),
        ):
            with port_down(verbs, setups[1].device):
                assert setups[1].device in lost.rail.failed()
                assert "port" in lost.rail.failed()
                assert near.rail.failed() == ""
                lost.post(write(lost, beyond.far, 0, 1000))
                assert lost.take(1)[0].status != SUCCESS
                near.post(write(near, far.far, 0, 1000))
                assert near.take(1)[0].status == SUCCESS
                ports = {device.name: device.ports[0] for device in verbs.devices()}
                assert not ports[setups[1].device].active
            lost.rail.close()
            beyond.rail.close()
        with connected(verbs, setups[1]) as (near, far):
            assert near.rail.failed() == ""
            near.post(write(near, far.far, 0, 1000))
            assert near.take(1)[0].status == SUCCESS

    @pytest.mark.slow
    def test_device_that_was_removed_says_so_and_can_be_closed(
        self, verbs: Verbs, setups: list[RailSetup]
    ) -> None:
        if len(setups) < 2:
            pytest.skip("one device only")
        with (
            connected(verbs, setups[0]) as (near, far),
            connected(verbs, setups[1]) as (lost, beyond),
            removed(verbs, setups[1].device),
        ):
            assert "the device was removed" in lost.rail.failed()
            assert near.rail.failed() == ""
            assert setups[1].device not in {device.name for device in verbs.devices()}
            with pytest.raises(NoDevice, match=setups[1].device):
                verbs.open(setups[1])
            lost.queue.flush()
            for end in (lost, beyond):
                end.region.close()
                end.queue.close()
                end.rail.close()
            near.post(write(near, far.far, 0, 1000))
            assert near.take(1)[0].status == SUCCESS
        (again,) = (setup for setup in rail_setups(verbs) if setup.device == setups[1].device)
        with connected(verbs, again) as (near, far):
            assert near.rail.failed() == ""
            near.post(write(near, far.far, 0, 1000))
            assert near.take(1)[0].status == SUCCESS
