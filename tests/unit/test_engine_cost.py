"""The cost of the engine as a command: its figures make sense, however few the blocks."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.engine_bed import KEY_BYTES, LAYERS, PREFIX_KEYS, Bed
from kvstore_bench.engine_cost import EXIT_FAILED, EXIT_USAGE, Cost, Figure, main, measure, table
from kvstore_daemon.engine.recount import check_invariants

BLOCKS = 4000
LOOKUPS = [
    "lookup, frame to reply",
    "lookup with a lease, frame to reply",
    "lookup, source alone",
    "lookup with a lease, source alone",
]
INDEX = ["index, arena just filled", "index, all blocks replaced"]


def nothing(label: str, done: int, total: int) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of the command wrote."""
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    assert main(["--blocks", str(BLOCKS), "--repetitions", "3", "--json", str(path)]) == 0
    return path


@pytest.fixture
def figures(written: Path) -> dict[str, dict[str, Any]]:
    """Figures of that run by name."""
    return {figure["name"]: figure for figure in json.loads(written.read_text())["figures"]}


def test_the_run_says_what_it_measured(written: Path) -> None:
    result = json.loads(written.read_text())
    assert result["format"] == "kvbench-engine-cost"
    assert (result["blocks"], result["key_bytes"], result["layers"]) == (BLOCKS, KEY_BYTES, LAYERS)


def test_every_lookup_finds_every_key(written: Path) -> None:
    result = json.loads(written.read_text())
    assert result["found_keys"] == result["prefix_keys"] == PREFIX_KEYS


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_has_a_median_between_its_extremes(
    figures: dict[str, dict[str, Any]], name: str
) -> None:
    figure = figures[name]
    assert 0 < figure["lowest"] <= figure["value"] <= figure["highest"]
    assert (figure["count"], figure["unit"], figure["target"]) == (3, "ms", 2)


@pytest.mark.parametrize("name", INDEX)
def test_the_index_is_as_small_as_promised_and_counts_at_least_keys(
    figures: dict[str, dict[str, Any]], name: str
) -> None:
    assert KEY_BYTES + 100 < figures[name]["value"] <= figures[name]["target"] == 256


def test_the_parts_make_up_the_whole_index(
    written: Path, figures: dict[str, dict[str, Any]]
) -> None:
    parts = json.loads(written.read_text())["parts_bytes_per_block"]
    whole = figures["index, all blocks replaced"]["value"]
    assert sum(parts.values()) == pytest.approx(whole)
    assert min(parts.values()) >= -1
    # Besides known parts there are some objects of the store, and the rounding of numbers.
    assert parts["everything else"] < 20


def test_checksums_are_counted_by_their_own(figures: dict[str, dict[str, Any]]) -> None:
    assert figures[f"checksums of {LAYERS} layers, and their column"]["value"] > 8 * LAYERS


@pytest.mark.parametrize(
    "name", ["puts into a full arena, each evicts", "evictions, policy alone", "ghosts"]
)
def test_what_is_for_information_is_there(figures: dict[str, dict[str, Any]], name: str) -> None:
    assert figures[name]["value"] > 0
    assert figures[name]["target"] is None
    assert figures[name]["met"] is None


def test_blocks_enter_and_leave_the_store_as_puts_do() -> None:
    bed = Bed(PREFIX_KEYS, b"".join(n.to_bytes(KEY_BYTES, "big") for n in range(2 * PREFIX_KEYS)))
    bed.put(0, PREFIX_KEYS, nothing, "")
    assert sorted(bed.namespace.slots) == sorted(bed.session(0))
    assert not bed.store.free_bytes
    check_invariants(bed.store)
    bed.put(PREFIX_KEYS, 2 * PREFIX_KEYS, nothing, "")
    assert bed.store.counters["blocks_evicted"] == PREFIX_KEYS
    check_invariants(bed.store)


@pytest.mark.slow
def test_tracing_that_was_on_stays_on() -> None:
    tracemalloc.start()
    try:
        measure(PREFIX_KEYS, 1, nothing)
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_the_table_names_targets_and_what_misses_them() -> None:
    cost = Cost(
        blocks=3000,
        found_keys=1999,
        figures=(
            Figure("good", "ms", 1.5, 1.25, 2.5, 3, 2.0),
            Figure("bad", "B/block", 300.0, 300.0, 300.0, 1, 256.0),
            Figure("news", "/s", 123456.0, 1.0, 2.0, 3),
        ),
        parts={"keys": 65.0},
    )
    title, _, _, good, bad, news, *_, keys = table(cost)
    assert "2,000 and found 1,999" in title
    assert good.split() == ["good", "1.500", "1.250", "2.500", "ms", "<=", "2", "met"]
    assert bad.split() == ["bad", "300.0", "B/block", "<=", "256", "missed"]
    assert news.split() == ["news", "123,456", "1.000", "2.000", "/s"]
    assert keys.split() == ["keys", "65.0"]


@pytest.mark.parametrize(
    "words", [["--blocks", "3999"], ["--blocks", "99000000"], ["--repetitions", "0"]]
)
def test_numbers_out_of_range_are_refused(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == EXIT_USAGE
    assert words[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--json", str(tmp_path / "missing" / "cost.json")]) == EXIT_USAGE
    assert "--json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_a_failure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--blocks", str(BLOCKS), "--repetitions", "1", "--json", str(tmp_path)]
    assert main(words) == EXIT_FAILED
    printed = capsys.readouterr()
    assert "error" in printed.err
    assert "target" in printed.out, "what was measured is lost"


@pytest.mark.slow
def test_figures_go_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--blocks", str(BLOCKS), "--repetitions", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["blocks"] == BLOCKS
    assert "target" in captured.err
