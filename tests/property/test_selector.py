"""The selector under reports that nobody would send: what must hold whatever they say."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from kvstore.loadreport import LinkLoad, LoadReport, NodeState, ReportTable, RequesterLoad
from kvstore_client.selector import DRAWS, Inflight, Plan, Policy, Request, Selector, Span
from kvstore_client.selector.choice import EXPLORE_EVERY
from kvstore_client.selector.gain import GainMeter
from kvstore_client.selector.inflight import STALLED_S_MIN
from kvstore_client.selector.waterfill import BAND, SHARE_TIME_CONSTANT_S

MIB = 1024 * 1024
OWN = "p0"
RELAYS = ["d0", "d1", "d2", "d3"]
DAEMONS = ["s0", "s1", "s2"]

sizes = st.one_of(st.integers(0, 1 << 24), st.integers(0, 1 << 62))


class Step(NamedTuple):
    """One thing that happens, and then a request."""

    wait_s: float
    reports: list[LoadReport]
    up: list[bool]
    shares: list[float]
    sent: dict[str, int]
    arrived: float
    request: Request
    draws: tuple[float, ...]


@st.composite
def reports(draw: st.DrawFn) -> LoadReport:
    """Anything that a report can say, numbered in any order, of old boots and new ones."""
    return LoadReport(
        node_id=draw(st.sampled_from([*DAEMONS, *RELAYS])),
        boot_id=draw(st.sampled_from([b"a" * 8, b"b" * 8])),
        seq=draw(st.one_of(st.integers(0, 9), st.integers(0, 1 << 62))),
        interval_ms=draw(st.integers(0, 1 << 31)),
        state=draw(st.sampled_from(NodeState)),
        links=tuple(
            LinkLoad(name=name, capacity_Bps=capacity, queued_bytes=queued)
            for name, capacity, queued in draw(
                st.lists(
                    st.tuples(st.sampled_from(["storage", "tcp://x:1", "unix:///x"]), sizes, sizes),
                    max_size=3,
                )
            )
        ),
        requesters=tuple(
            RequesterLoad(node_id=name, queued_bytes=queued)
            for name, queued in draw(
                st.lists(st.tuples(st.sampled_from([OWN, *RELAYS, "other"]), sizes), max_size=4)
            )
        ),
        relay_queued_bytes=draw(sizes),
        willing=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    spans = []
    first = 0
    for length in draw(st.lists(st.integers(1, 64), max_size=8)):
        spans.append(Span(first, first + length, draw(st.integers(0, len(DAEMONS) - 1))))
        first += length
    names = ["", "nobody", *RELAYS]
    return Request(spans, draw(st.integers(1, 4 * MIB)), draw(st.sampled_from(names)))


fractions = st.floats(0, 1, exclude_max=True)
steps = st.builds(
    Step,
    wait_s=st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 100)),
    reports=st.lists(reports(), max_size=4),
    up=st.lists(st.booleans(), min_size=len(DAEMONS), max_size=len(DAEMONS)),
    shares=st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=len(RELAYS), max_size=len(RELAYS)),
    sent=st.dictionaries(st.sampled_from(["", *RELAYS]), st.integers(1, 1 << 33)),
    arrived=fractions,
    request=requests(),
    draws=st.tuples(*[fractions] * DRAWS),
)


class World:
    """A client, moved along by steps."""

    def __init__(self, policy: Policy) -> None:
        self.now = 0.0
        self.inflight = Inflight(OWN, DAEMONS, RELAYS)
        self.reports = ReportTable()
        self.selector = Selector(policy)

    def take(self, step: Step) -> Plan:
        self.now += step.wait_s
        for report in step.reports:
            self.reports.accept(self.now, report)
        for daemon, up in zip(self.inflight.daemons, step.up, strict=True):
            daemon.up = up
        for meter, share in zip(self.inflight.ring, step.shares, strict=True):
            meter.share = share
        for meter in (self.inflight.direct, *self.inflight.ring):
            meter.arrived(self.now, int(meter.inflight_bytes * step.arrived))
            meter.sent(self.now, step.sent.get(meter.node_id, 0))
        return self.selector.plan(
            step.request, self.reports, self.inflight, self.now, list(step.draws)
        )


def usable(world: World, relay: str) -> bool:
    """The least that must be true of a relay that gets blocks."""
    meter = world.inflight.relays[relay]
    report = world.reports.report(relay)
    said_no = report is not None and not (
        report.willing and report.state in (NodeState.READY, NodeState.DEGRADED)
    )
    return meter.share > 0 and not meter.stalled(world.now) and not said_no


@pytest.mark.slow
@pytest.mark.parametrize("policy", Policy)
@given(happenings=st.lists(steps, min_size=1, max_size=5))
def test_every_block_goes_one_way_and_never_one_that_is_down(
    policy: Policy, happenings: list[Step]
) -> None:
    world = World(policy)
    for step in happenings:
        plan = world.take(step)
        owners = {
            block: span.daemon
            for span in step.request.spans
            for block in range(span.first, span.last)
        }
        seen = []
        for first, last, daemon, relay in plan.runs:
            assert first < last
            assert all(owners[block] == daemon for block in range(first, last))
            assert usable(world, relay) if relay else world.inflight.daemons[daemon].up
            seen += range(first, last)
        for first, last, daemon in plan.unreachable:
            assert not world.inflight.daemons[daemon].up
            assert all(owners[block] == daemon for block in range(first, last))
            seen += range(first, last)
        assert sorted(seen) == sorted(owners)
        if plan.unreachable and policy is not Policy.DIRECT:
            assert not any(usable(world, relay) for relay in RELAYS)
        assert plan.estimate_s >= 0
        assert math.isinf(plan.estimate_s) == bool(owners and not plan.runs)
        assert plan.reason


@pytest.mark.slow
@pytest.mark.parametrize("policy", Policy)
@given(happenings=st.lists(steps, min_size=1, max_size=4))
def test_the_same_happenings_make_the_same_plans(policy: Policy, happenings: list[Step]) -> None:
    one, two = World(policy), World(policy)
    for step in happenings:
        plan = one.take(step)
        # A question in between changes nothing.
        two.selector.estimate_s(step.request, two.reports, two.inflight, two.now, step.draws)
        assert two.take(step) == plan


def idle(node_id: str, seq: int, queued_bytes: int = 0, **queues: int) -> LoadReport:
    return LoadReport(
        node_id=node_id,
        boot_id=bytes(8),
        seq=seq,
        interval_ms=200,
        state=NodeState.READY,
        requesters=tuple(RequesterLoad(node_id=n, queued_bytes=q) for n, q in queues.items()),
        relay_queued_bytes=queued_bytes,
        willing=True,
    )


LARGE = Request([Span(0, 512, 0)], MIB // 8, "d0")


class Hopeful(GainMeter):
    """Where nothing arrives, nothing can be compared."""

    __slots__ = ()

    def allowance_s(self, now: float, direct_s: float) -> float:
        return math.inf


def known(relays: list[str]) -> World:
    """A client that knows its links as equal."""
    world = World(Policy.BALANCED)
    world.inflight = Inflight(OWN, ["s0"], relays)
    for meter in (world.inflight.direct, *world.inflight.ring):
        meter.observed_Bps, meter.observed_at = 50e6, math.inf
    world.inflight.gain = Hopeful()
    return world


@pytest.mark.slow
@given(
    queued=sizes,
    lie=sizes,
    own_lie=sizes,
    wait_s=st.floats(0, 0.2),
    draws=st.tuples(*[fractions] * DRAWS),
)
def test_no_report_moves_a_steady_share_further_than_the_band_and_time_allow(
    queued: int, lie: int, own_lie: int, wait_s: float, draws: tuple[float, ...]
) -> None:
    world = known(["d0"])
    plan = Plan([], [], 0.0, "")
    for seq in range(1, 101):
        world.now += 0.02
        world.reports.accept(world.now, idle("s0", seq))
        world.reports.accept(world.now, idle("d0", seq, queued))
        plan = world.selector.plan(
            LARGE, world.reports, world.inflight, world.now, (*draws[:-1], 0.99)
        )
    before = plan.relayed_blocks() / 512
    world.now += wait_s
    world.reports.accept(world.now, idle("s0", 101, p0=own_lie))
    world.reports.accept(world.now, idle("d0", 101, lie))
    after = world.selector.plan(LARGE, world.reports, world.inflight, world.now, draws)
    moved = abs(after.relayed_blocks() / 512 - before)
    assert moved <= BAND + 1 - math.exp(-wait_s / SHARE_TIME_CONSTANT_S) + 2 / 512


@pytest.mark.slow
@given(
    lies=st.dictionaries(st.sampled_from(RELAYS), sizes),
    own_lie=sizes,
    frozen=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_nobody_starves_whatever_reports_say_of_queues(
    lies: dict[str, int], own_lie: int, frozen: bool, seed: int
) -> None:
    world = known(RELAYS)
    random_draws = random.Random(seed)
    carried = dict.fromkeys(["", *RELAYS], 0)
    world.reports.accept(0.0, idle("s0", 0, p0=own_lie))
    for number in range(5 * EXPLORE_EVERY):
        world.now += 0.02
        if not frozen:
            world.reports.accept(world.now, idle("s0", number, p0=own_lie))
        for relay in RELAYS:
            world.reports.accept(world.now, idle(relay, number, lies.get(relay, 0)))
        turn, place = divmod(number, EXPLORE_EVERY)
        draws = [random_draws.random() for _ in range(DRAWS)]
        # The last draw comes by every value, and the relay that is drawn with the lowest too.
        draws[-1] = place / EXPLORE_EVERY
        if place == 0:
            draws[0] = turn % len(RELAYS) / len(RELAYS)
        plan = world.selector.plan(LARGE, world.reports, world.inflight, world.now, draws)
        for run in plan.runs:
            carried[run.relay] += run.last - run.first
    assert all(carried.values()), carried


@given(now=st.floats(0, 1e6), back_s=st.floats(0, 1e6))
def test_a_clock_that_goes_back_breaks_nothing(now: float, back_s: float) -> None:
    world = known(["d0"])
    world.reports.accept(now, idle("s0", 1))
    world.reports.accept(now, idle("d0", 1))
    for at in (now, now - back_s):
        plan = world.selector.plan(LARGE, world.reports, world.inflight, at, (0.5, 0.5, 0.5))
        assert sum(run.last - run.first for run in plan.runs) == 512


def test_a_path_that_stalls_is_one_that_is_down() -> None:
    world = known(["d0"])
    world.inflight.relays["d0"].sent(0.0, MIB)
    world.now = STALLED_S_MIN
    world.reports.accept(world.now, idle("d0", 1))
    plan = world.selector.plan(LARGE, world.reports, world.inflight, world.now, (0.5, 0.5, 0.5))
    assert not plan.relayed_blocks()
