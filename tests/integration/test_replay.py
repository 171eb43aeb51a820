"""Replays against real daemons: every byte right, and the hit rate that is possible."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.__main__ import main
from kvstore_bench.daemons import Daemons
from kvstore_bench.generate import generate
from kvstore_bench.replay.plan import Scale, make_plan
from kvstore_bench.replay.player import Played, Player
from kvstore_bench.trace import load_traces
from kvstore_client import AsyncClient, FetchOutcome

MEMORY_BYTES = 64 * 1024 * 1024


def replay(*arguments: str) -> int:
    return main(["replay", *arguments])


@pytest.fixture
def agents(tmp_path: Path, seed: int) -> str:
    path = tmp_path / "agents of a test.json.gz"
    generate(path, "32k", 3, seed)
    return str(path)


@pytest.fixture
def chat(tmp_path: Path) -> str:
    path = tmp_path / "chat.jsonl"
    lines = [
        {"timestamp": at, "input_length": tokens, "output_length": 1, "hash_ids": ids}
        for at, tokens, ids in [
            (0, 1500, [0, 1, 90]),
            (1, 1600, [0, 2, 3, 91]),
            (2, 2100, [0, 1, 4, 5, 92]),
            (3, 300, [93]),
        ]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.slow
def test_agents_find_all_that_was_there_before(
    agents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "replay.json", tmp_path / "replay.png"
    options = ["--turns", "40", "--json", str(figures), "--plot", str(picture)]
    assert replay(agents, *options, "--layers", "4") == 0
    report: dict[str, Any] = json.loads(figures.read_bytes())
    assert report["wrong_blocks"] == 0
    assert report["hit_rate_blocks"] == report["hit_rate_max"] > 0.9
    assert report["put_outcomes"] == {"STORED": report["distinct_blocks"]}
    assert report["fetch_outcomes"] == {"HIT": report["hit_blocks"]}
    assert report["read_bytes"] == report["hit_blocks"] * 4096
    assert report["turns"][0]["hit_rate"] == 0
    assert report["errors"] == {}
    assert report["lookups_unreachable"] == 0
    arena = report["arena"]
    assert arena["total_bytes"] > arena["used_bytes"] == report["distinct_blocks"] * 4096
    assert arena["evicted_blocks"] == 0
    assert picture.stat().st_size > 5000
    output = capsys.readouterr()
    assert "4KiB (64 tokens) at 64 bytes a token, 4 layers" in output.out
    assert f"room for {report['distinct_blocks']:,} distinct blocks" in output.out
    assert "100%" in output.err


@pytest.mark.slow
def test_blocks_of_two_sizes_in_one_replay(agents: str, chat: str, tmp_path: Path) -> None:
    figures = tmp_path / "replay.json"
    options = ["--turns", "5", "--concurrency", "1", "--bytes-per-token", "16"]
    assert replay(agents, chat, *options, "--json", str(figures)) == 0
    report = json.loads(figures.read_bytes())
    assert report["block_bytes"] == [1024, 8192]
    assert report["wrong_blocks"] == 0
    assert report["hit_rate_blocks"] == report["hit_rate_max"]


@pytest.mark.slow
def test_a_small_arena_costs_hits_and_nothing_else(agents: str, tmp_path: Path) -> None:
    figures = tmp_path / "replay.json"
    assert replay(agents, "--memory", "2MiB", "--turns", "40", "--json", str(figures)) == 0
    report = json.loads(figures.read_bytes())
    assert report["arena"]["total_bytes"] == 2 * 1024 * 1024
    assert report["arena"]["evicted_blocks"] > 0
    assert report["hit_rate_blocks"] < report["hit_rate_max"]
    assert report["wrong_blocks"] == 0


@pytest.mark.slow
def test_running_daemons_and_a_name_for_the_run(agents: str, tmp_path: Path) -> None:
    async def run() -> list[dict[str, Any]]:
        reports = []
        async with Daemons(2, MEMORY_BYTES) as daemons:
            endpoints = ["--endpoint", ",".join(daemons.endpoints)]
            for number, options in enumerate((["--run-id", "a"], ["--run-id", "a"], [])):
                figures = tmp_path / f"{number}.json"
                words = [agents, *endpoints, *options, "--turns", "10", "--json", str(figures)]
                # It runs a loop of its own.
                assert await asyncio.to_thread(replay, *words) == 0
                reports.append(json.loads(figures.read_bytes()))
        return reports

    first, again, other = asyncio.run(run())
    assert first["own_daemon"] is False
    assert len(first["endpoints"]) == 2
    assert first["hit_rate_blocks"] == other["hit_rate_blocks"] == first["hit_rate_max"]
    assert again["hit_rate_blocks"] == 1
    assert again["put_outcomes"] == {}
    assert {report["wrong_blocks"] for report in (first, again, other)} == {0}


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_daemon_that_dies_costs_its_blocks_and_the_replay_goes_on(agents: str) -> None:
    plan = make_plan(load_traces([agents]), Scale(bytes_per_token=64, turns=20))
    played: list[Played] = []
    async with Daemons(2, MEMORY_BYTES) as daemons, AsyncClient(daemons.endpoints) as client:

        def on_played(request: Played) -> None:
            played.append(request)
            if len(played) == plan.requests // 2:
                os.kill(daemons.pids[0], signal.SIGKILL)

        player = Player(
            client,
            plan,
            run_id="r",
            concurrency=3,
            deadline_s=30.0,
            verify=True,
            on_played=on_played,
        )
        await player.play()
    assert len(played) == plan.requests
    assert sum(request.wrong for request in played) == 0
    late = played[-3:]
    assert all(request.blocks > request.hits for request in late), "half of it is gone"
    assert all(outcome is FetchOutcome.HIT for request in late for outcome in request.fetched)


@pytest.mark.slow
def test_the_only_daemon_dies_and_what_was_played_is_reported(
    agents: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[Daemons] = []

    class Watched(Daemons):
        async def __aenter__(self) -> Daemons:
            started.append(self)
            return await super().__aenter__()

    class Deadly(Player):
        async def _request(self, *arguments: Any) -> Played:
            played = await super()._request(*arguments)
            if played.turn == 3 and started[0].failures() == []:
                os.kill(started[0].pids[0], signal.SIGKILL)
            return played

    monkeypatch.setattr("kvstore_bench.replay.command.Daemons", Watched)
    monkeypatch.setattr("kvstore_bench.replay.command.Player", Deadly)
    figures = tmp_path / "replay.json"
    words = ["--turns", "10", "--concurrency", "1", "--sessions", "1", "--json", str(figures)]
    assert replay(agents, *words) == 1
    report = json.loads(figures.read_bytes())
    assert report["requests"] == 10
    assert report["hit_blocks"] > 0
    assert report["arena"] is None
    assert "ended with signal 9" in report["failure"]
    output = capsys.readouterr()
    assert "unknown: no daemon answers any more" in output.out
    assert "kvbench replay: error: kvstored 0 ended with signal 9" in output.err


@pytest.mark.slow
def test_figures_on_standard_output_stand_alone(
    chat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(chat, "--json", "-", "--no-verify") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["wrong_blocks"] is None
    assert "not checked" in output.err


def test_no_daemon_there(chat: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Nobody listens on the first port.
    assert replay(chat, "--endpoint", "tcp://127.0.0.1:1") == 1
    assert "no daemon answers at tcp://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_daemon_that_does_not_start_is_quoted(
    chat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(chat, "--memory", "4000T") == 1
    error = capsys.readouterr().err
    assert "kvstored 0 ended with status 2" in error
    assert "--memory=" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "lots"], "--memory=lots: a size is"),
        (["--bytes-per-token", "x"], "--bytes-per-token=x: a size is"),
        (["--concurrency", "0"], "--concurrency=0: must be at least 1"),
        (["--deadline", "0"], "--deadline=0.0: must be more than 0"),
        (["--deadline", "nan"], "--deadline=nan: must be more than 0"),
        (["--plot", "a.bmp"], "--plot=a.bmp: must end in"),
        (["--endpoint", "tcp://127.0.0.1:1", "--memory", "1G"], "--memory=1G: is for the daemon"),
        (["--endpoint", "gopher://x"], "--endpoint=gopher://x"),
        (["--json", "/nowhere/a.json"], "--json=/nowhere/a.json: there is no folder /nowhere"),
        (["--plot", "/nowhere/a.png"], "--plot=/nowhere/a.png: there is no folder /nowhere"),
        (["absent.json"], "trace=absent.json: no such file"),
    ],
)
def test_wrong_options_are_named(
    chat: str, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert replay(chat, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvbench replay: error: ")
    assert expected in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    show: Callable[..., int] = replay
    with pytest.raises(SystemExit):
        show("--help")
    text = capsys.readouterr().out
    assert "kvbench replay 'traces/*.json.gz'" in text
    assert "exit status" in text
