"""What shared memory costs, as a command: its figures make sense, however small the sizes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.core_rates import MIB, CoreRates, others_run
from kvstore_bench.memory_cost import EXIT_USAGE, main

ENDS = ("client", "daemon", "both")
WORDS = ["--blocks", "1", "32", "--bs", "256k", "--working-set", "4m"]
SHORT = [*WORDS, "--trials", "2", "--seconds", "0.05"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run of the command wrote."""
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    assert main([*SHORT, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def figures(written: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of that run by measurement and name."""
    return {(one["measurement"], one["name"]): one for one in written["figures"]}


@pytest.mark.slow
def test_the_run_says_what_it_measured(written: dict[str, Any]) -> None:
    assert (written["format"], written["version"]) == ("kvbench-memory-cost", 1)
    assert (written["block_bytes"], written["working_set_bytes"]) == (256 * 1024, 4 * MIB)
    assert (written["trials"], written["seconds"]) == (2, 0.05)


@pytest.mark.slow
def test_every_figure_is_there_and_positive(
    figures: dict[tuple[str, str], dict[str, Any]],
) -> None:
    asked = ("empty (PING)", "view of 1", "view of 32")
    works = ("copy", "hash", "copy, then hash")
    assert set(figures) == {
        *(("request", f"{name}: {end}") for name in asked for end in ENDS),
        ("request", "view of 32: both, for each 16"),
        ("verified", "16 blocks of 256KiB"),
        *((cores, work) for cores in ("1 core", "2 cores") for work in works),
    }
    for figure in figures.values():
        assert len(figure["values"]) == 2
        assert min(figure["values"]) > 0, figure


@pytest.mark.slow
def test_both_ends_are_the_sum_of_two_processes(
    figures: dict[tuple[str, str], dict[str, Any]],
) -> None:
    client, daemon, both = (figures["request", f"view of 32: {end}"]["values"] for end in ENDS)
    assert both == pytest.approx([sum(pair) for pair in zip(client, daemon, strict=True)])
    share = figures["request", "view of 32: both, for each 16"]
    assert share["values"] == pytest.approx([value / 2 for value in both])
    assert share["at_most"] == 40


@pytest.mark.slow
def test_figures_go_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--trials", "1", "--seconds", "0.01", "--json", "-"]) == 0
    captured = capsys.readouterr()
    free = json.loads(captured.out)["others_run"]
    assert sorted(free) == ["copy", "hash"]
    assert all(isinstance(runs, bool) for runs in free.values())
    assert "other threads run during a call: copy: " in captured.err


def test_a_core_without_a_daemon_works_through_its_memory() -> None:
    found = CoreRates(2 * MIB).figures(trials=1, seconds=0.001)
    assert len(found) == 6
    assert all(figure.value > 0 for figure in found)


def test_who_keeps_the_interpreter_is_told_from_who_lets_it_go() -> None:
    # Who waits has no use for the interpreter. Adding up integers in C keeps it: another thread
    # may ask for it as often as it likes, and gets it when the sum is there.
    let_go = threading.Event()
    assert others_run(lambda: let_go.wait(0.1))
    assert not others_run(lambda: sum(range(3_000_000)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--blocks", "0"),
        ("--blocks", "5000"),
        ("--bs", "much"),
        ("--bs", "1g"),
        ("--working-set", "1m"),
        ("--working-set", "2.5m"),
        ("--trials", "0"),
        ("--seconds", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert main([option, value]) == EXIT_USAGE
    assert option in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--json", str(tmp_path / "missing" / "cost.json")]) == EXIT_USAGE
    assert "--json" in capsys.readouterr().err
