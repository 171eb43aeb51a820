"""Load reports: when they are pushed, what they name, and how far they are believed."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from kvstore.loadreport import (
    FRESH_S_MAX,
    NODES_MAX,
    PUSH_GAP_S,
    PUSH_INTERVAL_S,
    REQUESTER_CHANGED_S,
    REQUESTER_FORGET_S,
    REQUESTER_NAMED_S,
    REQUESTER_REFRESH_S,
    REQUESTERS_KNOWN_MAX,
    REQUESTERS_MAX,
    STALE_S_MIN,
    Freshness,
    LoadReport,
    NodeState,
    ReportSchedule,
    ReportTable,
    RequesterLoad,
    RequesterTable,
)


def report(
    seq: int,
    *,
    node_id: str = "a",
    boot_id: bytes = b"1",
    requesters: tuple[RequesterLoad, ...] = (),
) -> LoadReport:
    return LoadReport(
        node_id=node_id,
        boot_id=boot_id,
        seq=seq,
        interval_ms=200,
        state=NodeState.READY,
        requesters=requesters,
    )


def queue(node_id: str, queued_bytes: int, inflight_requests: int = 1) -> RequesterLoad:
    return RequesterLoad(
        node_id=node_id, queued_bytes=queued_bytes, inflight_requests=inflight_requests
    )


# --- ReportSchedule ------------------------------------------------------------------------


def test_first_push_is_due_at_once() -> None:
    assert ReportSchedule().due(0.0)


def test_without_change_a_push_is_due_every_interval() -> None:
    schedule = ReportSchedule()
    schedule.pushed(10.0)
    assert schedule.due_at == 10.0 + PUSH_INTERVAL_S
    assert not schedule.due(10.0 + 0.9 * PUSH_INTERVAL_S)
    assert schedule.due(10.0 + PUSH_INTERVAL_S)


def test_change_is_pushed_after_the_gap() -> None:
    schedule = ReportSchedule()
    schedule.pushed(10.0)
    schedule.changed()
    assert schedule.due_at == 10.0 + PUSH_GAP_S
    assert not schedule.due(10.0 + 0.9 * PUSH_GAP_S)
    assert schedule.due(10.0 + PUSH_GAP_S)


def test_change_after_silence_is_due_at_once() -> None:
    schedule = ReportSchedule()
    schedule.pushed(10.0)
    schedule.changed()
    assert schedule.due(10.1)


def test_pushes_stay_between_gap_and_interval(seed: int) -> None:
    draws = random.Random(seed)
    schedule, now, pushes = ReportSchedule(), 0.0, []
    for _ in range(5000):
        now += 0.001
        if draws.random() < (0.5 if now < 2.5 else 0.001):
            schedule.changed()
        if schedule.due(now):
            schedule.pushed(now)
            pushes.append(now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(pushes)]
    assert min(gaps) >= PUSH_GAP_S - 1e-9
    assert max(gaps) <= PUSH_INTERVAL_S + 0.001 + 1e-9
    assert len(pushes) > 2.5 / (PUSH_GAP_S + 0.01)


def test_interval_below_the_gap_is_the_gap() -> None:
    schedule = ReportSchedule(interval_s=0.0)
    schedule.pushed(1.0)
    assert schedule.due_at == 1.0 + PUSH_GAP_S


# --- RequesterTable ------------------------------------------------------------------------


def test_changed_queues_are_named_in_every_report_for_a_while() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 100))
    assert table.select(0.0) == (queue("a", 100),)
    assert table.select(REQUESTER_CHANGED_S) == (queue("a", 100),)
    assert table.select(REQUESTER_CHANGED_S + REQUESTER_NAMED_S + 0.1) == ()


def test_unchanged_queues_are_named_now_and_then() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 100))
    named_at = [n / 20 for n in range(200) if table.select(n / 20)]
    settled = [now for now in named_at if now > REQUESTER_CHANGED_S + REQUESTER_NAMED_S]
    gaps = [later - earlier for earlier, later in itertools.pairwise(settled)]
    pauses = [gap for gap in gaps if gap > 0.06]
    assert len(pauses) >= 6
    # Named for a while, so that it is in some push to everyone; then not until the next time.
    quiet_s = REQUESTER_REFRESH_S - REQUESTER_NAMED_S
    assert all(quiet_s - 1e-9 <= pause < quiet_s + 0.06 for pause in pauses)


def test_a_report_for_one_receiver_hides_no_queue_from_the_others() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 100))
    due = REQUESTER_CHANGED_S + REQUESTER_NAMED_S + REQUESTER_REFRESH_S
    assert table.select(due) == (queue("a", 100),)  # a reply to somebody
    assert table.select(due + PUSH_INTERVAL_S) == (queue("a", 100),)  # the next push to all


def test_setting_the_same_again_is_no_change() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 100))
    table.select(0.9)
    table.set(1.3, queue("a", 100))
    assert table.select(1.3) == ()
    table.set(1.4, queue("a", 99))
    assert table.select(1.4) == (queue("a", 99),)


def test_empty_queue_is_named_with_zeros_and_then_forgotten() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 100))
    table.set(1.0, queue("a", 0, 0))
    assert table.select(1.0) == (queue("a", 0, 0),)
    assert table.select(1.5) == (queue("a", 0, 0),)
    assert table.select(1.1 + REQUESTER_CHANGED_S) == ()
    assert len(table) == 0


def test_queue_that_never_was_takes_no_room() -> None:
    table = RequesterTable()
    table.set(0.0, queue("a", 0, 0))
    assert len(table) == 0


def test_longest_queues_come_first_and_no_more_than_allowed(seed: int) -> None:
    table = RequesterTable()
    sizes = random.Random(seed).sample(range(1, 10_000), 3 * REQUESTERS_MAX)
    for n, size_bytes in enumerate(sizes):
        table.set(0.0, queue(f"node-{n}", size_bytes))
    named = [load.queued_bytes for load in table.select(0.0)]
    assert named == sorted(sizes, reverse=True)[:REQUESTERS_MAX]


def test_queues_that_found_no_room_are_named_next() -> None:
    table = RequesterTable()
    for n in range(2 * REQUESTERS_MAX):
        table.set(0.0, queue(f"node-{n:03}", 1000 - n))
    later = REQUESTER_CHANGED_S + 0.1
    named = table.select(0.2) + table.select(later)
    assert len({load.node_id for load in named}) == 2 * REQUESTERS_MAX


# --- ReportTable ---------------------------------------------------------------------------


def test_unknown_node_is_stale() -> None:
    table = ReportTable()
    assert table.report("a") is None
    assert table.age(5.0, "a") == math.inf
    assert table.freshness(5.0, "a") is Freshness.STALE
    assert table.requesters("a") == ()


@pytest.mark.parametrize(
    ("age_s", "freshness"),
    [
        (0.0, Freshness.FRESH),
        (FRESH_S_MAX, Freshness.FRESH),
        (FRESH_S_MAX + 0.001, Freshness.WIDEN),
        (STALE_S_MIN, Freshness.WIDEN),
        (STALE_S_MIN + 0.001, Freshness.STALE),
        (1e6, Freshness.STALE),
    ],
)
def test_belief_falls_with_age(age_s: float, freshness: Freshness) -> None:
    table = ReportTable()
    table.accept(0.0, report(1))
    assert table.age(age_s, "a") == age_s
    assert table.freshness(age_s, "a") is freshness


def test_newer_reports_replace_older_ones() -> None:
    table = ReportTable()
    assert table.accept(0.0, report(1))
    assert table.accept(0.3, report(7))
    assert table.age(0.4, "a") == pytest.approx(0.1)
    assert table.report("a") == report(7)


@pytest.mark.parametrize("seq", [0, 6, 7])
def test_reports_that_go_backwards_are_dropped_and_refresh_nothing(seq: int) -> None:
    table = ReportTable()
    table.accept(0.0, report(7))
    assert not table.accept(0.3, report(seq))
    assert table.report("a") == report(7)
    assert table.age(0.3, "a") == 0.3


def test_new_boot_begins_anew() -> None:
    table = ReportTable()
    table.accept(0.0, report(7, requesters=(queue("x", 100),)))
    assert table.accept(0.1, report(1, boot_id=b"2", requesters=(queue("y", 5),)))
    assert table.report("a") == report(1, boot_id=b"2", requesters=(queue("y", 5),))
    assert table.requesters("a") == (queue("y", 5),)


def test_late_report_of_the_boot_before_is_dropped() -> None:
    table = ReportTable()
    table.accept(0.0, report(7))
    table.accept(0.1, report(1, boot_id=b"2"))
    assert not table.accept(0.2, report(8))
    assert table.accept(0.3, report(2, boot_id=b"2"))
    assert table.report("a") == report(2, boot_id=b"2")


def test_nodes_are_kept_apart() -> None:
    table = ReportTable()
    table.accept(0.0, report(7))
    assert table.accept(0.5, report(1, node_id="b"))
    assert table.age(0.6, "a") == 0.6
    table.forget("a")
    table.forget("never known")
    assert table.report("a") is None
    assert table.report("b") is not None


def test_queues_are_put_together_from_reports() -> None:
    table = ReportTable()
    table.accept(0.0, report(1, requesters=(queue("x", 100), queue("y", 50))))
    table.accept(0.1, report(2, requesters=(queue("x", 90),)))
    table.accept(0.2, report(3))
    assert set(table.requesters("a")) == {queue("x", 90), queue("y", 50)}
    table.accept(0.3, report(4, requesters=(queue("x", 0, 0),)))
    assert table.requesters("a") == (queue("y", 50),)


def test_queue_of_which_no_report_speaks_is_forgotten() -> None:
    table = ReportTable()
    table.accept(0.0, report(1, requesters=(queue("x", 100), queue("y", 50))))
    table.accept(1.0, report(2, requesters=(queue("x", 100),)))
    assert len(table.requesters("a")) == 2
    table.accept(REQUESTER_FORGET_S + 0.1, report(3))
    assert table.requesters("a") == (queue("x", 100),)


def test_memory_is_bounded_whatever_peers_claim() -> None:
    table = ReportTable()
    for n in range(NODES_MAX + 10):
        table.accept(float(n), report(1, node_id=f"node-{n}"))
    assert len(table) == NODES_MAX
    assert table.report("node-0") is None
    for seq in range(2, 40):
        names = tuple(queue(f"{seq}-{n}", 1) for n in range(2 * REQUESTERS_MAX))
        table.accept(5000.0, report(seq, node_id="node-100", requesters=names))
    assert len(table.requesters("node-100")) == REQUESTERS_KNOWN_MAX


def test_receiver_that_misses_reports_learns_the_queues_all_the_same(seed: int) -> None:
    draws = random.Random(seed)
    sender, receiver = RequesterTable(), ReportTable()
    truth: dict[str, RequesterLoad] = {}
    now = 0.0
    for seq in range(400):
        now += 0.1
        if now < 30.0:
            load = queue(f"node-{draws.randrange(40)}", draws.choice([0, 10, 1000]))
            if not load.queued_bytes:
                load = queue(load.node_id, 0, 0)
            truth[load.node_id] = load
            sender.set(now, load)
        made = report(seq, requesters=sender.select(now))
        if draws.random() < 0.9:
            receiver.accept(now, made)
    expected = {load for load in truth.values() if load.queued_bytes}
    assert set(receiver.requesters("a")) == expected
