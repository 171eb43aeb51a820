"""The measurement of the two paths: loads in nodes, and what is computed from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from kvstore_bench.shaped import MBIT
from kvstore_bench.shaped.bed import MIB, BedPlan, bed
from kvstore_bench.shaped.figures import Figure, table
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
    assert 0.8 * rate_Bps <= stream.rate_Bps <= 1.01 * rate_Bps


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
