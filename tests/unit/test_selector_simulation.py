"""Policies against links that do what the test says, in made-up time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kvstore.loadreport import LoadReport
from kvstore_client.selector import Policy
from tests.support.fluid import MIB, Fluid, Rates, Report, honest

STORAGE_BPS = 50e6  # 400 Mbit/s
COMPUTE_BPS = 400e6  # 3200 Mbit/s


def shaped(active: set[str]) -> Mapping[str, float]:
    """Each node has a storage link of its own; what relays send on shares one compute link."""
    relays = [path for path in active if path]
    share = min(STORAGE_BPS, COMPUTE_BPS / max(1, len(relays)))
    return {path: share if path else STORAGE_BPS for path in active}


def one_host(active: set[str]) -> Mapping[str, float]:
    """All on the same processors, which a relayed byte passes three times."""
    return {path: 1e9 / len(active) / (3 if path else 1) for path in active}


def daemon_bound(active: set[str]) -> Mapping[str, float]:
    """The daemon's link is the limit whichever way its bytes go."""
    return dict.fromkeys(active, STORAGE_BPS / len(active))


def alone(policy: Policy, count: int = 1) -> list[float]:
    """Seconds of single fetches of 64 MiB, idle 1P1D."""
    fluid = Fluid(policy, shaped)
    for _ in range(count):
        fluid.begin(64 * MIB)
        fluid.drain()
    return [finished.elapsed_s for finished in fluid.finished]


def test_a_single_fetch_takes_half_the_time_of_direct() -> None:
    (direct,) = alone(Policy.DIRECT)
    assert direct == pytest.approx(64 * MIB / STORAGE_BPS)
    # The first, of which nothing is known, and in the long run.
    fetches = alone(Policy.BALANCED, 20)
    assert fetches[0] <= 0.56 * direct
    assert sorted(fetches)[10] <= 0.51 * direct
    # Trials of direct: the price of knowing that it is so.
    assert sum(elapsed_s > 0.56 * direct for elapsed_s in fetches) <= 2
    for whole_requests in (Policy.ROUND_ROBIN, Policy.SHORTEST_QUEUE):
        assert alone(whole_requests) == [pytest.approx(direct)]


@pytest.mark.parametrize("size", [4 * MIB, 16 * MIB, 64 * MIB])
@pytest.mark.parametrize("depth", [1, 4])
def test_a_stream_of_fetches_uses_both_links(size: int, depth: int) -> None:
    fluid = Fluid(Policy.BALANCED, shaped)
    fluid.run(lambda: fluid.now >= 30, size, depth)
    assert sum(fluid.carried.values()) / fluid.now >= 0.9 * 2 * STORAGE_BPS


@pytest.mark.parametrize("rates", [one_host, daemon_bound])
@pytest.mark.parametrize("size", [8 * MIB, 16 * MIB, 64 * MIB])
@pytest.mark.parametrize("depth", [1, 4])
def test_where_a_second_path_only_costs_it_is_given_up(rates: Rates, size: int, depth: int) -> None:
    fluid = Fluid(Policy.BALANCED, rates, block_bytes=MIB)
    best_Bps = rates({""})[""]
    # A trial of direct begins when what relays have is through.
    warm_s = 2 + 2 * depth * size / best_Bps
    fluid.run(lambda: fluid.now >= warm_s, size, depth)
    warm, began_at = dict(fluid.carried), fluid.now
    fluid.run(lambda: fluid.now >= warm_s + 20, size, depth)
    carried = {path: fluid.carried[path] - warm[path] for path in warm}
    assert carried["d0"] <= 0.05 * sum(carried.values())
    assert sum(carried.values()) / (fluid.now - began_at) >= 0.95 * best_Bps


def test_a_relay_at_a_hundredth_of_its_rate_is_left_alone_and_found_again() -> None:
    rate = {"d0": STORAGE_BPS}
    fluid = Fluid(Policy.BALANCED, lambda active: {"": STORAGE_BPS, "d0": rate["d0"]})
    fluid.run(lambda: fluid.now >= 5, 16 * MIB)
    rate["d0"] = STORAGE_BPS / 100
    fluid.run(lambda: fluid.now >= 60, 16 * MIB)
    sick, began_at, count = dict(fluid.carried), fluid.now, len(fluid.finished)
    fluid.run(lambda: fluid.now >= began_at + 60, 16 * MIB)
    assert fluid.carried["d0"] - sick["d0"] <= 0.05 * (fluid.carried[""] - sick[""])
    assert count < len(fluid.finished)
    rate["d0"] = STORAGE_BPS
    began_at = fluid.now
    fluid.run(lambda: fluid.now >= began_at + 30, 16 * MIB)
    well, began_at = dict(fluid.carried), fluid.now
    fluid.run(lambda: fluid.now >= began_at + 10, 16 * MIB)
    moved = sum(fluid.carried.values()) - sum(well.values())
    assert moved / (fluid.now - began_at) >= 0.85 * 2 * STORAGE_BPS


def liar(factor: float) -> Report:
    def report(node_id: str, seq: int, queued_bytes: int) -> LoadReport | None:
        return honest(node_id, seq, round((queued_bytes or MIB) * factor))

    return report


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("lies 100 times more", liar(100.0)),
        ("lies a hundredth", liar(0.01)),
        ("frozen", lambda node_id, seq, queued_bytes: honest(node_id, 1)),
        ("absent", lambda node_id, seq, queued_bytes: None),
        ("numbered from the future", lambda node, seq, queued: honest(node, (1 << 62) - seq)),
    ],
)
def test_whatever_reports_say_it_is_no_worse_than_direct(name: str, report: Report) -> None:
    fluid = Fluid(Policy.BALANCED, shaped)
    fluid.report = report
    fluid.run(lambda: fluid.now >= 20, 16 * MIB, depth=2)
    assert sum(fluid.carried.values()) / fluid.now >= 0.98 * STORAGE_BPS


def test_relays_are_used_evenly() -> None:
    names = tuple(f"d{number}" for number in range(16))
    fluid = Fluid(Policy.BALANCED, shaped, names, block_bytes=MIB)
    # The decode node of all requests is d0; the others are drawn.
    fluid.run(lambda: len(fluid.finished) >= 400, 64 * MIB)
    drawn = [fluid.carried[name] for name in names[1:]]
    assert min(drawn) > 0
    assert max(drawn) <= 2 * sum(drawn) / len(drawn)


def test_estimates_come_true_on_idle_links() -> None:
    fluid = Fluid(Policy.BALANCED, shaped)
    for _ in range(10):
        fluid.begin(64 * MIB)
        fluid.drain()
    for finished in fluid.finished[1:]:
        assert finished.plan.estimate_s == pytest.approx(finished.elapsed_s, rel=0.05)
