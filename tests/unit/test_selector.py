"""The selector's policies: what each does with what it is told, and what it says about it."""

from __future__ import annotations

import math

import pytest

from kvstore.loadreport import LinkLoad, LoadReport, NodeState, ReportTable, RequesterLoad
from kvstore_client.selector import (
    STORAGE_LINK,
    Inflight,
    Plan,
    PlannedRun,
    Policy,
    Request,
    Selector,
    Span,
)
from kvstore_client.selector.plans import lay_out

MIB = 1024 * 1024
NIC_BPS = 50e6
# No exploring, and the first two of the ring.
DRAWS = (0.0, 0.0, 0.99)
EXPLORING = (0.0, 0.0, 0.0)


class Bed:
    """A client on node p0 with daemons s0, s1 and relays d0 to d3, all idle and well known."""

    def __init__(self, policy: Policy = Policy.BALANCED, relays: int = 4) -> None:
        self.names = [f"d{number}" for number in range(relays)]
        self.inflight = Inflight("p0", ["s0", "s1"], self.names)
        self.reports = ReportTable()
        self.selector = Selector(policy)
        self.seq = 0
        for name in ("s0", "s1", *self.names):
            self.tell(name)
        for meter in (self.inflight.direct, *self.inflight.ring):
            meter.observed_Bps, meter.observed_at = NIC_BPS, 0.0

    def tell(
        self,
        node_id: str,
        now: float = 0.0,
        willing: bool = True,
        state: NodeState = NodeState.READY,
        relay_queued_bytes: int = 0,
        links: tuple[LinkLoad, ...] = (),
        queues: dict[str, int] | None = None,
    ) -> None:
        self.seq += 1
        report = LoadReport(
            node_id=node_id,
            boot_id=bytes(8),
            seq=self.seq,
            interval_ms=200,
            state=state,
            links=links,
            requesters=tuple(
                RequesterLoad(node_id=name, queued_bytes=size_bytes)
                for name, size_bytes in (queues or {}).items()
            ),
            relay_queued_bytes=relay_queued_bytes,
            willing=willing,
        )
        assert self.reports.accept(now, report)

    def plan(
        self,
        blocks: int = 128,
        now: float = 0.1,
        decode_node: str = "d0",
        draws: tuple[float, ...] = DRAWS,
        block_bytes: int = MIB,
    ) -> Plan:
        half = blocks // 2
        request = Request([Span(0, half, 0), Span(half, blocks, 1)], block_bytes, decode_node)
        return self.selector.plan(request, self.reports, self.inflight, now, draws)

    def shares(self, plan: Plan) -> dict[str, int]:
        found: dict[str, int] = {}
        for run in plan.runs:
            found[run.relay] = found.get(run.relay, 0) + run.last - run.first
        return found


def test_all_paths_share_a_large_request_when_all_are_idle() -> None:
    bed = Bed()
    plan = bed.plan()
    shares = bed.shares(plan)
    # Direct, the decode node, and two that were drawn.
    assert set(shares) == {"", "d0", "d1", "d2"}
    assert max(shares.values()) - min(shares.values()) <= 1
    assert plan.estimate_s == pytest.approx(32 * MIB / NIC_BPS, rel=0.05)


def test_the_beginning_goes_direct_and_runs_respect_owners() -> None:
    plan = Bed(relays=1).plan(blocks=10, block_bytes=8 * MIB)
    assert plan.runs == [
        PlannedRun(0, 5, 0),
        PlannedRun(5, 10, 1, "d0"),
    ]


@pytest.mark.parametrize(("block_bytes", "split"), [(3900, False), (4000, True)])
def test_a_request_of_less_than_ten_milliseconds_is_not_split(
    block_bytes: int, split: bool
) -> None:
    # 128 blocks of 3,906 bytes take 10 ms at 50 MB/s.
    plan = Bed(relays=1).plan(block_bytes=block_bytes)
    if split:
        assert "10 ms is not split" not in plan.reason
    else:
        assert plan.runs == [PlannedRun(0, 64, 0), PlannedRun(64, 128, 1)]
        assert "10 ms is not split" in plan.reason


def test_own_bytes_count_at_once() -> None:
    bed = Bed(relays=1)
    bed.inflight.relays["d0"].sent(0.1, 64 * MIB)
    shares = bed.shares(bed.plan())
    # 192 MiB in all over two paths: 96 each, of which 64 are there. The direct path gets the
    # band's worth less, since nothing was known of this relay.
    assert shares["d0"] == pytest.approx(32, abs=1)


def test_bytes_of_others_count_and_our_own_are_not_counted_twice() -> None:
    bed = Bed(relays=1)
    bed.inflight.relays["d0"].sent(0.1, 32 * MIB)
    bed.tell("s0", 0.1, queues={"d0": 32 * MIB})
    bed.tell("s1", 0.1, queues={"d0": 32 * MIB})
    # The report's 64 MiB are our 32 and another 32.
    assert bed.shares(bed.plan())["d0"] == pytest.approx(32, abs=1)


def test_a_queue_that_the_relay_tells_counts_like_one_that_daemons_tell() -> None:
    bed = Bed(relays=1)
    bed.tell("d0", 0.1, relay_queued_bytes=64 * MIB)
    assert bed.shares(bed.plan())["d0"] == pytest.approx(32, abs=1)


def test_others_on_our_own_link_move_bytes_to_the_relay() -> None:
    bed = Bed(relays=1)
    bed.plan(now=0.0)  # a first request gets no more than half from a relay
    bed.tell("s0", 0.5, queues={"p0": 64 * MIB})
    bed.tell("d0", 0.5)
    assert bed.shares(bed.plan(now=0.5))["d0"] == pytest.approx(96, abs=4)


@pytest.mark.parametrize(("draws", "blocks"), [(DRAWS, 0), (EXPLORING, 64)])
def test_while_exploring_no_reported_queue_is_believed(
    draws: tuple[float, ...], blocks: int
) -> None:
    bed = Bed(relays=1)
    bed.tell("d0", 0.1, relay_queued_bytes=1 << 40)
    bed.tell("s0", 0.1, queues={"d0": 1 << 40})
    assert bed.shares(bed.plan(draws=draws)).get("d0", 0) == pytest.approx(blocks, abs=1)


@pytest.mark.parametrize("state", [NodeState.STARTING, NodeState.DRAINING])
def test_a_relay_that_is_not_ready_gets_nothing(state: NodeState) -> None:
    bed = Bed(relays=2)
    bed.tell("d0", state=state)
    assert set(bed.shares(bed.plan())) == {"", "d1"}


def test_a_relay_that_is_not_willing_gets_nothing_even_if_nothing_else_is_left() -> None:
    bed = Bed(relays=1)
    bed.tell("d0", willing=False)
    bed.inflight.daemons[0].up = bed.inflight.daemons[1].up = False
    plan = bed.plan()
    assert plan.runs == []
    assert plan.unreachable == [Span(0, 64, 0), Span(64, 128, 1)]
    assert plan.estimate_s == math.inf


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_breaker_ramps_a_relay_in(share: float) -> None:
    bed = Bed(relays=1)
    bed.inflight.relays["d0"].share = share
    assert bed.shares(bed.plan()).get("d0", 0) == pytest.approx(128 * share / (1 + share), abs=1)


def test_a_relay_that_brings_nothing_for_a_second_gets_nothing_new() -> None:
    bed = Bed(relays=2)
    bed.inflight.relays["d0"].sent(0.0, MIB)
    for name in ("s0", "s1", "d0", "d1"):
        bed.tell(name, 1.0)
    assert set(bed.shares(bed.plan(now=1.0))) == {"", "d1"}


def test_an_old_report_makes_a_relay_look_worse_and_a_stale_one_rules_it_out() -> None:
    shares = []
    for now in (0.39, 0.9, 1.01):
        bed = Bed(relays=1)
        bed.tell("s0", now)
        bed.tell("s1", now)
        shares.append(bed.shares(bed.plan(now=now)).get("d0", 0))
    assert shares[0] == pytest.approx(64, abs=1)
    # Half a second of 50 MB/s, evenly shared.
    assert shares[1] == pytest.approx(64 - 12, abs=1)
    assert shares[2] == 0


@pytest.mark.parametrize("reported", ["stale", "never", "degraded"])
def test_behind_all_others_is_better_than_nothing(reported: str) -> None:
    bed = Bed(relays=0 if reported == "never" else 1)
    bed.inflight.add_relay("d0")
    now = 5.0 if reported == "stale" else 0.1
    if reported == "degraded":
        bed.tell("d0", state=NodeState.DEGRADED)
    assert set(bed.shares(bed.plan(now=now))) == {""}
    bed.inflight.daemons[1].up = False
    plan = bed.plan(now=now)
    assert plan.runs[-1] == PlannedRun(64, 128, 1, "d0")
    assert not plan.unreachable
    assert "64 blocks lie on daemons that are down here" in plan.reason


def test_blocks_of_a_daemon_that_is_down_go_by_relays_and_the_others_make_up_for_it() -> None:
    bed = Bed(relays=1)
    bed.inflight.daemons[0].up = False
    plan = bed.plan(blocks=100)
    assert bed.shares(plan) == {"": 50, "d0": 50}
    assert all(run.relay for run in plan.runs if run.daemon == 0)


@pytest.mark.parametrize("policy", [Policy.ROUND_ROBIN, Policy.SHORTEST_QUEUE, Policy.BALANCED])
def test_without_a_relay_everything_goes_direct(policy: Policy) -> None:
    bed = Bed(policy, relays=0)
    for _ in range(2):
        assert bed.plan().runs == [PlannedRun(0, 64, 0), PlannedRun(64, 128, 1)]


def test_direct_never_uses_a_relay() -> None:
    bed = Bed(Policy.DIRECT)
    bed.tell("s0", queues={"p0": 1 << 30})
    assert set(bed.shares(bed.plan())) == {""}
    bed.inflight.daemons[0].up = False
    assert bed.plan().unreachable == [Span(0, 64, 0)]


def test_round_robin_takes_turns_with_the_decode_node() -> None:
    bed = Bed(Policy.ROUND_ROBIN)
    turns = [bed.shares(bed.plan(decode_node="d2")) for _ in range(4)]
    assert turns == [{"": 128}, {"d2": 128}] * 2


def test_round_robin_takes_turns_with_all_relays_when_the_decode_node_is_not_known() -> None:
    bed = Bed(Policy.ROUND_ROBIN)
    turns = [next(iter(bed.shares(bed.plan(decode_node="")))) for _ in range(10)]
    assert turns == ["", "d0", "d1", "d2", "d3"] * 2


@pytest.mark.parametrize(
    ("here", "there", "side"), [(5, 6, ""), (6, 5, "d0"), (5, 5, ""), (0, 0, "")]
)
def test_shortest_queue_sends_all_to_the_side_with_the_shorter_one(
    here: int, there: int, side: str
) -> None:
    bed = Bed(Policy.SHORTEST_QUEUE)
    bed.tell("s0", queues={"p0": here * MIB})
    bed.tell("s1", queues={"d0": there * MIB})
    plan = bed.plan()
    assert bed.shares(plan) == {side: 128}
    assert f"{here}.0 MiB wait for this node, {there}.0 MiB for d0" in plan.reason


def test_a_claimed_rate_counts_until_a_relay_has_shown_its_own() -> None:
    bed = Bed(relays=1)
    meter = bed.inflight.relays["d0"]
    meter.observed_Bps = 0.0
    slow = LinkLoad(name=STORAGE_LINK, capacity_Bps=int(NIC_BPS / 3))
    fast = LinkLoad(name="tcp://0.0.0.0:7460", capacity_Bps=int(NIC_BPS * 8))
    local = LinkLoad(name="unix:///run/kvagent", capacity_Bps=1, queued_bytes=1 << 40)
    bed.tell("d0", links=(slow, fast, local))
    assert bed.shares(bed.plan())["d0"] == pytest.approx(32, abs=1)
    meter.observed_Bps, meter.observed_at = NIC_BPS, 0.1
    assert bed.shares(bed.plan(now=0.9)).get("d0", 0) > 40


def test_no_claim_makes_a_relay_faster_than_our_own_link() -> None:
    bed = Bed(relays=1)
    bed.inflight.relays["d0"].observed_Bps = 0.0
    bed.tell("d0", links=(LinkLoad(name=STORAGE_LINK, capacity_Bps=int(NIC_BPS * 100)),))
    assert bed.shares(bed.plan())["d0"] == pytest.approx(64, abs=1)


def test_an_estimate_begins_nothing() -> None:
    bed = Bed()
    request = Request([Span(0, 128, 0)], MIB, "d0")
    first = bed.selector.estimate_s(request, bed.reports, bed.inflight, 0.1, DRAWS)
    again = bed.selector.estimate_s(request, bed.reports, bed.inflight, 0.1, DRAWS)
    assert first == again == bed.plan(now=0.1).estimate_s
    assert bed.selector.estimate_s(Request([], MIB), bed.reports, bed.inflight, 0.1, DRAWS) == 0.0


def test_nothing_asked_nothing_planned() -> None:
    plan = Bed().plan(blocks=0)
    assert plan.runs == plan.unreachable == []
    assert plan.estimate_s == 0.0


def test_the_reason_has_the_numbers() -> None:
    bed = Bed(relays=1)
    bed.inflight.direct.sent(0.1, 32 * MIB)
    reason = bed.plan().reason
    assert reason.startswith("balanced: 64 by direct (64.0 MiB behind 32.0 MiB at 50 MB/s, ")
    assert "64 by d0 (64.0 MiB behind 0.0 MiB at 50 MB/s, " in reason
    assert reason.endswith("direct alone 3355.4 ms")


def test_what_no_path_takes_is_unreachable() -> None:
    runs, unreachable = lay_out([Span(0, 4, 0), Span(4, 8, 1)], [True, False], 3, [("r", 2)])
    assert runs == [PlannedRun(0, 3, 0), PlannedRun(3, 4, 0, "r"), PlannedRun(4, 5, 1, "r")]
    assert unreachable == [Span(5, 8, 1)]
