"""The measurement of the two paths: loads in nodes, and what is computed from them."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_bench.shaped import MBIT, STORAGE, Link, ShapingUnavailable, demo, network
from kvstore_bench.shaped.bed import MIB, Bed, BedPlan, Sample, bed
from kvstore_bench.shaped.demo import COMPARING
from kvstore_bench.shaped.figures import Figure, table
from kvstore_bench.shaped.traffic import Reading, rates
from kvstore_bench.shaped.worker import prefix_keys
from tests.support.orphans import TIMEOUT_S
from tests.support.shaped import require_shaping

COMMAND = [sys.executable, "-m", "kvstore_bench.two_paths"]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_load_tells_what_its_link_carried() -> None:
    require_shaping()
    rate_Bps = 400 * MBIT
    plan = BedPlan(4 * MIB, 2, False, rate_Bps, rate_Bps, queue_s=0.01)
    async with bed(plan) as on:
        found = await on.load("direct", count=3, check=True)
        assert found.done.bytes == 3 * plan.request_bytes
        assert len(found.done.elapsed_s) == 3
        assert found.prefill_bytes >= found.done.bytes
        # Nothing but what asks all nodes of a network for an address.
        assert found.decode_bytes + found.compute_bytes < 1000
        assert found.relay_share == 0
        # Fetches side by side end together; that must not make a link look faster than it is.
        stream = await on.load("direct", warm_s=0.25, seconds=1)
    assert 0 < stream.rate_Bps <= 1.01 * rate_Bps


def both_paths() -> BedPlan:
    """Slow enough that no processor is the limit, also on a machine that is busy."""
    rate_Bps = 200 * MBIT
    return BedPlan(16 * MIB, 1, True, rate_Bps, 8 * rate_Bps, queue_s=0.01, prefix_count=8)


@pytest.mark.slow
@pytest.mark.asyncio
async def test_balanced_fetches_use_both_storage_links_alike() -> None:
    require_shaping()
    plan = both_paths()
    split: list[Sample] = []
    async with bed(plan) as on:
        for _ in range(3):
            await on.load("balanced", count=1, check=True)
        for _ in range(12):
            # Every byte is compared: a load with a wrong one fails.
            found = await on.load("balanced", count=1, check=True)
            assert found.done.bytes == plan.request_bytes
            # Now and then one goes directly, to see what splitting brings.
            if COMPARING not in found.done.plans[0]:
                split.append(found)
            if len(split) == 5:
                break
    assert len(split) == 5, "most fetches shall be split"
    # The median, because a moment in which this machine has no time for one of them moves runs
    # to the other.
    share = statistics.median(one.decode_bytes / one.prefill_bytes for one in split)
    assert 0.8 <= share <= 1.25, [(one.decode_bytes, one.prefill_bytes) for one in split]
    for one in split:
        # What was relayed was read from storage, not from the agent's memory.
        assert one.prefill_bytes + one.decode_bytes >= plan.request_bytes
        assert one.compute_bytes <= 1.05 * one.decode_bytes + MIB


async def relaying(on: Bed, link: Link) -> asyncio.Task[Sample]:
    """A fetch of which the relay has some MiB, and not all; the first fetch that is split."""
    for _ in range(4):
        before = link.counters().received_bytes
        fetching = asyncio.create_task(on.load("balanced", count=1, check=True))
        while not fetching.done() and link.counters().received_bytes < before + 2 * MIB:
            await asyncio.wait((fetching,), timeout=0.01)
        if not fetching.done():
            return fetching
        await fetching
    pytest.fail("no fetch was split")


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_relay_that_loses_its_storage_link_costs_no_answer() -> None:
    require_shaping()
    plan = both_paths()
    async with bed(plan) as on:
        for _ in range(3):
            await on.load("balanced", count=1)
        link = on.decode.links[STORAGE]
        fetching = await relaying(on, link)
        link.cut()
        at_cut = link.counters().received_bytes
        found = await fetching
        assert found.done.bytes == plan.request_bytes
        assert link.counters().received_bytes == at_cut
        # What the relay did not bring came directly.
        assert found.prefill_bytes > plan.request_bytes / 2
        again = await on.load("balanced", count=1, check=True)
        assert again.done.bytes == plan.request_bytes
        assert link.counters().received_bytes == at_cut


@pytest.mark.slow
def test_the_demo_shows_what_each_nic_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_shaping()
    monkeypatch.setattr(demo, "FETCH_BYTES", 8 * MIB)
    monkeypatch.setattr(demo, "FETCHES", 2)
    picture = tmp_path / "two.png"
    assert demo.main(["--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    (direct,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["direct"])
    _, _, lowest, highest, beside, prefill, decode, compute = direct
    assert float(lowest) <= float(highest)
    assert beside == "1.00"
    assert 16 <= float(prefill) <= 17
    assert (decode, compute) == ("0.0", "0.0")
    assert any(line.split()[:1] == ["balanced"] for line in out.splitlines())


@pytest.mark.slow
def test_without_shaped_links_the_demo_says_why_and_shows_both_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ShapingUnavailable("no network namespace:\n not permitted")

    monkeypatch.setattr(network, "first_namespace", refuse)
    monkeypatch.setattr(demo, "LOOPBACK_FETCH_BYTES", 2 * MIB)
    picture = tmp_path / "two.png"
    assert demo.main(["--plot", str(picture)]) == 0
    assert not picture.exists()
    out = capsys.readouterr().out
    assert "no shaped links, so no picture: no network namespace: not permitted\n" in out
    carried = dict(line.split() for line in out.splitlines()[-2:])
    assert sorted(carried) == ["direct", "relay"]
    assert sum(map(float, carried.values())) == 16
    assert min(map(float, carried.values())) > 0


def test_the_demo_refuses_a_picture_that_cannot_be(tmp_path: Path) -> None:
    assert demo.main(["--plot", str(tmp_path / "no" / "two.png")]) == 2
    assert demo.main(["--plot", str(tmp_path / "two.txt")]) == 2


def test_rates_are_those_between_two_readings() -> None:
    readings = [Reading(10.0, (0, 5)), Reading(12.0, (8, 5)), Reading(12.0, (8, 5))]
    readings.append(Reading(13.0, (9, 7)))
    first, second = rates(readings, 0, 10.0), rates(readings, 1, 10.0)
    assert (first.edges, first.values_Bps) == ([0.0, 2.0, 3.0], [4.0, 1.0])
    assert second.values_Bps == [0.0, 2.0]
    assert rates(readings[:1], 0, 10.0).values_Bps == []


@pytest.mark.slow
def test_the_command_writes_every_figure() -> None:
    require_shaping()
    done = subprocess.run(
        [*COMMAND, "--only", "reports", "--seconds", "0.5", "--json", "-"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["format"], document["version"]) == ("kvbench-two-paths", 1)
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert figures["age, busy: p99"]["at_most"] == 30
    assert figures["age, busy: p99"]["value"] > 0
    assert figures["reports that did not, busy"]["value"] == 0
    assert all(name in done.stderr for name in figures)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--trials", "0"), ("--seconds", "0"), ("--queue-ms", "0"), ("--storage-nic", "0")],
)
def test_wrong_options_are_named(option: str, value: str) -> None:
    done = subprocess.run(
        [*COMMAND, option, value],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2
    assert option in done.stderr


def test_figures_compare_with_their_targets() -> None:
    most = Figure("m", "time", "ms", [3.0, 1.0, 2.0], at_most=2.0)
    least = Figure("m", "rate", "ratio", [0.8], at_least=0.9)
    assert (most.value, most.met, most.target) == (2.0, True, "<= 2")
    assert (least.met, least.target) == (False, ">= 0.9")
    chosen = Figure("m", "p99", "ms", [1.0, 9.0], value=9.0)
    assert (chosen.value, chosen.met, chosen.target) == (9.0, None, "")
    assert not math.isnan(Figure("m", "count", "", [4.0]).value)
    head, first, second = table([most, least])
    assert head.split() == ["median", "lowest", "highest", "target"]
    assert first.split() == ["m", "time", "2.000", "1.000", "3.000", "ms", "<=", "2", "met"]
    assert second.split() == ["rate", "0.800", "ratio", ">=", "0.9", "missed"]


def test_prefixes_share_no_block() -> None:
    keys = [key for prefix in range(20) for key in prefix_keys(prefix, 20)]
    # The first eight bytes make the content of a block.
    assert len({key[:8] for key in keys}) == len(keys)
