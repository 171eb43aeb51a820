"""`kvbench simulate`: the stream of requests, the policies, the optimum, and the command."""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.__main__ import main
from kvstore_bench.simulate.command import parse_capacities, parse_policies
from kvstore_bench.simulate.optimum import run_optimum
from kvstore_bench.simulate.policies import CHOICES, OPTIMUM, Lru, S3Fifo
from kvstore_bench.simulate.simulation import Tally, leading_hits, run_policy
from kvstore_bench.simulate.workload import (
    PAGE_BYTES,
    Workload,
    make_workload,
    next_uses,
)
from kvstore_bench.trace import Request, Session, Trace

ONLINE = sorted(set(CHOICES) - {OPTIMUM})


def session(name: str, *requests: tuple[float, Sequence[int]], scope: str = "") -> Session:
    return Session(
        name,
        scope or name,
        tuple(Request(at_s, 64 * len(ids), 1, tuple(ids)) for at_s, ids in requests),
    )


def workload(*requests: Sequence[int], sizes: Sequence[int] = ()) -> Workload:
    """Requests of numbered blocks, of one page each unless `sizes` says more."""
    count = max((block for blocks in requests for block in blocks), default=-1) + 1
    return Workload(
        traces=("trace",),
        session_count=1,
        requests=tuple(array("I", blocks) for blocks in requests),
        sizes=array("Q", sizes or [PAGE_BYTES] * count),
        digests=array("Q", [block * 0x9E3779B97F4A7C15 % 2**64 for block in range(count)]),
    )


def quiet(number: int) -> None:
    """Progress that nobody watches."""


def play(name: str, work: Workload, pages: int) -> Tally:
    if name == OPTIMUM:
        uses = next_uses(work.requests, work.distinct_count)
        return run_optimum(work, uses, pages * PAGE_BYTES, quiet)
    choice = CHOICES[name]
    policy = choice.policy(pages * PAGE_BYTES)
    return run_policy(work, policy, pages * PAGE_BYTES, choice.tail_first, quiet)


def random_workload(seed: int, requests: int = 60) -> Workload:
    """Chains with common beginnings, as sessions have them: six, of up to eight blocks."""
    draws = random.Random(seed)
    starts = [8 * draws.randrange(6) for _ in range(requests)]
    chains = [range(start, start + draws.randrange(1, 9)) for start in starts]
    return workload(range(48), *chains)


# --- the stream of requests ----------------------------------------------------------------------


def test_sessions_recorded_one_by_one_start_one_after_the_other() -> None:
    traces = [
        Trace("one", 64, (session("a", (0.0, [1]), (100.0, [1, 2])),)),
        Trace("two", 64, (session("b", (0.0, [1]), (30.0, [1, 2, 3])),)),
    ]
    merged = make_workload(traces, bytes_per_token=64, stagger_s=60.0)
    # a at 0 and 100, b at 60 and 90; equal hash ids of other scopes are other blocks.
    assert [list(blocks) for blocks in merged.requests] == [[0], [2], [2, 3, 4], [0, 1]]
    assert merged.distinct_count == 5
    assert merged.block_count == 7
    assert merged.hit_rate_max == 2 / 7


def test_what_a_file_put_on_one_clock_keeps_its_times() -> None:
    sessions = (
        session("chat/1", (0.0, [1]), (100.0, [1, 2]), scope="chat"),
        session("chat/2", (5.0, [1, 9]), scope="chat"),
    )
    merged = make_workload([Trace("chat", 64, sessions)], bytes_per_token=64, stagger_s=60.0)
    assert [list(blocks) for blocks in merged.requests] == [[0], [0, 2], [0, 1]]


def test_blocks_take_whole_pages() -> None:
    traces = [Trace("one", 64, (session("a", (0.0, [1])),))]
    assert list(make_workload(traces, bytes_per_token=64, stagger_s=0).sizes) == [4096]
    assert list(make_workload(traces, bytes_per_token=65, stagger_s=0).sizes) == [8192]


def test_a_trace_can_be_cut() -> None:
    traces = [
        Trace("one", 64, (session("a", (0.0, [1]), (1.0, [1, 2])), session("b", (0.0, [1])))),
    ]
    cut = make_workload(traces, bytes_per_token=64, stagger_s=0, session_limit=1, turn_limit=1)
    assert [list(blocks) for blocks in cut.requests] == [[0]]
    assert cut.session_count == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bytes_per_token": 0}, "--bytes-per-token"),
        ({"bytes_per_token": 1 << 30}, "--bytes-per-token"),
        ({"stagger_s": -1.0}, "--stagger"),
        ({"stagger_s": float("nan")}, "--stagger"),
        ({"session_limit": 0}, "--sessions"),
        ({"turn_limit": 0}, "--turns"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], named: str) -> None:
    traces = [Trace("one", 64, (session("a", (0.0, [1])),))]
    given = {"bytes_per_token": 64, "stagger_s": 60.0, **options}
    with pytest.raises(ConfigError, match=named):
        make_workload(traces, **given)


def test_the_next_use_of_a_block() -> None:
    work = workload([0, 1], [1], [2, 0], [1])
    uses = next_uses(work.requests, work.distinct_count)
    assert [list(row) for row in uses] == [[2, 1], [3], [4, 4], [4]]


# --- hits ----------------------------------------------------------------------------------------


def test_the_run_of_hits_that_a_request_begins_with() -> None:
    assert leading_hits([]) == 0
    assert leading_hits([False, True]) == 0
    assert leading_hits([True, True, False, True]) == 2
    assert leading_hits([True, True]) == 2


@pytest.mark.parametrize("name", [*ONLINE, OPTIMUM])
def test_a_cache_that_holds_all_misses_only_once(name: str) -> None:
    work = random_workload(3)
    tally = play(name, work, work.distinct_count)
    assert tally.block_hit_rate == tally.prefix_hit_rate == work.hit_rate_max
    assert tally.evictions == 0


def test_a_hit_behind_a_gap_is_no_prefix_hit() -> None:
    # Head first, the head of 0..2 is least recently used when 3 comes.
    tally = play("lru", workload([0, 1, 2], [3], [0, 1, 2]), 3)
    assert (tally.block_hits, tally.prefix_hits) == (2, 0)


def test_with_the_tail_first_the_same_hits_are_of_use() -> None:
    tally = play("lru-tail", workload([0, 1, 2], [3], [0, 1, 2]), 3)
    assert (tally.block_hits, tally.prefix_hits) == (2, 2)


def test_larger_blocks_take_more_room() -> None:
    work = workload([0], [1], [2], [0], sizes=[PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES])
    assert play("fifo", work, 4).block_hits == 0
    assert play("fifo", work, 4).evictions == 2
    assert play("fifo", work, 5).block_hits == 1


@pytest.mark.parametrize("name", ["guarded", "s3fifo"])
def test_policies_that_resist_a_scan(name: str) -> None:
    hot = [list(range(10))] * 3
    scan = [[number] for number in range(100, 1000)]
    work = workload(*hot, *scan, hot[0])
    # The hot set is hit twice before the scan, and once after it.
    assert play(name, work, 30).block_hits == 30


@pytest.mark.parametrize("name", ["lru", "lru-tail", "fifo"])
def test_policies_that_do_not(name: str) -> None:
    hot = [list(range(10))] * 3
    scan = [[number] for number in range(100, 1000)]
    assert play(name, workload(*hot, *scan, hot[0]), 30).block_hits == 20


def test_s3fifo_brings_ghosts_back_to_the_main_queue() -> None:
    policy = S3Fifo(10 * PAGE_BYTES, itertools.count())
    for slot in range(10):
        policy.insert(slot, PAGE_BYTES, slot)
    assert policy.evict(lambda slot: True) == 0
    policy.insert(10, PAGE_BYTES, 0)  # the digest of the one that went
    policy.insert(11, PAGE_BYTES, 11)
    assert [policy.evict(lambda slot: True) for _ in range(11)] == [*range(1, 10), 11, 10]


@pytest.mark.parametrize("make", [Lru, S3Fifo])
def test_policies_stand_behind_the_seam_of_the_store(make: type[Lru] | type[S3Fifo]) -> None:
    policy = make(10 * PAGE_BYTES, itertools.count())
    policy.resize(20 * PAGE_BYTES)
    for slot in range(5):
        policy.insert(slot, PAGE_BYTES, slot)
    policy.touch(3)
    policy.remove(1)
    assert policy.next_tick() == 0
    assert policy.evict(lambda slot: slot == 3) == 3
    assert policy.evict(lambda slot: False) is None
    assert len(policy) == 3
    assert {policy.evict(lambda slot: True) for _ in range(3)} == {0, 2, 4}
    assert policy.evict(lambda slot: True) is None


# --- the optimum ---------------------------------------------------------------------------------


def most_hits(work: Workload, capacity: int) -> int:
    """By trying everything: the most block hits with so many blocks of one size."""

    @cache
    def best(number: int, held: frozenset[int]) -> int:
        if number == len(work.requests):
            return 0
        asked = frozenset(work.requests[number])
        pool = held | asked
        choices = itertools.combinations(sorted(pool), min(capacity, len(pool)))
        rest = max(best(number + 1, frozenset(kept)) for kept in choices)
        return len(asked & held) + rest

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_what_trying_everything_finds(seed: int) -> None:
    draws = random.Random(seed)
    work = workload(*([draws.randrange(5)] for _ in range(9)), [draws.randrange(5)], [4])
    assert play(OPTIMUM, work, 2).block_hits == most_hits(work, 2)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("seed", range(3))
def test_no_policy_beats_the_optimum(name: str, seed: int) -> None:
    work = random_workload(seed)
    for pages in (8, 16, 24):
        assert play(name, work, pages).block_hits <= play(OPTIMUM, work, pages).block_hits


def test_the_optimum_drops_the_deeper_of_two_blocks_with_equal_use() -> None:
    tally = play(OPTIMUM, workload([0, 1, 2], [0, 1, 2]), 2)
    assert (tally.block_hits, tally.prefix_hits) == (2, 2)


def test_the_heap_of_the_optimum_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    work = random_workload(5, requests=200)
    expected = play(OPTIMUM, work, 12)
    monkeypatch.setattr("kvstore_bench.simulate.optimum.STALE_ENTRIES_MAX", 0)
    assert play(OPTIMUM, work, 12) == expected


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [
        {"timestamp": 1000 * n, "input_length": 1536, "output_length": 1, "hash_ids": [0, n, n + 9]}
        for n in (1, 2, 1, 3, 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*words: object) -> int:
    return main(["simulate", *map(str, words)])


def test_it_prints_a_table_of_each_hit_rate(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trace, "--capacity", "0.5,1", "--policies", "lru,optimum") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 trace, 3 sessions, 5 requests, 15 blocks")
    assert "7 distinct blocks" in lines[1]
    assert lines[3].split() == ["prefix", "hits,", "%", "size", "lru", "optimum"]
    assert lines[5].split() == ["1", "224KiB", "53.3", "53.3"]
    assert lines[7].split()[0] == "block"


def test_it_writes_its_figures(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    assert command(trace, "--capacity", "128KiB", "--json", target) == 0
    written = json.loads(target.read_text())
    assert (written["format"], written["version"]) == ("kvbench-simulate", 1)
    assert written["workload"]["distinct_bytes"] == 7 * 512 * 64
    assert [row["policy"] for row in written["results"]] == list(CHOICES)
    assert {row["capacity_bytes"] for row in written["results"]} == {128 * 1024}
    capsys.readouterr()
    assert command(trace, "--capacity", "128KiB", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "lru,best"], "--policies"),
        (["--policies", ","], "--policies"),
        (["--capacity", "1KiB"], "a block has"),
        (["--capacity", "a lot"], "--capacity"),
        (["--capacity", ""], "--capacity"),
        (["--bytes-per-token", "many"], "--bytes-per-token"),
    ],
)
def test_a_wrong_option_is_named(
    trace: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trace, *words) == 2
    assert message in capsys.readouterr().err


def test_a_missing_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path / "none.json") == 2
    assert "none.json" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_an_error(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trace, "--capacity=1", "--json", tmp_path / "none" / "f.json") == 2
    assert "f.json" in capsys.readouterr().err


def test_a_capacity_up_to_one_is_a_share() -> None:
    work = workload(range(100))
    shares = parse_capacities("0.25, 1, 8k", work)
    assert [capacity.size_bytes // PAGE_BYTES for capacity in shares] == [25, 100, 2]


def test_a_policy_named_twice_runs_once() -> None:
    assert parse_policies("lru, fifo,lru") == ["lru", "fifo"]
