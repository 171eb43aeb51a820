"""Circuit breaker and backoff: each move of the picture, and that no history gets stuck."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from kvstore_client.breaker import (
    DELAY_S_MAX,
    DELAY_S_MIN,
    FAILURES_MAX,
    PROBE_TIMEOUT_S,
    RAMP_S,
    RAMP_SHARE_MIN,
    Backoff,
    BreakerState,
    CircuitBreaker,
)

CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, RAMPING = BreakerState.HALF_OPEN, BreakerState.RAMPING

DRAWS = st.floats(0, 1, exclude_max=True)


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_MAX):
        breaker.failure(now)
    return breaker


def probing() -> tuple[CircuitBreaker, float]:
    breaker = opened()
    now = breaker.retry_at
    assert now is not None
    assert breaker.allow(now, 0.99)
    return breaker, now


def ramping() -> tuple[CircuitBreaker, float]:
    breaker, now = probing()
    breaker.success(now)
    return breaker, now


def test_closed_lets_everything_pass() -> None:
    breaker = CircuitBreaker()
    assert breaker.state is CLOSED
    assert breaker.retry_at is None
    assert breaker.allow(0.0, 0.999999)


def test_requests_that_fail_together_are_one_failure() -> None:
    breaker = CircuitBreaker()
    for begun in range(40):
        breaker.failure(100.0, begun_at=begun / 10)
    assert breaker.state is CLOSED
    for moment in range(1, FAILURES_MAX):
        assert breaker.state is CLOSED
        breaker.failure(100.0 + 2 * moment, begun_at=99.0 + 2 * moment)
        breaker.failure(100.5 + 2 * moment, begun_at=99.9 + 2 * moment)  # nothing new
    assert breaker.state is OPEN


def test_what_was_begun_before_the_breaker_opened_does_not_fail_its_probe() -> None:
    breaker, now = probing()
    breaker.failure(now + 1, begun_at=-1.0)
    assert breaker.state is HALF_OPEN
    breaker.failure(now + 1, begun_at=now)
    assert breaker.state is OPEN


def test_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_MAX - 1):
        breaker.failure(0.0)
    assert breaker.state is CLOSED
    breaker.success(0.0)
    for _ in range(FAILURES_MAX - 1):
        breaker.failure(0.0)
    assert breaker.state is CLOSED
    breaker.failure(0.0)
    assert breaker.state is OPEN
    assert not breaker.allow(0.0, 0.0)


def test_one_probe_at_a_time_after_the_pause() -> None:
    breaker = opened(now=100.0)
    retry_at = breaker.retry_at
    assert retry_at is not None
    assert 100.0 + DELAY_S_MIN <= retry_at <= 100.0 + 2 * DELAY_S_MIN
    assert not breaker.allow(retry_at - 0.001, 0.0)
    assert breaker.allow(retry_at, 0.999)
    assert breaker.state is HALF_OPEN
    assert not breaker.allow(retry_at + 0.001, 0.0)


def test_draw_places_the_probe_within_the_pause() -> None:
    early, late = CircuitBreaker(), CircuitBreaker()
    for _ in range(FAILURES_MAX):
        early.failure(0.0, 0.0)
        late.failure(0.0, 0.5)
    assert early.retry_at == DELAY_S_MIN
    assert late.retry_at == 1.5 * DELAY_S_MIN


def test_lost_probe_is_given_up() -> None:
    breaker, now = probing()
    assert breaker.retry_at == now + PROBE_TIMEOUT_S
    assert not breaker.allow(now + PROBE_TIMEOUT_S - 0.001, 0.0)
    assert breaker.allow(now + PROBE_TIMEOUT_S, 0.999)
    assert breaker.state is HALF_OPEN


def test_failed_probes_double_the_pause_up_to_its_limit() -> None:
    breaker = opened()
    now, pauses = 0.0, []
    for _ in range(10):
        retry_at = breaker.retry_at
        assert retry_at is not None
        pauses.append(round(retry_at - now, 9))
        now = retry_at
        assert breaker.allow(now, 0.5)
        breaker.failure(now)
        assert breaker.state is OPEN
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]


def test_failures_of_requests_sent_before_do_not_lengthen_the_pause() -> None:
    breaker = opened()
    retry_at = breaker.retry_at
    for _ in range(100):
        breaker.failure(0.01)
    assert breaker.retry_at == retry_at


def test_success_of_a_request_sent_before_does_not_close() -> None:
    breaker = opened()
    breaker.success(0.01)
    assert breaker.state is OPEN
    assert not breaker.allow(0.01, 0.0)


@pytest.mark.parametrize(
    ("elapsed_s", "share"),
    [(0.0, RAMP_SHARE_MIN), (RAMP_S / 3, 0.4), (RAMP_S / 2, 0.55), (RAMP_S, 1.0)],
)
def test_share_grows_after_recovery(elapsed_s: float, share: float) -> None:
    breaker, start = ramping()
    now = start + elapsed_s
    assert breaker.share(now) == pytest.approx(share)
    assert breaker.allow(now, share - 0.001)
    assert share == 1.0 or not breaker.allow(now, share + 0.001)


@pytest.mark.parametrize("call", ["allow", "success"])
def test_closes_at_the_end_of_the_ramp(call: str) -> None:
    breaker, start = ramping()
    breaker.success(start + RAMP_S / 2)
    assert breaker.state is RAMPING
    if call == "allow":
        assert breaker.allow(start + RAMP_S, 0.999)
    else:
        breaker.success(start + RAMP_S)
    assert breaker.state is CLOSED


def test_failure_while_ramping_opens_at_once_with_a_longer_pause() -> None:
    breaker, start = ramping()
    breaker.failure(start + 1.0)
    assert breaker.state is OPEN
    assert breaker.retry_at == pytest.approx(start + 1.0 + 4 * DELAY_S_MIN)


def test_failure_after_the_ramp_is_one_of_five_again() -> None:
    breaker, start = ramping()
    for _ in range(FAILURES_MAX - 1):
        breaker.failure(start + RAMP_S)
    assert breaker.state is CLOSED
    breaker.failure(start + RAMP_S)
    assert breaker.retry_at == pytest.approx(start + RAMP_S + 2 * DELAY_S_MIN)


def test_share_that_passes_is_the_share_promised(seed: int) -> None:
    breaker, start = ramping()
    draws = random.Random(seed)
    passed = sum(breaker.allow(start + RAMP_S / 3, draws.random()) for _ in range(10_000))
    # Five standard deviations of a binomial of 0.4.
    assert abs(passed / 10_000 - 0.4) < 0.025


_EVENTS = st.tuples(st.sampled_from(["allow", "success", "failure"]), st.floats(0, 20), DRAWS)


@given(st.lists(_EVENTS, max_size=60), DRAWS)
def test_no_history_keeps_a_healthy_peer_out(
    history: list[tuple[str, float, float]], draw: float
) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for event, elapsed_s, event_draw in history:
        now += elapsed_s
        if event == "allow":
            breaker.allow(now, event_draw)
        elif event == "success":
            breaker.success(now)
        else:
            breaker.failure(now, event_draw)
        assert 0.0 <= breaker.share(now) <= 1.0
        retry_at = breaker.retry_at
        assert (retry_at is None) == (breaker.state in (CLOSED, RAMPING))
        assert retry_at is None or retry_at <= now + max(DELAY_S_MAX, PROBE_TIMEOUT_S)
    # From now on the peer answers: a request passes within the longest pause, and after the
    # ramp all do.
    now += max(DELAY_S_MAX, PROBE_TIMEOUT_S)
    if breaker.allow(now, 0.0):
        breaker.success(now)
    assert breaker.state in (CLOSED, RAMPING)
    assert breaker.allow(now + RAMP_S, draw)
    assert breaker.state is CLOSED


@given(st.lists(DRAWS, min_size=1, max_size=40))
def test_backoff_stays_within_its_bounds_and_widens(draws: list[float]) -> None:
    backoff = Backoff()
    for count, draw in enumerate(draws, start=1):
        delay_s = backoff.next_delay_s(draw)
        assert DELAY_S_MIN <= delay_s <= min(DELAY_S_MIN * 2**count, DELAY_S_MAX)
    backoff.reset()
    assert backoff.next_delay_s(0.999) < 2 * DELAY_S_MIN


def test_backoff_uses_the_whole_range() -> None:
    backoff = Backoff()
    for _ in range(20):
        backoff.next_delay_s(0.5)
    assert backoff.next_delay_s(0.0) == DELAY_S_MIN
    assert backoff.next_delay_s(0.5) == pytest.approx((DELAY_S_MIN + DELAY_S_MAX) / 2)
    assert backoff.next_delay_s(1.0) == DELAY_S_MAX
