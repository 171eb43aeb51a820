"""What a run comes to, out of what engines and counters said."""

from __future__ import annotations

import json
import math

import pytest

from kvstore_bench.emulate.records import Arrivals, Played, Record
from kvstore_bench.emulate.results import (
    Links,
    balance,
    bound_of,
    loaded_times,
    percentiles,
    rate_while,
    summarize,
)
from kvstore_bench.emulate.steps import Decoded, Prefilled
from kvstore_bench.emulate.work import Turn
from kvstore_bench.shaped.traffic import Reading

BLOCK = 100
NAMES = ("prefill0", "decode0")
LINKS = Links(NAMES, 100.0)  # a block a second


def record(began_at: float, loaded_at: float, hits: int, **wrong: int) -> Record:
    """A turn whose hits came between two times."""
    turn = Turn(0, 0, "s", tuple(range(hits + 1)), hits, 64, 64, 1)
    prefilled = Prefilled(
        turn="t",
        began_at=began_at,
        first_group_at=began_at,
        loaded_at=loaded_at,
        ended_at=loaded_at,
        served={"direct": hits - 1, "relay": 1},
        missed_blocks=wrong.get("missed", 0),
        error="why" if wrong else "",
    )
    decoded = Decoded(
        turn="t",
        received_at=loaded_at + 1,
        first_token_at=loaded_at + 2,
        ended_at=loaded_at + 3,
        wrong_blocks=wrong.get("wrong", 0),
        unstored_blocks=wrong.get("unstored", 0),
    )
    return Record(turn, "prefill0", "decode0", began_at, prefilled, decoded)


def played(*records: Record, readings: list[Reading] | None = None) -> Played:
    """A run whose links are the storage links of two nodes."""
    return Played(
        "balanced",
        began_at=0.0,
        ended_at=20.0,
        records=list(records),
        session_s=[20.0],
        links=[("prefill0", "storage", "rx"), ("decode0", "storage", "rx")],
        readings=readings or [],
    )


def test_loaded_is_while_a_second_of_work_waits() -> None:
    # 4 blocks in 4 s: 400 bytes wait at first, 100 after 3 s.
    assert loaded_times([record(0, 4, 4)], LINKS, BLOCK) == [(0, 3)]
    # Less than a second's work never loads anything.
    assert loaded_times([record(0, 4, 1)], LINKS, BLOCK) == [(0, 0)]


def test_loads_that_follow_each_other_make_one_time() -> None:
    found = loaded_times([record(0, 4, 4), record(2, 6, 4)], LINKS, BLOCK)
    assert found == [(0, 5)]
    apart = loaded_times([record(0, 4, 4), record(10, 14, 4)], LINKS, BLOCK)
    assert apart == [(0, 3), (10, 13)]


def test_links_without_a_rate_are_never_loaded() -> None:
    assert loaded_times([record(0, 4, 4)], Links(NAMES, 0.0), BLOCK) == []


def test_rate_is_that_of_the_loaded_times() -> None:
    readings = [Reading(0.0, (0, 0)), Reading(2.0, (100, 100)), Reading(4.0, (100, 100))]
    run = played(readings=readings)
    assert rate_while(run, NAMES, [(0.0, 2.0)]) == (100.0, 2.0)
    assert rate_while(run, NAMES, [(1.0, 3.0)]) == (50.0, 2.0)
    assert rate_while(run, NAMES[:1], [(0.0, 2.0)]) == (50.0, 2.0)
    rate, seconds = rate_while(run, NAMES, [])
    assert math.isnan(rate)
    assert seconds == 0


def test_balance_is_the_busiest_beside_the_average() -> None:
    readings = [Reading(float(at), (300 * at, 100 * at)) for at in range(4)]
    assert balance(played(readings=readings), NAMES, [(0.0, 3.0)]) == pytest.approx(1.5)
    assert math.isnan(balance(played(readings=readings), NAMES, [(0.0, 0.9)]))


def test_summary_counts_what_came_and_what_did_not() -> None:
    run = played(
        record(0, 4, 4),
        record(1, 5, 2, missed=1, wrong=2, unstored=3),
        readings=[Reading(0.0, (0, 0)), Reading(5.0, (500, 100))],
    )
    result = summarize(run, LINKS, BLOCK)
    assert result.jct_s == 20
    assert result.bytes_by_path == {"direct": 4 * BLOCK, "relay": 2 * BLOCK}
    assert result.link_bytes == {"prefill0": {"storage_rx": 500}, "decode0": {"storage_rx": 100}}
    assert (result.wrong_blocks, result.missed_blocks, result.errors) == (2, 4, ("why",))
    assert result.void
    assert result.fetch_s["mean"] == 4
    assert result.ttft_s["p50"] == 6
    assert not summarize(played(record(0, 4, 4)), LINKS, BLOCK).void


def test_what_was_not_measured_is_no_number_in_json() -> None:
    plain = summarize(played(), LINKS, BLOCK).plain()
    assert plain["load_Bps"] is None
    assert plain["fetch_s"]["p50"] is None
    json.loads(json.dumps(plain, allow_nan=False))


def test_bounds_hold_for_as_many_as_they_say() -> None:
    counts = {16.0: 50, 32.0: 48, float("inf"): 2}
    assert bound_of(counts, 50) == 16
    assert bound_of(counts, 51) == 32
    assert bound_of(counts, 98) == 32
    assert bound_of(counts, 99) == math.inf
    assert math.isnan(bound_of({}, 50))


def test_percentiles_are_values_that_were_there() -> None:
    found = percentiles([float(value) for value in range(1, 101)])
    assert found == {"mean": 50.5, "p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert percentiles([3.0]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}


def test_sessions_come_at_random_at_their_rate() -> None:
    times = Arrivals(2.0, seed=3).times_s(4000)
    assert times == sorted(times)
    assert times == Arrivals(2.0, seed=3).times_s(4000)
    assert times[-1] == pytest.approx(2000, rel=0.1)
    assert Arrivals().times_s(3) == [0.0, 0.0, 0.0]
