"""What the selector is made of: water-filling, bounded shares, meters, the comparison of arms."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvstore.loadreport import LoadReport, NodeState, ReportTable, RequesterLoad
from kvstore_client.selector.estimates import ReadQueues
from kvstore_client.selector.gain import (
    DIRECT_TRIAL_S,
    EVIDENCE_S_MAX,
    PROBE_S,
    TRIAL_INTERVAL_S_MAX,
    TRIAL_INTERVAL_S_MIN,
    TRIAL_REQUESTS_MIN,
    TRIAL_S_MAX,
    Evidence,
    GainMeter,
)
from kvstore_client.selector.inflight import (
    MEMORY_S,
    PEAK_S,
    STALLED_S_MIN,
    WINDOW_BYTES_MAX,
    WINDOW_S_MAX,
    Daemon,
    Inflight,
    PathMeter,
)
from kvstore_client.selector.policies import apportion
from kvstore_client.selector.waterfill import (
    BAND,
    FIRST_SHARE_MAX,
    SHARE_MEMORY_S,
    SHARE_TIME_CONSTANT_S,
    Shares,
    fill,
)

MIB = 1024 * 1024

paths = st.lists(st.tuples(st.floats(0, 10), st.floats(1, 1e10)), min_size=1, max_size=8)


# --- water-filling -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "rates", "size", "level"),
    [
        ([0.0], [10.0], 100, 10.0),
        ([0.0, 0.0], [10.0, 10.0], 100, 5.0),
        ([0.0, 4.0], [10.0, 10.0], 100, 7.0),
        ([4.0, 0.0], [10.0, 10.0], 100, 7.0),
        ([0.0, 12.0], [10.0, 10.0], 100, 10.0),
        ([0.0, 10.0], [10.0, 10.0], 100, 10.0),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 6, 20 / 6),
    ],
)
def test_levels(starts: list[float], rates: list[float], size: float, level: float) -> None:
    assert fill(starts, rates, size) == pytest.approx(level)


@given(paths, st.floats(1, 1e12))
def test_what_is_poured_in_is_what_lies_below_the_surface(
    vessels: list[tuple[float, float]], size: float
) -> None:
    starts, rates = [v[0] for v in vessels], [v[1] for v in vessels]
    level = fill(starts, rates, size)
    area = sum(max(0.0, level - start) * rate for start, rate in vessels)
    # Floats of the level leave some bytes on a path of 10 GB/s.
    assert area == pytest.approx(size, rel=1e-6, abs=1e-4 * sum(rates) / 1e6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 5000))
def test_blocks_are_apportioned_exactly(parts: list[float], count: int) -> None:
    parts = [*parts, 0.1]
    counts = apportion(parts, count)
    assert sum(counts) == count
    for part, got in zip(parts, counts, strict=True):
        assert abs(got - part / sum(parts) * count) < 1


# --- shares --------------------------------------------------------------------------------


def test_a_relay_of_which_nothing_is_known_gets_half_at_most() -> None:
    shares = Shares()
    assert shares.bound(0.0, ["a"], [0.9], True) == [FIRST_SHARE_MAX]
    assert shares.bound(SHARE_MEMORY_S, ["a"], [0.9], True) == [FIRST_SHARE_MAX]


def test_a_steady_share_moves_by_a_band_and_what_time_allows() -> None:
    shares = Shares()
    for step in range(100):
        shares.bound(step / 100, ["a"], [0.4], True)
    moved = 1 - math.exp(-0.02 / SHARE_TIME_CONSTANT_S)
    (up,) = shares.bound(1.01, ["a"], [1.0], False)
    (down,) = shares.bound(1.01, ["a"], [0.0], False)
    assert up == pytest.approx(0.4 + BAND + 0.6 * moved)
    assert down == pytest.approx(0.4 - BAND - 0.4 * moved)


def test_plans_at_one_instant_move_a_share_no_further_than_one() -> None:
    shares = Shares()
    shares.bound(0.0, ["a"], [0.0], True)
    parts = [shares.bound(0.0, ["a"], [1.0], True)[0] for _ in range(1000)]
    assert set(parts) == {BAND}


def test_a_share_that_comes_and_goes_keeps_its_average() -> None:
    # Bounding against what was given instead would leave the lowest.
    shares, draws = Shares(), random.Random(1)
    given_parts = [
        shares.bound(step / 50, ["a"], [draws.choice([0.0, 0.8])], True)[0] for step in range(2000)
    ]
    assert sum(given_parts) / 2000 == pytest.approx(0.4, abs=0.05)


def test_parts_are_never_more_than_all() -> None:
    shares = Shares()
    for name in ("a", "b", "c"):
        for step in range(50):
            shares.bound(step / 50, [name], [0.9 if step else 0.5], True)
    parts = shares.bound(1.0, ["a", "b", "c"], [0.1, 0.1, 0.1], False)
    assert sum(parts) == pytest.approx(1.0)
    shares.forget("a")
    assert shares.bound(1.0, ["a"], [0.2], False) == [0.2]


# --- meters --------------------------------------------------------------------------------


def test_a_rate_is_measured_while_bytes_are_under_way() -> None:
    meter = PathMeter(GainMeter(), "d0")
    assert meter.rate_Bps(0.0, 7.0) == 7.0
    for request in range(4):
        began_at = request * 100.0
        meter.sent(began_at, 10 * MIB)
        for block in range(1, 11):
            meter.arrived(began_at + block * 0.1, MIB)
    assert meter.observed_Bps == pytest.approx(10 * MIB)


def test_what_is_too_short_says_nothing_of_the_rate() -> None:
    meter = PathMeter(GainMeter(), "d0")
    for request in range(100):
        meter.sent(request, 4096)
        meter.arrived(request + 0.001, 4096)
    assert meter.observed_Bps == 0.0


def test_a_fast_link_is_measured_by_bytes() -> None:
    meter = PathMeter(GainMeter())
    meter.sent(0.0, WINDOW_BYTES_MAX)
    meter.arrived(0.004, WINDOW_BYTES_MAX)
    assert meter.observed_Bps == pytest.approx(WINDOW_BYTES_MAX / 0.004)


def test_a_link_that_becomes_slow_is_known_as_slow_within_one_request() -> None:
    meter = PathMeter(GainMeter(), "d0")
    meter.sent(0.0, 100 * MIB)
    for block in range(1, 101):
        meter.arrived(block / 100, MIB)
    meter.sent(1.0, MIB)
    for block in range(1, 17):
        meter.arrived(1 + block / 16, MIB // 16)
    assert meter.observed_Bps < 6 * MIB


def test_bytes_that_never_come_count_as_time() -> None:
    meter = PathMeter(GainMeter(), "d0")
    meter.sent(0.0, 10 * MIB)
    meter.arrived(0.5, MIB)
    assert meter.observed_Bps == pytest.approx(2 * MIB)
    meter.gone(5.5, 9 * MIB)
    assert meter.observed_Bps < 10
    assert meter.inflight_bytes == 0


def test_a_relay_that_has_brought_nothing_in_a_whole_window_is_known_as_slow() -> None:
    meter = PathMeter(GainMeter(), "d0")
    meter.sent(0.0, MIB)
    meter.gone(WINDOW_S_MAX, MIB)
    assert 0.0 < meter.observed_Bps < 10
    assert meter.rate_Bps(WINDOW_S_MAX, 100 * MIB) < 10
    # Once it is idle it gets another chance.
    assert meter.rate_Bps(WINDOW_S_MAX + MEMORY_S, 100 * MIB) > 50 * MIB
    # Misses say nothing of it, and nothing at all of the path that is always asked.
    for soon, node_id in ((WINDOW_S_MAX / 2, "d0"), (WINDOW_S_MAX, "")):
        meter = PathMeter(GainMeter(), node_id)
        meter.sent(0.0, MIB)
        meter.gone(soon, MIB)
        assert meter.observed_Bps == 0.0


def test_what_an_idle_relay_showed_is_forgotten_slowly() -> None:
    meter = PathMeter(GainMeter(), "d0")
    meter.sent(0.0, MIB)
    meter.arrived(1.0, MIB)
    assert meter.rate_Bps(1.0, 100 * MIB) == pytest.approx(MIB)
    later = meter.rate_Bps(1.0 + MEMORY_S, 100 * MIB)
    assert later == pytest.approx(100 * MIB - 99 * MIB / math.e)
    meter.sent(1.0 + MEMORY_S, MIB)
    assert meter.rate_Bps(1.0 + MEMORY_S, 100 * MIB) == pytest.approx(MIB)


def test_a_path_is_stalled_when_bytes_are_under_way_and_none_comes() -> None:
    meter = PathMeter(GainMeter(), "d0")
    assert not meter.stalled(100.0)
    meter.sent(100.0, 2 * MIB)
    assert not meter.stalled(100.0 + STALLED_S_MIN - 0.01)
    assert meter.stalled(100.0 + STALLED_S_MIN)
    meter.arrived(100.0 + STALLED_S_MIN, MIB)
    assert not meter.stalled(100.0 + STALLED_S_MIN)


def test_the_recent_peak_outlives_what_it_was_made_of() -> None:
    meter = PathMeter(GainMeter(), "d0")
    meter.sent(0.0, MIB)
    meter.arrived(0.01, MIB)
    assert meter.recent_bytes(PEAK_S * 0.9) == MIB
    assert meter.recent_bytes(PEAK_S * 1.9) == MIB
    assert meter.recent_bytes(PEAK_S * 3.0) == 0


def test_relays_come_and_go() -> None:
    inflight = Inflight("p0", ["s0"], ["d0"])
    meter = inflight.add_relay("d1")
    assert inflight.add_relay("d1") is meter
    assert [m.node_id for m in inflight.ring] == ["d0", "d1"]
    meter.sent(0.0, 10)
    inflight.remove_relay("d1")
    inflight.remove_relay("d1")
    assert [m.node_id for m in inflight.ring] == ["d0"]
    meter.gone(1.0, 10)


# --- queues --------------------------------------------------------------------------------


def report(node_id: str, seq: int, **queues: int) -> LoadReport:
    return LoadReport(
        node_id=node_id,
        boot_id=bytes(8),
        seq=seq,
        interval_ms=200,
        state=NodeState.READY,
        requesters=tuple(RequesterLoad(node_id=n, queued_bytes=q) for n, q in queues.items()),
    )


def test_queues_of_all_daemons_add_up_as_long_as_their_reports_are_worth_something() -> None:
    table, queues = ReportTable(), ReadQueues()
    daemons = [Daemon("s0"), Daemon("s1"), Daemon("never heard of"), Daemon("")]
    table.accept(0.0, report("s0", 1, p0=1, d0=10))
    table.accept(0.5, report("s1", 1, p0=2))
    assert queues.update(0.6, table, daemons) == {"p0": 3, "d0": 10}
    assert queues.update(0.6, table, daemons) is queues.update(0.6, table, daemons)
    assert queues.update(1.2, table, daemons) == {"p0": 2}
    table.accept(1.2, report("s0", 2, p0=0))
    assert queues.update(1.2, table, daemons) == {"p0": 2, "d0": 10}
    assert queues.update(9.0, table, daemons) == {}


# --- gain ----------------------------------------------------------------------------------


def flow(gain: GainMeter, now: float, seconds: float, direct_Bps: float, relay_Bps: float) -> float:
    """Bytes flow evenly for a while; the time at the end."""
    steps = max(1, round(seconds / 0.01))
    gain.moved(now, False, round(direct_Bps * seconds), 0)
    if relay_Bps:
        gain.moved(now, True, round(relay_Bps * seconds), 0)
    for step in range(1, steps + 1):
        at = now + seconds * step / steps
        for relayed, rate in ((True, relay_Bps), (False, direct_Bps)):
            whole = round(rate * seconds)
            part = whole * step // steps - whole * (step - 1) // steps
            gain.moved(at, relayed, -part, part)
    return now + seconds


def test_evidence_is_an_average_that_forgets() -> None:
    evidence = Evidence()
    assert evidence.rate_Bps == 0.0
    evidence.add(1.0, 1.0, 100)
    assert evidence.rate_Bps == 100
    evidence.add(2.0, 1.0, 300)
    assert 200 < evidence.rate_Bps < 300
    evidence.add(4.0 + EVIDENCE_S_MAX, 1.0, 50)
    assert evidence.rate_Bps == 50


def test_hope_then_a_trial_of_direct_then_a_verdict() -> None:
    gain = GainMeter()
    for _ in range(TRIAL_REQUESTS_MIN):
        assert gain.allowance_s(0.0, 0.02) == math.inf
    now = flow(gain, 0.0, TRIAL_INTERVAL_S_MIN, 500e6, 100e6)
    assert gain.allowance_s(now, 0.02) == 0.0
    now = flow(gain, now, DIRECT_TRIAL_S, 1e9, 0)
    assert not gain.splitting
    assert gain.gain == pytest.approx(0.6, rel=0.05)
    assert gain.allowance_s(now, 0.02) == 0.0


def test_where_it_gains_it_goes_on_and_trials_become_rare() -> None:
    gain = GainMeter()
    trials = []
    now = 0.0
    while now < 60:
        if gain.allowance_s(now, 0.02):
            now = flow(gain, now, 0.25, 50e6, 50e6)
        else:
            trials.append(now)
            now = flow(gain, now, 0.25, 50e6, 0)
    assert gain.splitting
    assert gain.gain == pytest.approx(2.0, rel=0.05)
    assert 4 <= len(trials) <= 9
    gaps = [later - earlier for earlier, later in pairwise(trials)]
    assert gaps[-1] == pytest.approx(TRIAL_INTERVAL_S_MAX, abs=0.6)


def test_a_probe_is_short_and_alone_and_brings_splitting_back() -> None:
    gain = GainMeter()
    for _ in range(TRIAL_REQUESTS_MIN):
        gain.allowance_s(0.0, 0.02)
    now = flow(gain, 0.0, TRIAL_INTERVAL_S_MIN, 500e6, 100e6)
    gain.allowance_s(now, 0.02)
    now = flow(gain, now, DIRECT_TRIAL_S, 1e9, 0)
    while not (allowance_s := gain.allowance_s(now, 0.02)):
        now = flow(gain, now, 0.25, 1e9, 0)
    assert allowance_s == PROBE_S
    assert gain.allowance_s(now, 0.02) == 0.0
    now = flow(gain, now, 0.25, 1e9, 1e9)
    assert gain.splitting
    assert gain.allowance_s(now, 0.02) == math.inf


def test_a_long_request_is_tried_direct_only_when_nothing_shorter_comes() -> None:
    gain = GainMeter()
    gain.allowance_s(0.0, 2.0)
    assert gain.allowance_s(TRIAL_INTERVAL_S_MIN, 2.0) == math.inf
    assert gain.allowance_s(4 * TRIAL_INTERVAL_S_MIN, 2.0) == 0.0


def test_a_trial_that_shows_nothing_is_given_up() -> None:
    gain = GainMeter()
    for _ in range(TRIAL_REQUESTS_MIN):
        gain.allowance_s(0.0, 0.02)
    assert gain.allowance_s(1.0, 0.02) == 0.0
    assert gain.allowance_s(1.0 + TRIAL_S_MAX, 0.02) == 0.0
    assert gain.allowance_s(1.1 + TRIAL_S_MAX, 0.02) == math.inf


def test_a_trial_waits_for_relayed_bytes_to_drain() -> None:
    gain = GainMeter()
    for _ in range(TRIAL_REQUESTS_MIN):
        gain.allowance_s(0.0, 0.02)
    gain.moved(0.9, True, 100 * MIB, 0)
    assert gain.allowance_s(1.0, 0.02) == 0.0
    assert gain.allowance_s(5.0, 0.02) == 0.0
    gain.moved(5.0, True, -100 * MIB, 100 * MIB)
    assert gain.allowance_s(5.1, 0.02) == math.inf


def test_a_trial_of_direct_begins_with_the_last_relayed_byte() -> None:
    gain = GainMeter()
    for _ in range(TRIAL_REQUESTS_MIN):
        gain.allowance_s(0.0, 0.02)
    gain.moved(0.98, False, 1000 * MIB, 0)
    gain.moved(0.98, True, MIB, 0)
    assert gain.allowance_s(1.0, 0.02) == 0.0
    gain.moved(1.05, True, -MIB, MIB)
    for step in range(1, 12):
        gain.moved(1.05 + step * 0.01, False, -MIB, MIB)
    assert gain.direct.rate_Bps == pytest.approx(100 * MIB, rel=0.01)
    assert gain.direct.seen_at <= 1.05 + DIRECT_TRIAL_S + 0.011


def test_however_rarely_requests_come_few_of_them_pay_for_a_trial() -> None:
    gain = GainMeter()
    trials = []
    for number in range(40):
        now = 60.0 * number  # long past any interval
        if not gain.allowance_s(now, 0.1):
            trials.append(number)
            while gain._trial_at is not None:
                now = flow(gain, now, 0.1, 500e6, 0.0)
            gain.splitting = True
        else:
            flow(gain, now, 0.3, 500e6, 500e6)
    assert trials[0] >= TRIAL_REQUESTS_MIN
    gaps = [b - a for a, b in itertools.pairwise(trials)]
    assert gaps == sorted(gaps)
    assert len(trials) <= 6
