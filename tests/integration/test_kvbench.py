"""`kvbench run` with real processes: workers, daemons, sockets, signals."""

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

from kvstore_bench.daemons import LOOPBACK, Command, DaemonFailed, Daemons, Servers
from kvstore_bench.job import Job
from kvstore_bench.jobservers import servers_of
from tests.support.orphans import TIMEOUT_S, has_ended
from tests.support.tree import ROOT

pytestmark = pytest.mark.slow

LIMITS = str(ROOT / "bench" / "jobs" / "limits.ini")
SMALL = ["--bs=64k", "--batch=4", "--size=8m", "--iodepth=2"]


def kvbench(*words: str, command: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore_bench", command, *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_json(*words: str, status: int = 0) -> dict[str, Any]:
    done = kvbench(*words, "--output-format=json")
    assert done.returncode == status, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def children(pid: int) -> set[int]:
    """All living descendants of a process."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | children(child)
    return found


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("engine", ["null", "raw"])
@pytest.mark.parametrize("rw", ["read", "write"])
def test_engines_without_a_daemon_move_size_once(engine: str, rw: str) -> None:
    (job,) = run_json("--name=a", f"--ioengine={engine}", f"--rw={rw}", *SMALL)["jobs"]
    assert job["error"] == 0
    assert job[rw]["io_bytes"] == 8 << 20
    # An I/O of raw is a block, of null a batch.
    assert job[rw]["total_ios"] == (128 if engine == "raw" else 32)
    assert job["cpu"]["server_s"] is None if engine == "null" else job["cpu"]["server_s"] > 0
    assert job[rw]["transports"] == ({} if engine == "null" else {"tcp": 8 << 20})


@pytest.mark.parametrize("rw", ["read", "write", "randread", "randwrite", "rw", "randrw"])
def test_every_kind_of_job_runs_against_a_daemon_of_its_own(rw: str) -> None:
    words = ["--name=a", f"--rw={rw}", "--verify=1", "--layers=2", "--order=layer", *SMALL]
    (job,) = run_json(*words)["jobs"]
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    assert moved == 8 << 20
    assert (job["read"]["io_bytes"] > 0) == (rw not in ("write", "randwrite"))
    assert (job["write"]["io_bytes"] > 0) == (rw not in ("read", "randread"))
    assert sum(job["blocks"]["outcomes"].values()) == 128
    assert set(job["blocks"]["outcomes"]) <= {"hit", "stored"}
    assert job["blocks"]["checked"] > 0
    assert job["blocks"]["wrong"] == 0
    assert job["cpu"]["server_s"] > 0


@pytest.mark.parametrize(
    ("path", "asked", "transport"),
    [
        ("direct", "auto", "tcp"),
        ("direct", "tcp", "tcp"),
        ("direct", "unix", "unix"),
        ("direct", "shm", "shm"),
        ("agent", "auto", "shm"),
        ("agent", "unix", "unix"),
        ("agent", "shm", "shm"),
    ],
)
def test_both_directions_go_by_each_transport_and_say_so(
    path: str, asked: str, transport: str
) -> None:
    words = ["--name=a", "--rw=randrw", f"--path={path}", f"--transport={asked}", "--verify=1"]
    (job,) = run_json(*words, "--layers=2", "--order=layer", *SMALL)["jobs"]
    assert job["job options"]["transport"] == asked
    for direction in (job["read"], job["write"]):
        assert direction["io_bytes"] > 0
        assert direction["transports"] == {transport: direction["io_bytes"]}
        assert direction["paths"] == {path: direction["io_bytes"]}
    assert set(job["blocks"]["outcomes"]) == {"hit", "stored"}
    assert job["blocks"]["checked"] * 64 * 1024 == job["read"]["io_bytes"]
    assert job["blocks"]["wrong"] == 0
    assert job["cpu"]["server_s"] > 0


@pytest.mark.parametrize("asked", ["auto", "tcp"])
def test_reads_go_by_a_relay_and_say_so(asked: str) -> None:
    words = ["--name=a", "--path=relay", f"--transport={asked}", "--verify=1", *SMALL]
    (job,) = run_json(*words)["jobs"]
    assert job["read"]["io_bytes"] == 8 << 20
    assert job["read"]["transports"]["tcp"] >= 8 << 20
    assert job["read"]["transports"].keys() == {"tcp"}
    # What a relay on a busy machine is much too late with comes directly, as well.
    assert job["read"]["paths"]["relay"] > 0
    assert job["blocks"]["checked"] == 128
    assert job["blocks"]["wrong"] == 0


@pytest.mark.parametrize("words", [["--spin=2"], ["--spin=2", "--spin_outside"]])
def test_a_job_runs_beside_threads_that_spin_and_names_them(words: list[str]) -> None:
    # For as long as it takes a thread that never rests to be given a processor.
    words = [*words, "--runtime=500ms", "--time_based", "--verify=1", *SMALL]
    (job,) = run_json("--name=a", "--rw=randread", *words)["jobs"]
    assert job["spin"]["threads"] == 2
    assert job["spin"]["outside"] == ("--spin_outside" in words)
    assert job["spin"]["cpu_s"] > 0
    assert job["read"]["io_bytes"] > 0
    assert job["blocks"]["wrong"] == 0


@pytest.mark.long
@pytest.mark.parametrize("asked", ["auto", "shm"])
def test_blocks_are_read_where_they_lie(asked: str) -> None:
    words = ["--name=a", "--rw=randread", "--path=views", f"--transport={asked}", *SMALL]
    (job,) = run_json(*words, "--verify=1")["jobs"]
    assert job["read"]["io_bytes"] == 8 << 20
    assert job["read"]["transports"] == {"shm": 8 << 20}
    assert job["read"]["paths"] == {"views": 8 << 20}
    assert job["blocks"] == {"outcomes": {"hit": 128}, "checked": 128, "wrong": 0}
    assert job["views"]["verify_us_mean"] > 0
    (job,) = run_json(*words, "--verify_checksums=0")["jobs"]
    assert job["blocks"] == {"outcomes": {"hit": 128}, "checked": 0, "wrong": 0}


@pytest.mark.asyncio
async def test_a_daemon_for_all_pools_gives_no_views() -> None:
    async with Daemons(1, 32 << 20, (), f"unix://@kvbench-views-{os.getpid()}") as daemons:
        words = ["--name=a", "--path=views", f"--endpoint={daemons.endpoints[0]}", *SMALL]
        (job,) = run_json(*words, status=1)["jobs"]
        assert "--pool" in job["error_text"]


def test_a_job_runs_by_an_agent_with_room_for_all() -> None:
    words = ["--name=a", "--path=agent", "--transport=shm", "--held", "--verify=1", *SMALL]
    (job,) = run_json(*words)["jobs"]
    assert job["read"]["io_bytes"] == 8 << 20
    assert job["read"]["paths"] == {"agent": 8 << 20}


@pytest.mark.parametrize("path", ["direct", "agent"])
def test_without_checksums_every_byte_may_still_be_compared(path: str) -> None:
    words = ["--name=a", "--rw=randrw", f"--path={path}", "--transport=shm"]
    (job,) = run_json(*words, "--verify_checksums=0", "--verify=1", *SMALL)["jobs"]
    assert job["job options"]["verify_checksums"] == "0"
    assert job["blocks"]["checked"] > 0
    assert job["blocks"]["wrong"] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--transport=tcp", "--order=layer"],
        ["--transport=tcp", "--order=block"],
        ["--transport=shm", "--order=layer"],
        ["--path=relay"],
        ["--path=agent"],
    ],
)
def test_blocks_of_a_model_go_into_tensors_of_layers(words: list[str]) -> None:
    rw = "read" if "--path=relay" in words else "randrw"
    words = [*words, "--model=qwen3-30b-a3b", "--page_tokens=2", "--layout=layer", f"--rw={rw}"]
    words += ["--batch=4", "--size=8m", "--iodepth=2", "--verify=1"]
    (job,) = run_json("--name=a", *words)["jobs"]
    assert (job["job options"]["bs"], job["job options"]["layers"]) == ("196608", "48")
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    assert moved == (8 << 20) // 786432 * 786432
    assert job["blocks"]["checked"] > 0
    assert job["blocks"]["wrong"] == 0


@pytest.mark.parametrize("path", ["direct", "relay", "agent"])
def test_the_first_layers_are_there_before_the_others(path: str) -> None:
    words = ["--name=a", "--layers=4", "--order=layer", "--group_layers=2", f"--path={path}"]
    (job,) = run_json(*words, "--verify=1", *SMALL)["jobs"]
    read = job["read"]
    assert read["first_ns"]["N"] == read["total_ios"] == 32
    assert 0 < read["first_ns"]["mean"] < read["lat_ns"]["mean"]
    assert job["blocks"]["wrong"] == 0


@pytest.mark.parametrize("path", ["direct", "relay", "agent", "views"])
def test_what_was_never_stored_is_a_miss_on_every_path(path: str) -> None:
    words = ["--name=a", "--rw=randread", f"--path={path}", "--hit_rate=62.5", "--verify=1"]
    (job,) = run_json(*words, *SMALL)["jobs"]
    assert job["error"] == 0
    assert job["blocks"]["outcomes"] == {"hit": 80, "miss": 48}
    assert job["hit_rate"] == {"asked": 62.5, "percent": 62.5}
    assert (job["blocks"]["checked"], job["blocks"]["wrong"]) == (80, 0)
    assert (job["read"]["io_bytes"], job["read"]["short_ios"]) == (5 << 20, 0)


def test_ios_of_a_rate_begin_when_they_are_due() -> None:
    words = ["--name=a", "--rw=randrw", "--rate_iops=100", "--rate_process=poisson", *SMALL]
    (job,) = run_json(*words, "--runtime=1", "--time_based", "--verify=1")["jobs"]
    ios = job["read"]["total_ios"] + job["write"]["total_ios"]
    # Poisson: ten standard deviations. A machine that stalls does fewer.
    assert 0 < ios < 200
    assert job["rate"]["process"] == "poisson"
    assert job["rate"]["iops_asked"] == 100
    for direction in (job["read"], job["write"]):
        assert direction["wait_ns"]["N"] == direction["total_ios"]
        parts = sum(direction[name]["mean"] for name in ("wait_ns", "slat_ns", "clat_ns"))
        assert direction["lat_ns"]["mean"] == pytest.approx(parts)


def test_a_rate_that_cannot_be_kept_says_so() -> None:
    words = ["--ioengine=null", "--rate_iops=1000000", "--runtime=300ms", "--time_based"]
    done = kvbench("--name=a", *words, *SMALL)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rate +: asked 1000000 IOPS, did \d+; fell behind: 0\.\d+ s", done.stdout)
    assert "lat percentiles" in done.stdout


def test_reads_go_by_both_paths_as_the_selector_decides() -> None:
    words = ["--name=a", "--path=auto", "--rw=randrw", "--verify=1", *SMALL]
    (job,) = run_json(*words)["jobs"]
    assert job["blocks"]["wrong"] == 0
    # How much goes by which depends on the machine.
    assert set(job["read"]["paths"]) <= {"direct", "relay"}
    assert job["write"]["paths"].keys() == {"direct"}


@pytest.mark.asyncio
async def test_agents_that_run_already_are_relays() -> None:
    async with Daemons(1, 64 << 20) as daemons:
        options = ("--storage", daemons.endpoints[0], "--node-id", "given")
        agent = Command(
            "kvagent", "kvstore_client.agent", (*options, "--listen", LOOPBACK), 1 << 24
        )
        async with Servers([agent]) as agents:
            words = ["--name=a", "--path=relay", "--verify=1", *SMALL]
            words.append(f"--endpoint={daemons.endpoints[0]}")
            words.append(f"--relay={agents.endpoints[0]}")
            (job,) = run_json(*words)["jobs"]
    assert job["read"]["paths"]["relay"] > 0
    assert job["cpu"]["server_s"] is None
    assert job["blocks"]["wrong"] == 0


@pytest.mark.asyncio
async def test_a_fallback_is_no_result_where_a_transport_is_required() -> None:
    async with Daemons(1, 32 << 20) as daemons:
        words = ["--name=a", f"--endpoint={daemons.endpoints[0]}", *SMALL]
        (job,) = run_json(*words, "--require_transport=tcp,shm")["jobs"]
        assert job["read"]["transports"] == {"tcp": 8 << 20}
        (job,) = run_json(*words, "--require_transport=shm,rdma", status=1)["jobs"]
    assert "bytes travelled by tcp: require_transport=rdma,shm was asked for" in job["error_text"]


def test_clones_share_memory_with_one_daemon() -> None:
    words = ["--name=a", "--rw=randread", "--transport=shm", "--numjobs=2", "--verify=1", *SMALL]
    (job,) = run_json(*words)["jobs"]
    assert job["read"]["transports"] == {"shm": 2 * (8 << 20)}
    assert job["blocks"]["wrong"] == 0


@pytest.mark.long
@pytest.mark.asyncio
async def test_what_a_given_daemon_offers_is_used_and_nothing_else_instead() -> None:
    # An abstract one: a temporary directory's path may be too long for a socket.
    listen = f"unix://@kvbench-{os.getpid()}"
    async with Daemons(1, 32 << 20, (), listen) as by_unix, Daemons(1, 32 << 20) as by_tcp:
        words = ["--name=a", "--verify=1", *SMALL]
        for daemons, transport in ((by_unix, "shm"), (by_tcp, "tcp")):
            endpoint = f"--endpoint={daemons.endpoints[0]}"
            (job,) = run_json(*words, endpoint)["jobs"]
            assert job["read"]["transports"] == {transport: 8 << 20}
        (job,) = run_json(*words, endpoint, "--transport=shm", status=1)["jobs"]
        assert "transport=shm, and nothing else is to be used" in job["error_text"]
        # By an agent of the job's own, whose storage is the daemon that was given.
        (job,) = run_json(*words, "--rw=randrw", "--path=agent", endpoint)["jobs"]
        assert job["read"]["paths"].keys() == job["write"]["paths"].keys() == {"agent"}
        assert job["cpu"]["server_s"] is None


@pytest.mark.asyncio
async def test_sockets_lie_in_a_folder_of_our_own_that_ends_with_the_job() -> None:
    job = Job(name="a", size=16 << 20, path="agent", transport="shm")
    async with servers_of(job) as servers:
        (endpoint,) = servers.endpoints
        folder = Path(endpoint.removeprefix("unix://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {one.name for one in folder.iterdir()} == {"kvstored", "kvagent"}
        assert len(servers.pids) == 2
        assert servers.failures() == ""
    assert not folder.exists()
    assert all(map(has_ended, servers.pids))


@pytest.mark.asyncio
async def test_an_agent_that_dies_ends_the_job() -> None:
    words = ["--runtime=600", "--time_based", "--eta=always", "--path=agent", *SMALL]
    with started("--name=a", *words) as bench:
        wait_for(bench, rb"\[r=[0-9.]+[KMG]iB/s\]")
        (agent,) = (pid for pid in children(bench.pid) if b"client.agent" in command_line(pid))
        os.kill(agent, signal.SIGKILL)
        output, _ = bench.communicate(timeout=TIMEOUT_S)
    assert bench.returncode == 1
    assert b"error: kvagent ended with signal 9" in output


@pytest.mark.long
def test_writes_beyond_the_arena_are_stored_and_evict() -> None:
    words = ["--name=a", "--rw=randwrite", "--runtime=500ms", "--time_based", "--verify=1", *SMALL]
    (job,) = run_json(*words)["jobs"]
    assert set(job["blocks"]["outcomes"]) == {"stored"}
    assert job["write"]["io_bytes"] > 8 << 20
    assert 0 < job["blocks"]["checked"] <= 128
    assert job["blocks"]["wrong"] == 0


@pytest.mark.long
def test_clones_add_up() -> None:
    (job,) = run_json("--name=a", "--rw=randread", "--numjobs=3", "--verify=1", *SMALL)["jobs"]
    assert job["read"]["io_bytes"] == 3 * (8 << 20)
    assert job["read"]["lat_ns"]["N"] == 3 * 32
    assert job["blocks"]["wrong"] == 0


@pytest.mark.asyncio
async def test_clones_are_processes_that_share_one_daemon() -> None:
    words = ["--runtime=600", "--time_based", "--eta=always", "--numjobs=3", *SMALL]
    with started("--name=a", *words) as bench:
        wait_for(bench, rb"\[r=[0-9.]+[KMG]iB/s\]")
        lines = [command_line(pid) for pid in children(bench.pid)]
        bench.terminate()
        bench.communicate(timeout=TIMEOUT_S)
    assert sum(b"kvstore_bench.worker" in line for line in lines) == 3
    assert sum(b"kvstore_daemon" in line for line in lines) == 1


@pytest.mark.long
def test_results_are_compared_and_drawn(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        words = ["--name=a", "--ioengine=null", "--trials=3", f"--output={path}", *SMALL]
        assert kvbench(*words, "--output-format=json").returncode == 0
    done = kvbench(*paths, command="compare")
    # The tool's own cost differs as the machine does.
    assert done.returncode in (0, 1), done.stderr
    assert re.search(r"^a +read bandwidth .*(same|noise|better|worse)", done.stdout, re.MULTILINE)
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    done = kvbench(paths[0], command="plot")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a.svg'}\n"), done.stderr


@pytest.mark.long
def test_the_three_jobs_of_limits_come_in_one_json_with_their_ratios(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    words = ["--size=32m", "--runtime=200ms", "--ramp_time=50ms", "--trials=2"]
    done = kvbench(LIMITS, *words, "--output-format=json+", f"--output={path}")
    assert (done.returncode, done.stdout) == (0, "")
    # A busy machine may be told of, also by asyncio's debug mode, and nothing else.
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert all(line.startswith("kvbench run: unstable: ") for line in warnings), done.stderr
    document = json.loads(path.read_text())
    names = [(job["jobname"], job["trial"]) for job in document["jobs"]]
    assert names == [(name, t) for t in (1, 2) for name in ("raw", "kv-read", "kv-write")]
    assert [job["groupid"] for job in document["jobs"]] == [0, 1, 2, 0, 1, 2]
    raw, read, write = document["summary"]
    assert raw["ratio"] == 1.0
    for entry in (read, write):
        assert entry["ratio"] > 0
        assert entry["cpu_s_per_gib"] > 0
    assert document["jobs"][1]["read"]["clat_ns"]["bins"]


def test_jobs_of_a_group_run_side_by_side_and_are_reported_for_people() -> None:
    done = kvbench(
        *(*SMALL, "--name=a", "--rw=read", "--name=b", "--rw=write"),
        *("--name=c", "--ioengine=null", "--stonewall", "--eta=always"),
    )
    assert done.returncode == 0, done.stderr
    assert "Run status group 0 (all jobs):\n   READ: bw=" in done.stdout
    assert "Run status group 1 (all jobs):" in done.stdout
    assert "clat percentiles" in done.stdout
    assert "store working set" in done.stderr


@pytest.mark.long
@pytest.mark.asyncio
async def test_jobs_leave_nothing_on_daemons_that_they_were_given() -> None:
    async with Daemons(2, 32 << 20) as daemons:
        words = ["--name=a", "--rw=randrw", "--verify=1", *SMALL]
        words.append(f"--endpoint={','.join(daemons.endpoints)}")
        for _ in range(2):
            (job,) = run_json(*words)["jobs"]
            assert set(job["blocks"]["outcomes"]) == {"hit", "stored"}
            assert job["cpu"]["server_s"] is None
        from kvstore_client import AsyncClient

        async with AsyncClient(daemons.endpoints) as client:
            for status in (await client.status()).values():
                assert not isinstance(status, Exception)
                buffers = status.report.buffers
                assert buffers.free_bytes == buffers.total_bytes


def test_a_daemon_that_is_not_there_is_a_failed_job() -> None:
    document = run_json("--name=a", "--endpoint=unix:///nowhere/k.sock", *SMALL, status=1)
    (job,) = document["jobs"]
    assert job["error"] == 1
    assert "unix:///nowhere/k.sock" in job["error_text"]
    assert job["read"]["total_ios"] == job["write"]["total_ios"] == 0
    assert "cpu" not in job


@pytest.mark.asyncio
async def test_blocks_that_were_evicted_are_misses_and_do_not_count() -> None:
    async with Daemons(1, 4 << 20) as daemons:
        words = ["--name=a", f"--endpoint={daemons.endpoints[0]}", *SMALL]
        (job,) = run_json(*words)["jobs"]
    assert job["error"] == 0
    assert job["blocks"]["outcomes"]["miss"] >= 64
    assert job["read"]["io_bytes"] <= 4 << 20
    assert job["read"]["short_ios"] >= 16
    assert job["read"]["total_ios"] == 32


@pytest.mark.asyncio
async def test_a_daemon_that_dies_ends_the_job() -> None:
    async with Daemons(1, 64 << 20) as daemons:
        words = ["--name=a", "--rw=randread", "--runtime=600", "--time_based", "--eta=always"]
        words += [f"--endpoint={daemons.endpoints[0]}", *SMALL]
        with started(*words) as bench:
            wait_for(bench, rb"\[r=[0-9.]+[KMG]iB/s\]")
            os.kill(daemons.pids[0], signal.SIGKILL)
            output, _ = bench.communicate(timeout=TIMEOUT_S)
    assert bench.returncode == 1
    assert re.search(rb"error: read: \d of 4 blocks UNAVAILABLE", output)


def started(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvstore_bench", "run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen[bytes], pattern: bytes) -> None:
    """Read standard error until a pattern comes."""
    assert process.stderr is not None
    seen = b""
    while not re.search(pattern, seen):
        part = os.read(process.stderr.fileno(), 4096)
        assert part, f"ended without {pattern!r}: {seen!r}"
        seen += part


@pytest.mark.parametrize("moment", [rb"start", rb"\[r=[0-9.]+[KMG]iB/s\]"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_no_process_is_left_however_it_ends(
    number: signal.Signals, status: int, moment: bytes
) -> None:
    words = ["--runtime=600", "--time_based", "--eta=always", *SMALL]
    with started(*words, "--name=a", "--name=b", "--ioengine=raw") as bench:
        wait_for(bench, moment)
        family = children(bench.pid)
        bench.send_signal(number)
        _, said = bench.communicate(timeout=TIMEOUT_S)
    assert bench.returncode == status
    assert number == signal.SIGKILL or signal.Signals(number).name.encode() in said
    assert moment == b"start" or len(family) >= 4
    assert all(map(has_ended, family))


@pytest.mark.asyncio
async def test_daemons_that_cannot_start_say_why() -> None:
    with pytest.raises(DaemonFailed, match=r"kvstored 0 ended with status 2:\n.*nonsense"):
        async with Daemons(2, 1 << 20, ["--nonsense"]):
            pass


@pytest.mark.asyncio
async def test_daemons_listen_and_are_gone_afterwards() -> None:
    async with Daemons(2, 1 << 20) as daemons:
        assert len(set(daemons.endpoints)) == 2
        assert daemons.failures() == []
        used = daemons.cpu_ns()
        assert used is not None
        assert used > 0
    assert all(map(has_ended, daemons.pids))
