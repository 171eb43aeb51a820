"""What reads fio's results reads ours: fio's own converter, and fio's own results beside them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.resultfile import read_results
from tests.support.orphans import TIMEOUT_S

pytestmark = pytest.mark.slow

CONVERTER = "fio_jsonplus_clat2csv"
# Of fio's there are none of these: nobody measures them here.
LEFT_OUT = {
    "sync",
    "iodepth_level",
    "iodepth_submit",
    "iodepth_complete",
    "latency_depth",
    "latency_target",
    "latency_percentile",
    "latency_window",
    "read.bw_agg",
    "write.bw_agg",
    "trim.bw_agg",
}

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
needs_converter = pytest.mark.skipif(
    shutil.which(CONVERTER) is None, reason=f"{CONVERTER} of fio is not installed"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two jobs in two trials, with all buckets."""
    path = tmp_path_factory.mktemp("fio") / "ours.json"
    words = ["--trials=2", "--output-format=json+", f"--output={path}", "--bs=4k", "--size=4m"]
    words += ["--name=a", "--rw=randrw", "--name=b", "--rw=write", "--ioengine=null", "--stonewall"]
    run(sys.executable, "-m", "kvstore_bench", "run", *words)
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of fio that moves nothing."""
    path = tmp_path_factory.mktemp("fio") / "theirs.json"
    words = ["--output-format=json+", f"--output={path}", "--ioengine=null", "--size=64m"]
    words += ["--lat_percentiles=1", "--clat_percentiles=1", "--slat_percentiles=1"]
    run("fio", *words, "--name=a", "--rw=randrw")
    return path


@needs_converter
def test_fios_converter_reads_ours(ours: Path, tmp_path: Path) -> None:
    stub = tmp_path / "ours.csv"
    run(CONVERTER, str(ours), str(stub))
    said = run(CONVERTER, str(ours), str(stub), "--validate").stdout
    jobs = json.loads(ours.read_text())["jobs"]
    assert len(jobs) == 4
    for number, job in enumerate(jobs):
        path = tmp_path / f"ours_job{number}.csv"
        assert f"{path} validated" in said
        with path.open() as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
        for direction in ("read", "write"):
            counts = [int(row[f"{direction}_clat_ns_count"].strip() or 0) for row in rows]
            assert sum(counts) == job[direction]["total_ios"]


def keys(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, value in entry.items():
        if isinstance(value, dict) and name not in ("job options", "bins", "percentile"):
            yield from keys(value, f"{prefix}{name}.")
        else:
            # A number is a number: fio writes 0 where it has no fraction.
            yield f"{prefix}{name}", float if isinstance(value, int) else type(value)


@needs_fio
def test_all_that_fio_says_of_a_job_is_there_or_known_to_be_missing(
    ours: Path, theirs: Path
) -> None:
    mine, other = json.loads(ours.read_text()), json.loads(theirs.read_text())
    assert set(other) <= set(mine)
    found = dict(keys(mine["jobs"][0]))
    expected = dict(keys(other["jobs"][0]))
    lacking = {
        name
        for name in expected
        if name not in found and not any(f"{name}.".startswith(f"{one}.") for one in LEFT_OUT)
    }
    assert not lacking
    differing = {name for name in set(expected) & set(found) if expected[name] != found[name]}
    assert not differing


@needs_fio
def test_percentages_and_buckets_have_fios_names(ours: Path, theirs: Path) -> None:
    mine, other = (
        json.loads(path.read_text())["jobs"][0]["read"]["clat_ns"] for path in (ours, theirs)
    )
    assert list(mine["percentile"]) == list(other["percentile"])
    # Buckets above 128 are not of single values, and their names say which they are.
    assert all(name.isdigit() for name in mine["bins"])
    assert sum(mine["bins"].values()) == mine["N"]


@needs_fio
def test_results_of_fio_are_read_as_ours_are(theirs: Path) -> None:
    (trial,) = read_results(theirs).jobs["a"]
    assert set(trial.directions) == {"read", "write"}
    assert trial.directions["read"].latency == "lat"
    assert trial.directions["read"].bw_bytes > 0
