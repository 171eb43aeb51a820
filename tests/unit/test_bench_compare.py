"""Two runs beside each other: what differs, and what only seems to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore_bench import comparison
from kvstore_bench.__main__ import main
from kvstore_bench.comparison import chance_of, compare
from kvstore_bench.resultfile import ResultFile, read_results

# Of trials that lie close together, and of some that do not.
STEADY = [100.0, 101.0, 102.0]
FASTER = [120.0, 121.0, 122.0]


def direction(rate: float) -> dict[str, Any]:
    latency = {"mean": 1e9 / rate, "percentile": {"50.000000": 1e9 / rate, "99.000000": 2e9 / rate}}
    nothing = {"mean": 0.0}
    return {
        "bw_bytes": rate * 1e6,
        "iops": rate,
        "total_ios": 10 if rate else 0,
        "lat_ns": latency if rate else nothing,
        "clat_ns": latency if rate else nothing,
    }


def entry(name: str, trial: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "jobname": name,
        "trial": trial,
        "error": 0,
        "error_text": "",
        "job options": {"name": name, "bs": "1m"},
        "read": direction(rate),
        "write": {"total_ios": 0},
        "cpu": {"s_per_gib": 10 / rate},
        **more,
    }


def document(**jobs: Sequence[float]) -> dict[str, Any]:
    entries = [
        entry(name, trial, rate)
        for name, rates in jobs.items()
        for trial, rate in enumerate(rates, 1)
    ]
    # As `run` says it: all but the reference itself are compared with raw.
    summary = [{"jobname": name, "reference": "raw" if "raw" in jobs else ""} for name in jobs]
    return {"jobs": entries, "summary": summary, "machine": {"cpu": "x", "cpus": 2}}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path: Path) -> Any:
    def make(before: object, after: object) -> tuple[str, str]:
        names = ("a.json", "b.json")
        return tuple(  # type: ignore[return-value]
            str(write(tmp_path / name, content))
            for name, content in zip(names, (before, after), strict=True)
        )

    return make


def results(files: Any, before: object, after: object) -> tuple[ResultFile, ResultFile]:
    first, second = files(before, after)
    return read_results(Path(first)), read_results(Path(second))


def verdicts(files: Any, before: object, after: object) -> dict[tuple[str, str], str]:
    found = compare(*results(files, before, after), 0.05)
    return {(row.job, row.what): row.verdict for row in found.rows}


@pytest.mark.parametrize(("count", "other"), [(1, 1), (2, 3), (3, 3), (4, 3), (5, 5)])
def test_chances_are_those_of_all_orders(count: int, other: int) -> None:
    # Every way to deal ranks to two samples is as likely as any other.
    ranks = range(count + other)
    wins = []
    for first in itertools.combinations(ranks, count):
        second = [rank for rank in ranks if rank not in first]
        wins.append(sum(a < b for a in first for b in second))
    for first in itertools.combinations(ranks, count):
        second = [rank for rank in ranks if rank not in first]
        own = sum(a < b for a in first for b in second)
        extreme = min(own, count * other - own)
        expected = sum(min(one, count * other - one) <= extreme for one in wins) / len(wins)
        assert chance_of(first, second) == pytest.approx(min(1.0, expected))


def test_many_trials_have_nearly_the_same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [float(number) for number in range(0, 30, 2)]
    after = [number + 7 for number in before]
    exact = chance_of(before, after)
    monkeypatch.setattr(comparison, "EXACT_MAX", 0)
    assert chance_of(before, after) == pytest.approx(exact, rel=0.1)
    assert 0 < exact < 0.1


def test_equal_trials_are_no_difference() -> None:
    assert chance_of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == 1.0
    assert chance_of([], [1.0]) == 1.0


def test_trials_that_lie_apart_differ(files: Any) -> None:
    found = verdicts(files, document(a=STEADY), document(a=FASTER))
    assert found == {
        ("a", "read bandwidth"): "better",
        ("a", "read IOPS"): "better",
        ("a", "read lat p50"): "better",
        ("a", "read lat p99"): "better",
        ("a", "cpu-s/GiB"): "better",
    }
    assert set(verdicts(files, document(a=FASTER), document(a=STEADY)).values()) == {"worse"}


def test_first_layers_are_compared_where_both_have_them(files: Any) -> None:
    with_groups = document(a=STEADY)
    for one in with_groups["jobs"]:
        one["read"]["first_ns"] = {"percentile": {"50.000000": 5e5 + one["trial"]}}
    assert verdicts(files, with_groups, with_groups)["a", "read first p50"] == "same"
    assert ("a", "read first p50") not in verdicts(files, document(a=STEADY), with_groups)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([104.0, 105.0, 105.5], "same"),  # apart, and within the threshold
        ([101.5, 121.0, 140.0], "noise"),  # far, and mixed with the others
        ([150.0, 151.0], "too few trials"),
    ],
)
def test_what_trials_cannot_tell_is_no_difference(
    files: Any, after: list[float], verdict: str
) -> None:
    found = verdicts(files, document(a=STEADY), document(a=after))
    assert found["a", "read bandwidth"] == verdict


def test_beside_a_reference_its_ratio_is_judged(files: Any) -> None:
    # The machine is slower, and the job has kept its share of it.
    slower = [rate / 2 for rate in STEADY]
    before, after = document(raw=STEADY, kv=STEADY), document(raw=slower, kv=slower)
    found = compare(*results(files, before, after), 0.05)
    by_what = {(row.job, row.what): row for row in found.rows}
    assert by_what["kv", "of raw"].verdict == "same"
    assert by_what["kv", "read bandwidth"].verdict == "worse"
    assert by_what["kv", "read lat p50"].verdict == "worse"
    assert not found.worse
    assert "raw itself differs: the machine does, and only ratios to raw are judged" in found.notes


def test_a_job_that_lost_against_its_reference_is_worse(files: Any) -> None:
    slower = [rate / 2 for rate in STEADY]
    found = compare(
        *results(files, document(raw=STEADY, kv=STEADY), document(raw=STEADY, kv=slower)), 0.05
    )
    assert found.worse
    assert [row.verdict for row in found.rows if row.what == "of raw"] == ["worse"]


def test_a_job_that_fails_now_is_worse(files: Any) -> None:
    good = {"jobs": [entry("a", trial, 100) for trial in (1, 2, 3)]}
    bad = {"jobs": [entry("a", 1, 100, error=1, error_text="no daemon")]}
    assert compare(*results(files, good, bad), 0.05).worse
    assert not compare(*results(files, bad, good), 0.05).worse


def test_what_makes_runs_incomparable_is_said(files: Any) -> None:
    before, after = document(a=STEADY, b=STEADY), document(a=STEADY, c=STEADY)
    after["machine"]["cpus"] = 64
    after["warnings"] = ["unstable: raw"]
    for one in after["jobs"]:
        one["job options"]["bs"] = "2m"
    notes = compare(*results(files, before, after), 0.05).notes
    assert any(note.endswith("a.json: b") for note in notes)
    assert any(note.endswith("b.json: c") for note in notes)
    assert "the machines differ: cpus" in notes
    assert "a: options differ: bs=1m and 2m" in notes
    assert any(note.endswith("b.json: unstable: raw") for note in notes)


def test_the_command_says_by_its_status_what_it_found(
    files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = files(document(a=STEADY), document(a=FASTER))
    assert main(["compare", before, after]) == 0
    assert "better (chance 0.1)" in capsys.readouterr().out
    assert main(["compare", after, before]) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "read bandwidth" in line)
    assert row.split()[-3:] == ["worse", "(chance", "0.1)"]
    assert " 0.835 " in row
    assert main(["compare", after, before, "--threshold=20"]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "holds no results: kvbench run --output-format=json"),
        ("[]", "holds no results"),
        ("fio-3", "holds no results"),
        ('{"jobs": []}', "holds no results"),
        ('{"jobs": [{"jobname": "a"}]}', "holds no results"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_without_results_end_with_2(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert main(["compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_files_with_nothing_in_common_end_with_2(
    files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *files(document(a=STEADY), document(b=STEADY))]) == 2
    assert "has none of the jobs of" in capsys.readouterr().err


def test_a_threshold_is_a_percentage(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = files(document(a=STEADY), document(a=STEADY))
    assert main(["compare", *words, "--threshold=none"]) == 2
    assert "--threshold=none: must be a percentage from 0 to 1000" in capsys.readouterr().err


def test_results_of_fio_have_latencies_of_completions(tmp_path: Path) -> None:
    fio = entry("a", 1, 100.0)
    fio["read"]["lat_ns"] = {"mean": 1.0}
    del fio["trial"]
    found = read_results(write(tmp_path / "a.json", {"jobs": [fio, fio]}))
    assert [trial.trial for trial in found.jobs["a"]] == [1, 2]
    assert found.jobs["a"][0].directions["read"].latency == "clat"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="holds no results"):
        read_results(path)
