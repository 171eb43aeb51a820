"""The picture of a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.__main__ import main
from kvstore_bench.plot import lines_of
from kvstore_bench.resultfile import read_results


def direction(rate: float, ios: int = 1000) -> dict[str, Any]:
    percentiles = {f"{p:.6f}": p * 1e6 / rate for p in (1.0, 50.0, 99.0, 99.9, 99.99)}
    latency = {"mean": 1e9 / rate, "percentile": percentiles}
    return {
        "bw_bytes": rate * 1e6,
        "iops": rate,
        "total_ios": ios,
        "lat_ns": latency,
        "clat_ns": latency,
    }


def entry(name: str, trial: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "jobname": name,
        "trial": trial,
        "error": 0,
        "read": direction(rate),
        "write": {"total_ios": 0},
        **more,
    }


def write(path: Path, *entries: dict[str, Any], **more: Any) -> Path:
    path.write_text(json.dumps({"jobs": entries, **more}))
    return path


def test_trials_of_a_job_are_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", *(entry("a", trial, 10.0 * trial) for trial in (1, 2, 3)))
    (line,) = lines_of(read_results(path))
    assert (line.label, line.latency) == ("a", "lat")
    assert line.rates_MBps == {1: 10.0, 2: 20.0, 3: 30.0}
    # Of a thousand I/Os one takes longer than 99.9 %.
    assert [percent for percent, *_ in line.percentiles] == [1.0, 50.0, 99.0, 99.9]
    assert line.percentiles[1] == pytest.approx((50.0, 50 / 30, 50 / 20, 50 / 10))


def test_a_job_that_reads_and_writes_is_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", entry("a", 1, 10.0, write=direction(5.0)))
    assert [line.label for line in lines_of(read_results(path))] == ["a read", "a write"]


def test_failed_trials_are_left_out(tmp_path: Path) -> None:
    failed = entry("a", 1, 10.0, error=1, error_text="no daemon")
    path = write(tmp_path / "a.json", failed, entry("a", 2, 20.0))
    (line,) = lines_of(read_results(path))
    assert line.rates_MBps == {2: 20.0}


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "head"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture_is_drawn(
    suffix: str, head: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    jobs = [entry(f"job-{job}", trial, 10.0 + job) for job in range(20) for trial in (1, 2)]
    path = write(tmp_path / "a.json", *jobs, machine={"cpu": "x", "cpus": 2}, warnings=["w"])
    output = tmp_path / f"picture.{suffix}"
    assert main(["plot", str(path), f"--output={output}"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    drawn = output.read_bytes()
    assert drawn.startswith(head)
    assert main(["plot", str(path)]) == 0
    assert (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output=a.jpeg"], "--output=a.jpeg: must end in .png, .svg, .pdf"),
        (["--output=/nowhere/a.svg"], "--output=/nowhere/a.svg: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_drawn_ends_with_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = write(tmp_path / "a.json", entry("a", 1, 10.0))
    assert main(["plot", str(path), *words]) == 2
    assert said in capsys.readouterr().err


def test_nothing_to_draw_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", entry("a", 1, 10.0, error=1))
    assert main(["plot", str(path)]) == 2
    assert "all jobs have failed" in capsys.readouterr().err


def test_without_matplotlib_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / "a.json", entry("a", 1, 10.0))
    assert main(["plot", str(path)]) == 2
    assert "needs matplotlib: pip install 'dualpath-kvstore[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()
