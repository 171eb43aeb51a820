"""bench/peers as a command: ours and what of the others is here, with tiny sizes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peers.catalogue import BY_NAME
from peers.harness import main
from tests.support.orphans import TIMEOUT_S, has_ended
from tests.support.tree import ROOT

RUN = ROOT / "bench" / "peers" / "run"
# 16 blocks of 4 KiB a batch: eight batches that are read, four that are written.
SMALL = ["--bs", "4KiB", "--set", "512KiB", "--writes", "256KiB", "--seconds", "0.02"]
BLOCKS = (8 + 4) * 16
OURS = ["raw", "kv-tcp", "kv-unix", "kv-shm"]
# Those that need a program of the distribution and nothing else.
OTHERS = ["redis-bare", "redis-bare-unix", "memcached-bare"]


def measured(tmp_path: Path, *words: str, status: int = 0) -> dict[str, Any]:
    """What a run in this process wrote."""
    path = tmp_path / "peers.json"
    venvs = ["--venvs", str(tmp_path / "venvs")]
    assert main([*SMALL, *venvs, *words, "--json", str(path)]) == status
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def checked(found: dict[str, Any], names: list[str], trials: int) -> None:
    """Every byte was compared, and each section has what a table needs."""
    assert found["failed"] == {}
    assert {cell["peer"] for cell in found["cells"]} == set(names)
    for name in names:
        cells = [cell for cell in found["cells"] if cell["peer"] == name]
        assert sorted((cell["depth"], cell["trial"]) for cell in cells) == [
            (depth, trial) for depth in (1, 2) for trial in range(1, trials + 1)
        ]
        assert found["wrong_blocks"][name] == 0
        # All of it in the end, and beside it at least a batch of every timed part.
        assert found["checked_blocks"][name] >= BLOCKS + 2 * trials * 16
        for cell in cells:
            for section in (cell["get"], cell["put"]):
                assert section["bytes"] > 0
                assert section["bytes"] % (16 * 4096) == 0
                assert section["seconds"] > 0
                assert section["client_s"] > 0
                assert section["server_s"] > 0
        assert found["versions"][name]


@pytest.mark.slow
def test_ours_and_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(tmp_path, "--peers", *OURS, "--trials", "2")
    assert (found["format"], found["version"]) == ("kvbench-peers", 1)
    checked(found, OURS, trials=2)
    said = capsys.readouterr().out
    # Reads and writes at two depths, and the summary.
    assert said.count("| `kv-shm` ") == 2 * 2 + 1
    assert re.search(r"^kv-shm: kvstored .*; \d+ blocks compared, 0 wrong$", said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_others_beside_ours(tmp_path: Path, name: str) -> None:
    if missing := BY_NAME[name].missing(tmp_path):
        pytest.skip(f"needs {missing}")
    checked(measured(tmp_path, "--peers", name, "kv-tcp", "--trials", "1"), [name, "kv-tcp"], 1)


@pytest.mark.slow
def test_what_is_missing_is_named_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peers.catalogue.program_path", lambda name: "")
    found = measured(tmp_path, "--trials", "1")
    checked(found, OURS, trials=1)
    assert set(found["missing"]) == set(BY_NAME) - set(OURS)
    said = capsys.readouterr().out
    assert re.search(r"^redis-bare: NOT MEASURED, needs .*apt-get install", said, re.MULTILINE)
    assert re.search(r"^lmcache: NOT MEASURED, needs .*bench/peers/prepare", said, re.MULTILINE)


def test_a_peer_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    found = measured(tmp_path, "--peers", "mooncake", "--trials", "1", status=1)
    assert set(found["missing"]) == {"mooncake"}
    assert found["cells"] == []


def test_an_environment_that_lacks_its_library_says_so(tmp_path: Path) -> None:
    venv = tmp_path / "venvs" / "mooncake"
    (venv / "bin").mkdir(parents=True)
    (venv / "ready").touch()
    # Not a link: an interpreter finds what lies beside the one that it was started as.
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    found = measured(tmp_path, "--peers", "mooncake", "--trials", "1", status=1)
    assert "mooncake-transfer-engine-non-cuda" in found["missing"]["mooncake"]


def test_a_peer_whose_process_does_not_start_fails_alone(tmp_path: Path) -> None:
    venv = tmp_path / "venvs" / "mooncake"
    (venv / "bin").mkdir(parents=True)
    (venv / "ready").touch()
    (venv / "bin" / "python").write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    (venv / "bin" / "python").chmod(0o755)
    found = measured(tmp_path, "--peers", "mooncake", "raw", "--trials", "1", status=1)
    assert "its process ended\n    no such thing" in found["failed"]["mooncake"]
    assert {cell["peer"] for cell in found["cells"]} == {"raw"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peers", "redis", "cassandra"], "cassandra"),
        (["--bs", "12"], "multiple of 8"),
        (["--trials", "0"], "--trials"),
        (["--json", "/nowhere/f"], "/nowhere"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def family_of(pid: int) -> list[int]:
    """All children of a process, and theirs."""
    found = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [other for child in found for other in family_of(child)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_no_server_is_left_however_it_ends(number: signal.Signals, status: int) -> None:
    names = ["raw", "kv-tcp"]
    names += [name for name in OTHERS if not BY_NAME[name].missing(Path("/nowhere"))]
    with subprocess.Popen(
        [RUN, *SMALL, "--seconds", "60", "--eta", "always", "--peers", *names],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        assert run.stderr is not None
        seen = b""
        while b"trial 1/" not in seen:
            part = os.read(run.stderr.fileno(), 4096)
            assert part, seen
            seen += part
        family = family_of(run.pid)
        run.send_signal(number)
        _, said = run.communicate(timeout=TIMEOUT_S)
    # A client and a server each.
    assert len(family) == 2 * len(names)
    assert run.returncode == status
    assert number == signal.SIGKILL or signal.Signals(number).name.encode() in said
    assert all(map(has_ended, family))
