"""What `kvbench emulate` is told: defaults, and what is refused by its name."""

from __future__ import annotations

import argparse

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.emulate.options import Options, add_options, make_options
from kvstore_bench.generate import generate

MBIT = 125_000


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few sessions."""
    path = tmp_path_factory.mktemp("trace") / "sessions.json"
    generate(path, "32k", 3, 1)
    return str(path)


def options(trace: str, *words: str) -> Options:
    """The options that these words make."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return make_options(parser.parse_args([trace, *words]))


def test_defaults(trace: str) -> None:
    found = options(trace)
    assert found.policies == ("direct", "shortest_queue", "balanced", "oracle")
    assert (found.shape.prefill, found.shape.decode, found.shape.storage) == (1, 1, 1)
    assert found.shape.storage_nic_Bps == 400 * MBIT
    assert found.shape.compute_nic_Bps == 3200 * MBIT
    assert found.links.names == ["prefill0", "decode0"]
    assert found.links.rate_Bps == 800 * MBIT
    assert found.groups == found.work.scale.layers == 8
    assert found.compute.overlap


def test_gpus_take_shares_of_the_time_of_direct_loads(trace: str) -> None:
    found = options(trace, "--prefill", "2", "--prefill-share", "0.5", "--decode-share=0.25")
    load_s = found.work.hit_bytes / (2 * 400 * MBIT)
    prefill_s = sum(map(found.compute.prefill_s, found.work.turns))
    assert prefill_s == pytest.approx(0.5 * load_s)
    decode_s = sum(sum(found.compute.answer_s(turn)) for turn in found.work.turns)
    assert decode_s == pytest.approx(0.25 * load_s)


def test_gpus_take_what_is_said(trace: str) -> None:
    words = ("--prefill-token-us=7", "--attention-ns=2", "--decode-token-us=3", "--no-overlap")
    compute = options(trace, *words).compute
    assert (compute.token_s, compute.attention_s, compute.decode_s) == (7e-6, 2e-9, 3e-6)
    assert not compute.overlap


def test_links_may_differ(trace: str) -> None:
    found = options(trace, "--nic", "decode0.storage=100Mbit/s", "--nic=prefill0.compute=1Gbit/s")
    rates = {plan.name: plan.rates_Bps for plan in found.shape.plans()}
    assert rates["decode0"] == {"storage": 100 * MBIT, "compute": 3200 * MBIT}
    assert rates["prefill0"] == {"storage": 400 * MBIT, "compute": 1000 * MBIT}
    assert found.links.rate_Bps == 500 * MBIT


def test_sessions_are_generated_where_none_are_given() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    found = make_options(parser.parse_args(["--sessions=2", "--turns=3", "--seed=5"]))
    assert [len(turns) for turns in found.work.sessions] == [3, 3]


def test_deadline_is_far_beyond_what_all_of_it_takes(trace: str) -> None:
    found = options(trace, "--storage-nic=10Mbit/s", "--token-scale=64")
    at_once_s = len(found.work.sessions) * found.work.longest_bytes / (10 * MBIT)
    assert found.deadline_s >= min(600, 10 * at_once_s)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefill=0"], "--prefill=0: must be at least 1"),
        (["--decode=-1"], "--decode=-1"),
        (["--token-scale=0"], "--token-scale=0"),
        (["--groups=3"], "--groups=3: must divide --layers, 8"),
        (["--storage-nic=fast"], "--storage-nic=fast"),
        (["--storage-nic=1bit/s"], "--storage-nic="),
        (["--nic=decode0=1Mbit/s"], "--nic=decode0=1Mbit/s: is NODE.NETWORK=RATE"),
        (["--nic=decode7.storage=1Mbit/s"], "there are decode0.compute, decode0.storage"),
        (["--nic=decode0.storage=x"], "--nic=x"),
        (["--policies=direct,best"], "--policies=best: is none of direct, round_robin"),
        (["--policies=,"], "--policies=,: names none of"),
        (["--prefill-share=-1"], "--prefill-share=-1"),
        (["--decode-share=nan"], "--decode-share=nan"),
        (["--arrival-rate=inf"], "--arrival-rate=inf"),
        (["--storage-nic=0"], "--storage-nic=0: takes no time to load by"),
        (["--ttft-limit=soon"], "--ttft-limit=soon: is a number of seconds above 0"),
        (["--ttft-limit=0x"], "--ttft-limit=0x"),
        (["--ttft-limit=2x", "--trials=3"], "--trials=3: cannot be given with --ttft-limit"),
        (["--ttft-limit=2", "--arrival-rate=1"], "--arrival-rate=1.0: cannot be given"),
        (["--prefill=300"], "nodes in all: at most 250"),
    ],
)
def test_what_cannot_be_is_named(trace: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        options(trace, *words)
    assert message in str(raised.value)
