"""Generated sessions have the statistics that are published, and the loader reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from kvstore_bench.__main__ import main
from kvstore_bench.generate import (
    DATASETS,
    Dataset,
    draw_trajectories,
    generate,
    measure,
)
from kvstore_bench.trace import Session, load_traces

# Two hundred sessions leave a sampling error of 3 to 5 % on the means that short ones dominate.
SESSIONS = 200
TOLERANCE = 0.10


def measured_by_hand(sessions: tuple[Session, ...]) -> Dataset:
    """The statistics out of what the loader gives, by another way than `measure`."""
    turns, appends, generated, totals, contexts = [], [], [], [], []
    for session in sessions:
        end, grown = 0, []
        for request in session.requests:
            grown.append(request.input_tokens - end)
            end = request.input_tokens + request.output_tokens
        turns.append(len(session.requests))
        appends.append(fmean(grown))
        generated.append(fmean(request.output_tokens for request in session.requests))
        totals.append(end)
        contexts.append(fmean(request.input_tokens for request in session.requests))
    return Dataset(
        max(totals), fmean(turns), fmean(appends), fmean(generated), fmean(totals), fmean(contexts)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_statistics_agree_with_the_published_table(tmp_path: Path, name: str, seed: int) -> None:
    path = tmp_path / "agents.json"
    # Large blocks, since their number is of no interest here.
    generate(path, name, SESSIONS, seed, block_tokens=4096)
    (trace,) = load_traces([path])
    assert len(trace.sessions) == SESSIONS
    published, measured = DATASETS[name], measured_by_hand(trace.sessions)
    assert published.length_max * 0.97 < measured.length_max <= published.length_max
    for field in ("turns", "append", "generated", "total", "context"):
        expected = getattr(published, field)
        assert getattr(measured, field) == pytest.approx(expected, rel=TOLERANCE), field


def test_measure_agrees_with_the_file(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "agents.json.gz"
    trajectories = generate(path, "32k", 5, seed, block_tokens=4096)
    (trace,) = load_traces([path])
    by_hand = dataclasses.astuple(measured_by_hand(trace.sessions))
    assert dataclasses.astuple(measure(trajectories)) == pytest.approx(by_hand)


def test_a_session_grows_and_names_its_full_blocks(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "agents.json"
    generate(path, "48k", 3, seed)
    (trace,) = load_traces([path])
    assert trace.block_tokens == 64
    assert len({session.scope for session in trace.sessions}) == 3
    for session in trace.sessions:
        for request in session.requests:
            assert request.hash_ids == tuple(range(1, request.input_tokens // 64 + 1))
        for before, after in zip(session.requests, session.requests[1:], strict=False):
            assert after.input_tokens > before.input_tokens + before.output_tokens
            assert after.at_s > before.at_s
            assert before.output_tokens >= 1


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_equal_arguments_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    first, again, other = (tmp_path / f"{name}{suffix}" for name in ("1", "2", "3"))
    generate(first, "32k", 2, 5)
    generate(again, "32k", 2, 5)
    generate(other, "32k", 2, 6)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, again, other], "a partial file is left"


def test_every_number_of_sessions_can_be_drawn(seed: int) -> None:
    for count in (1, 2, 3, 1000):
        for trajectory in draw_trajectories(DATASETS["32k"], count, seed):
            assert trajectory.total <= DATASETS["32k"].length_max
            assert len(trajectory.appended) == len(trajectory.generated) >= 2
            assert min(trajectory.appended.min(), trajectory.generated.min()) >= 1


@pytest.fixture
def command() -> Callable[..., int]:
    def run(*arguments: str) -> int:
        return main(["generate", *arguments])

    return run


def test_the_command_writes_and_compares(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agents.json.gz"
    assert command("--dataset", "32k", "--sessions", "3", "--output", str(path)) == 0
    assert path.exists()
    output = capsys.readouterr().out
    assert "3 sessions, dataset 32k, seed 1" in output
    assert "28,639" in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sessions", "0"], "--sessions=0: must be at least 1"),
        (["--block-tokens", "-1"], "--block-tokens=-1: must be at least 1"),
        (["--seed", "-1"], "--seed=-1: must not be negative"),
        (["--output", "/proc/absent/agents.json"], "there is no folder /proc/absent"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    assert command("--output", str(tmp_path / "a.json"), *arguments) == 2
    assert expected in capsys.readouterr().err
