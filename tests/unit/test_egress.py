"""The egress budget: relays take what is left, give way at once, and are never starved."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from kvstore_client.agent.egress import (
    BURST_S,
    FLOOR_BPS_MIN,
    FLOOR_SHARE,
    FULL_SHARE,
    GRANT_BYTES_MIN,
    HEADROOM_SHARE,
    PASSAGE_BYTES_MIN,
    SAMPLE_S_MIN,
    SHIFT_SHARE,
    EgressBudget,
)

MIB = 1024 * 1024
CAPACITY = 50_000_000  # 400 Mbit/s
TICK_S = 0.001
SAMPLE_S = 0.02
OTHERS_WAIT_S = 0.02
HUGE = 1 << 62


def asks_nothing(now: float) -> float:
    """Others that send nothing."""
    return 0.0


class Link:
    """A link that relays and others share as packets come, and the budget of the relays.

    What does not fit in a tick waits, of the others for `OTHERS_WAIT_S` of the link at most; each
    gets as large a part of the next as it has packets waiting. Relays want all they may have.

    Args:
        others_Bps: What others want at a time.
    """

    def __init__(
        self, budget: EgressBudget, others_Bps: Callable[[float], float] = asks_nothing
    ) -> None:
        self.budget = budget
        self.others_Bps = others_Bps
        self._now = 1000.0
        self._sample_at = self._now
        self._sent = [0.0, 0.0]
        self._waiting = [0.0, 0.0]

    def run(self, duration_s: float) -> tuple[float, float]:
        """Bytes a second that relays and others send in a time."""
        before = self._sent.copy()
        for _ in range(round(duration_s / TICK_S)):
            self._tick()
        relayed, others = (
            (sent - earlier) / duration_s for sent, earlier in zip(self._sent, before, strict=True)
        )
        return relayed, others

    def _tick(self) -> None:
        now = self._now
        if now >= self._sample_at:
            self.budget.sample(now, int(sum(self._sent)), int(self._sent[0]))
            self._sample_at = now + SAMPLE_S
        self._waiting[0] += self.budget.take(now, MIB)
        wanted = self._waiting[1] + self.others_Bps(now) * TICK_S
        self._waiting[1] = min(wanted, OTHERS_WAIT_S * CAPACITY)
        waiting = sum(self._waiting)
        share = min(1.0, CAPACITY * TICK_S / waiting) if waiting else 0.0
        for index, bytes_waiting in enumerate(self._waiting):
            self._sent[index] += share * bytes_waiting
            self._waiting[index] -= share * bytes_waiting
        self._now += TICK_S


# --- what relays get -----------------------------------------------------------------------


def test_relays_get_the_link_when_nobody_else_wants_it() -> None:
    relayed_Bps, _ = Link(EgressBudget(CAPACITY)).run(2.0)
    assert relayed_Bps == pytest.approx(HEADROOM_SHARE * CAPACITY, rel=0.02)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8])
def test_relays_get_most_of_what_others_leave(share: float) -> None:
    link = Link(EgressBudget(CAPACITY), lambda now: share * CAPACITY)
    link.run(0.5)
    relayed_Bps, others_Bps = link.run(2.0)
    assert others_Bps == pytest.approx(share * CAPACITY, rel=0.01)
    left_Bps = (HEADROOM_SHARE - share) * CAPACITY
    assert 0.65 * left_Bps < relayed_Bps < left_Bps


def test_others_that_want_all_get_99_of_100_bytes() -> None:
    link = Link(EgressBudget(CAPACITY), lambda now: 2 * CAPACITY)
    link.run(0.5)
    relayed_Bps, others_Bps = link.run(2.0)
    assert relayed_Bps == pytest.approx(FLOOR_SHARE * CAPACITY, rel=0.15)
    assert others_Bps > 0.98 * CAPACITY


def test_others_that_grow_into_what_is_free_get_it_all() -> None:
    """TCP takes what there is: it sees no more of a shared link than its part."""
    link = Link(EgressBudget(CAPACITY))
    link.run(1.0)
    link.others_Bps = lambda now: max(1e6, CAPACITY - 0.9 * link.budget.allowed_Bps)
    link.run(1.0)
    assert link.budget.allowed_Bps == link.budget.floor_Bps


def test_relays_give_way_within_one_sample() -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 0, 0)
    budget.sample(SAMPLE_S, 1000, 1000)
    assert budget.allowed_Bps == pytest.approx(HEADROOM_SHARE * CAPACITY)
    budget.sample(2 * SAMPLE_S, 1000 + int(CAPACITY * SAMPLE_S), 1000)
    assert budget.others_Bps == pytest.approx(CAPACITY)
    assert budget.allowed_Bps == budget.floor_Bps
    # Nor is anything left that was saved up before.
    assert budget.take(2 * SAMPLE_S, HUGE) <= GRANT_BYTES_MIN


def test_what_has_grown_before_a_sample_has_grown_at_the_old_rate() -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 0, 0)
    sent = int(CAPACITY * SAMPLE_S)
    budget.sample(SAMPLE_S, sent, 0)
    budget.take(SAMPLE_S, HUGE)
    budget.sample(0.1, sent, 0)
    assert budget.allowed_Bps > 10 * budget.floor_Bps
    grown = (0.1 - SAMPLE_S) * budget.floor_Bps
    assert budget.take(0.1, int(grown) + 2) == 0
    assert budget.take(0.1, int(grown) - 2) == int(grown) - 2


def test_link_comes_back_bit_by_bit_and_within_a_second() -> None:
    budget = EgressBudget(CAPACITY)
    sent = 0
    budget.sample(0.0, sent, 0)
    sent += int(CAPACITY * SAMPLE_S)
    budget.sample(SAMPLE_S, sent, 0)
    allowed = [budget.allowed_Bps]
    for number in range(2, 52):
        budget.sample(number * SAMPLE_S, sent, 0)
        allowed.append(budget.allowed_Bps)
    assert allowed == sorted(allowed)
    assert allowed[1] < 0.25 * CAPACITY
    assert allowed[-1] > 0.99 * HEADROOM_SHARE * CAPACITY


def test_first_sample_after_a_pause_is_about_the_pause() -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 0, 0)
    budget.sample(100.0, 10 * CAPACITY, 0)
    assert budget.others_Bps == pytest.approx(0.1 * CAPACITY)


@pytest.mark.parametrize(
    ("both", "own", "more"),
    [
        (FULL_SHARE - 0.01, 0.5, 0.0),
        (FULL_SHARE + 0.01, 0.5, SHIFT_SHARE * (FULL_SHARE + 0.01 - 0.5)),
        (FULL_SHARE + 0.01, 0.1, SHIFT_SHARE * 0.1),
        (FULL_SHARE + 0.01, FULL_SHARE + 0.01, 0.0),
    ],
)
def test_full_link_is_a_sign_that_others_want_more(both: float, own: float, more: float) -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 0, 0)
    own_bytes = round(own * CAPACITY * SAMPLE_S)
    budget.sample(SAMPLE_S, round(both * CAPACITY * SAMPLE_S), own_bytes)
    assert budget.others_Bps == pytest.approx((both - own + more) * CAPACITY, abs=100)


def test_bytes_on_their_way_to_the_counter_are_not_taken_for_others() -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 0, 0)
    budget.sample(0.02, 100_000, 100_000 + PASSAGE_BYTES_MIN)
    budget.sample(0.04, 200_000 + PASSAGE_BYTES_MIN, 200_000 + PASSAGE_BYTES_MIN)
    assert budget.others_Bps == 0.0
    # What never comes is forgotten but for that much.
    budget.sample(0.06, 200_000 + PASSAGE_BYTES_MIN, 10**9)
    budget.sample(0.08, 1_000_000 + PASSAGE_BYTES_MIN, 10**9)
    passage = max(PASSAGE_BYTES_MIN, BURST_S * CAPACITY)
    assert budget.others_Bps == pytest.approx((800_000 - passage) / 0.02)


# --- limits --------------------------------------------------------------------------------


def test_without_capacity_and_cap_everything_is_granted() -> None:
    budget = EgressBudget()
    budget.sample(0.0, 0, 0)
    budget.sample(1.0, 10**12, 0)
    assert budget.others_Bps == 1e12
    assert budget.allowed_Bps == math.inf
    assert budget.take(1.0, HUGE) == HUGE
    assert budget.wait_s(1.0) == 0.0


def test_cap_without_capacity_holds_and_yields_to_nobody() -> None:
    budget = EgressBudget(cap_Bps=MIB)
    budget.sample(0.0, 0, 0)
    budget.sample(1.0, 10**12, 0)
    assert budget.allowed_Bps == MIB


def test_cap_holds_below_the_capacity_and_below_the_floor() -> None:
    assert EgressBudget(CAPACITY, 10 * MIB).allowed_Bps == 10 * MIB
    assert EgressBudget(CAPACITY, 100 * CAPACITY).allowed_Bps == HEADROOM_SHARE * CAPACITY
    small = EgressBudget(CAPACITY, 1000)
    assert small.floor_Bps == small.allowed_Bps == 1000


@pytest.mark.parametrize(
    ("capacity", "floor"),
    [
        (100 * FLOOR_BPS_MIN, FLOOR_BPS_MIN),
        (1_000_000, FLOOR_BPS_MIN),
        (25_000_000_000, 250_000_000),
        (100_000, HEADROOM_SHARE * 100_000),
    ],
)
def test_floor_is_a_share_of_the_link_and_enough_to_live_on(capacity: int, floor: float) -> None:
    assert EgressBudget(capacity).floor_Bps == pytest.approx(floor)


def test_grants_are_worth_a_system_call_or_all_that_is_wanted() -> None:
    budget = EgressBudget(cap_Bps=MIB)
    assert budget.take(0.0, HUGE) == GRANT_BYTES_MIN  # the burst of so slow a link
    half_s = GRANT_BYTES_MIN / 2 / MIB
    assert budget.take(half_s, HUGE) == 0
    assert budget.take(half_s, 1000) == 1000
    assert budget.take(half_s, 0) == 0


def test_wait_ends_with_a_grant() -> None:
    budget = EgressBudget(cap_Bps=MIB)
    now = 1e6 / 3
    assert budget.wait_s(now) == 0.0
    budget.take(now, HUGE)
    for want in (HUGE, 1000):
        wait_s = budget.wait_s(now, want)
        assert wait_s == pytest.approx(min(want, GRANT_BYTES_MIN) / MIB, abs=1e-5)
        assert budget.take(now + wait_s / 2, want) == 0
        now += wait_s
        assert budget.take(now, want) == min(want, GRANT_BYTES_MIN)


def test_what_was_not_sent_can_be_granted_again() -> None:
    budget = EgressBudget(CAPACITY)
    granted = budget.take(0.0, HUGE)
    assert granted == int(BURST_S * HEADROOM_SHARE * CAPACITY)
    budget.give_back(granted - 1000)
    assert budget.take(0.0, HUGE) == granted - 1000
    budget.give_back(HUGE)
    assert budget.take(0.0, HUGE) == granted, "more than a burst was saved up"


# --- counters that lie ---------------------------------------------------------------------


def recovered(budget: EgressBudget, now: float, interface: int, own: int) -> float:
    """What is allowed after another second in which relays alone send, at 10 MB/s."""
    for _ in range(50):
        now += SAMPLE_S
        interface += 200_000
        own += 200_000
        budget.sample(now, interface, own)
    return budget.allowed_Bps


@pytest.mark.parametrize("jump", [-(10**9), 10**9, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("counter", ["interface", "own"])
def test_counter_that_jumps_costs_at_most_a_second(counter: str, jump: int) -> None:
    budget = EgressBudget(CAPACITY)
    interface = own = 1 << 41
    budget.sample(0.0, interface, own)
    interface += jump * (counter == "interface")
    own += jump * (counter == "own")
    budget.sample(SAMPLE_S, interface, own)
    assert budget.allowed_Bps >= budget.floor_Bps
    assert recovered(budget, SAMPLE_S, interface, own) > 0.99 * HEADROOM_SHARE * CAPACITY


@pytest.mark.parametrize("counters", [(0, 10**9), (10**9, 0), (0, 0)])
def test_counter_that_begins_anew_says_nothing_about_others(counters: tuple[int, int]) -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(0.0, 10**9, 10**9)
    budget.sample(0.1, 10**9 + 10**6, 10**9)
    budget.sample(0.2, *counters)
    assert budget.others_Bps == pytest.approx(10**7)
    budget.sample(0.3, counters[0] + 2 * 10**6, counters[1])
    assert budget.others_Bps == pytest.approx(2 * 10**7)


def test_counter_that_stands_still_lets_relays_go_on() -> None:
    budget = EgressBudget(CAPACITY)
    for number in range(100):
        budget.sample(number * SAMPLE_S, 12345, number * 1_000_000)
    assert budget.others_Bps == 0.0
    assert budget.allowed_Bps == HEADROOM_SHARE * CAPACITY


def test_samples_that_come_too_soon_wait_for_the_next() -> None:
    budget = EgressBudget(CAPACITY)
    budget.sample(1.0, 0, 0)
    budget.sample(1.0, 10**6, 0)
    budget.sample(1.0 + SAMPLE_S_MIN / 2, 10**6, 0)
    budget.sample(0.5, 10**6, 0)
    assert budget.others_Bps == 0.0
    budget.sample(1.1, 10**6, 0)
    assert budget.others_Bps == pytest.approx(10**7)


# --- whatever happens ----------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 10**7), st.integers(0, HUGE))
steps = st.one_of(
    st.tuples(st.just("sample"), numbers, numbers),
    st.tuples(st.just("take"), numbers, st.just(0)),
    st.tuples(st.just("give back"), st.integers(0, 100), st.just(0)),
)


@given(
    capacity=st.integers(0, 10**11),
    cap=st.one_of(st.just(0), st.integers(1, 10**11)),
    happens=st.lists(st.tuples(st.floats(0, 0.5), steps), max_size=60),
)
def test_no_more_is_granted_than_a_burst_and_what_grows(
    capacity: int, cap: int, happens: list[tuple[float, tuple[str, int, int]]]
) -> None:
    budget = EgressBudget(capacity, cap)
    ceiling = budget.allowed_Bps
    now = 1000.0
    most = budget.burst_bytes
    granted = held = 0
    for pause_s, (what, first, second) in happens:
        now += pause_s
        most += pause_s * budget.allowed_Bps
        if what == "sample":
            budget.sample(now, first, second)
        elif what == "take":
            grant = budget.take(now, first)
            assert 0 <= grant <= first
            held = grant
            granted += grant
        else:
            back = held * first // 100
            held -= back
            granted -= back
            budget.give_back(back)
        assert 0 <= budget.others_Bps < math.inf
        assert 0 < budget.floor_Bps <= budget.allowed_Bps <= ceiling
        if ceiling < math.inf:
            assert granted <= most * (1 + 1e-9) + 1


@given(
    capacity=st.integers(1, 10**11),
    happens=st.lists(st.tuples(st.floats(0, 0.5), numbers, numbers), max_size=40),
)
def test_nobody_is_starved(capacity: int, happens: list[tuple[float, int, int]]) -> None:
    budget = EgressBudget(capacity)
    now = 1000.0
    for pause_s, interface, own in happens:
        now += pause_s
        budget.sample(now, interface, own)
        budget.take(now, HUGE)
        wait_s = budget.wait_s(now)
        assert wait_s <= GRANT_BYTES_MIN / budget.floor_Bps + 1e-5
        now += wait_s
        assert budget.take(now, GRANT_BYTES_MIN) == GRANT_BYTES_MIN


@given(
    others=st.lists(st.integers(0, CAPACITY), min_size=1, max_size=40),
    gaps=st.lists(st.floats(SAMPLE_S_MIN * 1.01, 0.5), min_size=40, max_size=40),
    share=st.floats(0, 1),
)
def test_others_are_believed_at_once_and_never_underestimated(
    others: list[int], gaps: list[float], share: float
) -> None:
    """With counters that tell the truth, whatever part of its allowance a relay uses."""
    budget = EgressBudget(CAPACITY)
    now, interface, own = 1000.0, 0, 0
    budget.sample(now, interface, own)
    for others_Bps, gap_s in zip(others, gaps, strict=False):
        own_bytes = int(share * min(budget.allowed_Bps, CAPACITY - others_Bps) * gap_s)
        now += gap_s
        own += own_bytes
        interface += own_bytes + int(others_Bps * gap_s)
        budget.sample(now, interface, own)
        assert budget.others_Bps >= others_Bps - 2 / gap_s
        left_Bps = HEADROOM_SHARE * CAPACITY - others_Bps + 2 / gap_s
        assert budget.allowed_Bps <= max(budget.floor_Bps, left_Bps)
