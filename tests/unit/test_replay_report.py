"""Sums, percentiles, tables, JSON, progress and the picture of a replay."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore_bench.replay.picture import check_picture, draw, sparse_from
from kvstore_bench.replay.plan import Scale, make_plan
from kvstore_bench.replay.player import Played
from kvstore_bench.replay.progress import Progress
from kvstore_bench.replay.report import (
    Arena,
    Report,
    align,
    by_turn,
    format_seconds,
    latency,
    make_report,
    rows,
    to_json,
    turn_rows,
)
from kvstore_bench.trace import Request, Session, Trace
from kvstore_client import FetchOutcome, PutOutcome

PLAN = make_plan(
    [Trace("t", 64, (Session("s", "s", (Request(0.0, 700, 1, tuple(range(10))),)),))],
    Scale(bytes_per_token=64, layers=2),
)


def played(turns: int, **changes: Any) -> list[Played]:
    """Turn t has 10 + t blocks, of which 10 + t - 1 are hits, fetched in t milliseconds."""
    return [
        Played(
            **{
                "turn": turn,
                "blocks": 10 + turn,
                "tokens": (10 + turn) * 64 + 32,
                "block_tokens": 64,
                "hits": turn and 9 + turn,
                "used": turn and 9 + turn,
                "read_bytes": 4096 * (turn and 9 + turn),
                "written_bytes": 4096,
                "lookup_s": 0.5e-3,
                "fetch_s": turn / 1e3 if turn else None,
                "put_s": 0.002,
                "fetched": Counter({FetchOutcome.HIT: 9 + turn} if turn else {}),
                "put": Counter({PutOutcome.STORED: 1}),
                **changes,
            }
        )
        for turn in range(turns)
    ]


def report(requests: list[Played], verified: bool = True) -> Report:
    return make_report(
        PLAN,
        requests,
        endpoints=["tcp://127.0.0.1:7450"],
        own_daemon=True,
        concurrency=3,
        verified=verified,
        elapsed_s=2.0,
        fetching_s=0.5,
        putting_s=0.25,
        arena=Arena(total_bytes=1 << 20, used_bytes=1 << 19, evicted_blocks=4),
    )


def test_sums_and_rates() -> None:
    summed = report(played(3))
    assert (summed.requests, summed.blocks, summed.hit_blocks) == (3, 33, 21)
    assert summed.hit_rate_blocks == pytest.approx(21 / 33)
    assert summed.hit_rate_tokens == pytest.approx(21 * 64 / (33 * 64 + 96))
    assert summed.read_bytes == 21 * 4096
    assert summed.wrong_blocks == 0
    assert summed.fetch_outcomes == {"HIT": 21}
    assert summed.put_outcomes == {"STORED": 3}
    assert summed.block_bytes == (4096,)
    assert [turn.hit_rate for turn in summed.turns] == [0, 10 / 11, 11 / 12]
    assert [turn.fetch.count for turn in summed.turns] == [0, 1, 1]


def test_percentiles_are_those_of_the_samples(seed: int) -> None:
    samples = np.random.default_rng(seed).exponential(size=1001)
    found = latency([None, *samples, None])
    ordered = np.sort(samples)
    assert found.count == 1001
    assert found.p50_s == ordered[500]
    assert found.p90_s == ordered[900]
    assert found.p99_s == ordered[990]
    assert found.max_s == ordered[1000]
    assert latency([None]).count == 0


@pytest.mark.parametrize("turns", [1, 2, 79, 80, 81, 500])
def test_turns_are_grouped_without_loss_and_the_first_stays_alone(turns: int) -> None:
    groups = by_turn(played(turns), 80)
    assert len(groups) <= 80
    assert (groups[0].turn, groups[0].count, groups[0].hits) == (1, 1, 0)
    assert sum(group.requests for group in groups) == turns
    assert sum(group.count for group in groups) == turns
    for group, following in pairwise(groups):
        assert group.turn + group.count == following.turn


def test_the_table_tells_all() -> None:
    text = "\n".join(align(rows(report(played(3))), right=False))
    assert "63.64% of blocks" in text
    assert "p50 1.5 ms" in text
    assert "HIT 21" in text
    assert "wrong blocks       0" in text
    assert "512KiB of 1MiB used, 4 blocks evicted" in text
    assert "84KiB in 500 ms, 168KiB/s" in text
    assert "not checked" in "\n".join(align(rows(report(played(3), False)), right=False))


def test_what_went_wrong_is_in_the_table() -> None:
    requests = played(2, wrong=1, unreachable=True, errors=["the wire was cut"])
    text = "\n".join(align(rows(report(requests)), right=False))
    assert "wrong blocks       2" in text
    assert "a daemon, in 2 lookups" in text
    assert "2 times: the wire was cut" in text


def test_turns_in_the_table_thin_out() -> None:
    table = turn_rows(report(played(34)))
    assert [row[0] for row in table] == ["turn", "1", "2", "5", "10", "20", "34"]
    assert table[1][3:] == ("0.0%", "", "", "", "")
    assert table[2][3:5] == ("90.9%", "1 ms")
    assert len({len(line) for line in align(table, right=True)[2:]}) == 1


def test_json_has_every_figure() -> None:
    record = json.loads(to_json(report(played(3))))
    assert record["wrong_blocks"] == 0
    assert record["fetch"]["p50_s"] == pytest.approx(0.0015)
    assert record["turns"][2]["hit_rate"] == pytest.approx(11 / 12)
    assert record["arena"] == {"total_bytes": 1 << 20, "used_bytes": 1 << 19, "evicted_blocks": 4}
    assert json.loads(to_json(report(played(3), False)))["wrong_blocks"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 µs"), (4.26e-6, "4.26 µs"), (0.01234, "12.3 ms"), (1.5, "1.5 s"), (75.0, "75 s")],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_progress_elsewhere_than_on_a_terminal_is_ten_lines() -> None:
    output = io.StringIO()
    with Progress(25, output) as progress:
        for request in played(25, wrong=0):
            progress.add(request)
    lines = output.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("  100%  25 of 25 requests, hit rate 93.8%")
    assert "WRONG" not in output.getvalue()


def test_progress_on_a_terminal_moves_and_cries_out() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    output = Terminal()
    with Progress(2, output) as progress:
        for request in played(2, wrong=3):
            progress.add(request)
    assert "2/2" in output.getvalue()
    assert "6 WRONG BLOCKS" in output.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2, 30, 400])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_drawn(tmp_path: Path, turns: int, suffix: str) -> None:
    path = tmp_path / f"replay{suffix}"
    draw(report(played(turns)), by_turn(played(turns), 80), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(data) > 5000


def test_points_that_few_sessions_reach_are_told_apart() -> None:
    many = [request for _ in range(20) for request in played(3)]
    assert sparse_from(by_turn([*many, *played(6)])) == 3
    assert sparse_from(by_turn(many)) == 3
    assert sparse_from(by_turn(played(6))) == 6


def test_a_picture_that_cannot_be_drawn_is_refused_before() -> None:
    with pytest.raises(ConfigError, match="must end in"):
        check_picture(Path("replay.bmp"))
    check_picture(Path("Replay.PNG"))
