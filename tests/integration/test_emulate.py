"""`kvbench emulate` as it is typed: real processes on shaped links, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.generate import generate
from tests.support.orphans import has_ended
from tests.support.shaped import require_shaping

COMMAND = [sys.executable, "-m", "kvstore_bench", "emulate"]
TIMEOUT_S = 240.0
# A few MB, so that it ends soon on a machine that is busy.
SMALL = ["--sessions=3", "--turns=4", "--token-scale=16", "--bytes-per-token=256",
         "--storage-nic=100Mbit/s"]  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Sessions to play."""
    path = tmp_path / "sessions.json"
    generate(path, "32k", 3, 1)
    return str(path)


def emulate(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def children_of(pid: int) -> list[int]:
    """Processes that it has started, and theirs."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found += [child, *children_of(child)]
    return found


def engines(pids: Sequence[int]) -> int:
    """How many of them are engines."""
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found += b"kvstore_bench.emulate.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


def figures(path: Path, policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The runs by their policies; none is void."""
    document = json.loads(path.read_text())
    runs = {run["policy"]: run for run in document["runs"]}
    assert list(runs) == list(policies)
    for run in runs.values():
        assert (run["wrong_blocks"], run["missed_blocks"], run["errors"]) == (0, 0, [])
        assert run["turns"] == document["work"]["turns"]
        assert run["jct_s"] > 0
    return runs


@pytest.mark.slow
def test_policies_do_the_same_work_by_other_ways(tmp_path: Path, trace: str) -> None:
    require_shaping()
    out, plot = tmp_path / "runs.json", tmp_path / "runs.svg"
    policies = ("direct", "round_robin", "oracle")
    done = emulate(
        *(trace, *SMALL, f"--policies={','.join(policies)}"),
        *("--json", str(out), "--plot", str(plot)),
    )
    assert done.returncode == 0, done.stderr
    runs = figures(out, policies)
    work = json.loads(out.read_text())["work"]

    direct, both = runs["direct"], runs["round_robin"]
    for run in (direct, both):
        paths = run["bytes_by_path"]
        assert sum(paths.values()) == work["hit_bytes"]
        # What counters of the kernel say bears out what the program says of itself.
        links = run["link_bytes"]
        assert links["prefill0"]["storage_rx"] >= paths["direct"]
        assert links["decode0"]["storage_rx"] >= paths["relay"]
        assert links["decode0"]["storage_tx"] >= work["new_bytes"]
        assert links["prefill0"]["compute_rx"] >= paths["relay"]
    assert direct["bytes_by_path"]["relay"] == 0
    assert both["bytes_by_path"]["relay"] > 0
    assert direct["link_bytes"]["decode0"]["storage_rx"] < work["hit_bytes"] / 2
    # The whole prompt comes to the decode node by the compute network, but for what it relayed.
    assert direct["link_bytes"]["decode0"]["compute_rx"] >= work["hit_bytes"]

    oracle = runs["oracle"]
    assert oracle["link_bytes"] == {}
    assert oracle["jct_s"] < direct["jct_s"]
    assert plot.read_text().lstrip().startswith("<?xml")
    for word in (*policies, "scaled:", "ideal times:"):
        assert word in done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_several_nodes_take_turns(tmp_path: Path, trace: str) -> None:
    require_shaping()
    out = tmp_path / "runs.json"
    done = emulate(
        *(trace, *SMALL, "--prefill=2", "--decode=2", "--storage=2", "--policies=balanced"),
        *("--no-overlap", "--arrival-rate=20", "--json", str(out)),
    )
    assert done.returncode == 0, done.stderr
    (run,) = figures(out, ["balanced"]).values()
    for node in ("prefill0", "prefill1"):
        assert run["link_bytes"][node]["compute_tx"] > 0, "turns go to every prefill node"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, trace: str, number: signal.Signals) -> None:
    require_shaping()
    mark = str(tmp_path / "no-such-file.json")
    process = subprocess.Popen(
        [*COMMAND, trace, *SMALL, "--policies=direct", "--storage-nic=2Mbit/s", "--json", mark],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # Everything is up when the engines are.
        deadline_s = time.monotonic() + TIMEOUT_S
        while engines(children := children_of(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (130, -number, 128 + number)
    assert all(map(has_ended, children))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies=best"], "--policies=best: is none of"),
        (["--plot=x.gif"], "--plot"),
        (["/no/such/trace.json"], "/no/such/trace.json"),
    ],
)
def test_what_cannot_be_is_named(words: list[str], message: str) -> None:
    done = emulate(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches() -> None:
    text = emulate("--help").stdout
    for word in ("--token-scale", "oracle", "examples:", "exit status", "namespaces"):
        assert word in text
