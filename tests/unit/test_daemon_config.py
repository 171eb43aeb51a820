"""Options of the daemon, the memory they ask for, its log, and the unit that starts it."""

from __future__ import annotations

import gc
import io
import logging
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.serving import ServerOptions
from kvstore.version import VERSION
from kvstore_daemon.__main__ import main
from kvstore_daemon.config import LISTENERS_MAX, Config, parse_config
from kvstore_daemon.memory import (
    PROCESS_BYTES,
    SystemMemory,
    TouchProgress,
    check_memory,
    read_system_memory,
)
from kvstore_daemon.process import (
    LogFormatter,
    printable,
    raise_descriptor_limit,
    settle_garbage,
)
from tests.support.tree import ROOT

MIB, GIB, TIB = 1024**2, 1024**3, 1024**4


def parse(*arguments: str) -> Config:
    return parse_config(arguments, "host", 123)


def test_defaults() -> None:
    assert parse() == Config(
        endpoints=(parse_endpoint("tcp://127.0.0.1:7450"),),
        memory_bytes=GIB,
        node_id="host:7450",
        pool_capacities={},
        drain_s=30.0,
        insecure=False,
        log_level="info",
    )
    assert parse().drain_s == ServerOptions(node_id="n").drain_s


def test_everything_can_be_chosen() -> None:
    assert parse(
        *("--listen", "tcp://[::1]:0", "--listen", "unix:///run/kv.sock"),
        *("--memory", "512M", "--node-id", "kv-1", "--drain", "0.5", "--insecure"),
        *("--pool-capacity", "a=64MiB", "--pool-capacity=b.c=1g", "--log-level=debug"),
    ) == Config(
        endpoints=(parse_endpoint("tcp://[::1]:0"), parse_endpoint("unix:///run/kv.sock")),
        memory_bytes=512 * MIB,
        node_id="kv-1",
        pool_capacities={"a": 64 * MIB, "b.c": GIB},
        drain_s=0.5,
        insecure=True,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("uri", "node_id"),
    [
        ("tcp://127.0.0.1:7451", "host:7451"),
        ("unix:///run/kv.sock", "host:/run/kv.sock"),
        ("unix://@kv", "host:@kv"),
        ("tcp://127.0.0.1:0", "host:pid123"),
    ],
)
def test_daemons_of_one_host_have_different_names(uri: str, node_id: str) -> None:
    assert parse("--listen", uri).node_id == node_id


def test_several_ports_of_the_systems_choice_are_no_repetition() -> None:
    assert len(parse("--listen", "tcp://127.0.0.1:0", "--listen", "tcp://127.0.0.1:0").endpoints)


@pytest.mark.parametrize(
    ("arguments", "option", "remedy"),
    [
        (["--listen", "7450"], "--listen", "must be one of tcp://HOST:PORT"),
        (["--listen", "rdma://127.0.0.1:1"], "--listen", "scheme must be one of tcp, unix"),
        (["--listen", "tcp://127.0.0.1:1"] * 2, "--listen", "must be given once"),
        (["--listen", "unix:///a"] * 2, "--listen", "must be given once"),
        (["--listen", "tcp://127.0.0.1:0"] * (LISTENERS_MAX + 1), "--listen", "at most 16"),
        (["--memory", "lots"], "--memory", "a size is a number"),
        (["--memory", "-1"], "--memory", "a size is a number"),
        (["--memory", "1048575"], "--memory", "must be 1MiB to 15TiB"),
        (["--memory", "16TiB"], "--memory", "must be 1MiB to 15TiB"),
        (["--node-id", ""], "--node-id", "must be printable"),
        (["--node-id", "a b"], "--node-id", "without spaces"),
        (["--node-id", "a\nb"], "--node-id", "must be printable"),
        (["--node-id", "é" * 129], "--node-id", "at most 256 bytes"),
        (["--pool-capacity", "a"], "--pool-capacity", "must be NAME=SIZE"),
        (["--pool-capacity", "a b=1G"], "--pool-capacity", "letters, digits"),
        (["--pool-capacity", "=1G"], "--pool-capacity", "letters, digits"),
        (["--pool-capacity", "a=much"], "--pool-capacity a", "a size is a number"),
        (["--pool-capacity", "a=0"], "--pool-capacity", "must be at least 1 byte"),
        (["--pool-capacity", "a=1G", "--pool-capacity", "a=2G"], "--pool-capacity", "once"),
        (
            [f"--pool-capacity=p{number}=1G" for number in range(257)],
            "--pool-capacity",
            "at most 256 pools",
        ),
        (["--drain", "soon"], "--drain", "must be 0 to 3600 seconds"),
        (["--drain", "-1"], "--drain", "must be 0 to 3600 seconds"),
        (["--drain", "inf"], "--drain", "must be 0 to 3600 seconds"),
        (["--drain", "nan"], "--drain", "must be 0 to 3600 seconds"),
        (["--drain", "3601"], "--drain", "must be 0 to 3600 seconds"),
        (["--log-level", "loud"], "--log-level", "must be one of debug, info, warning, error"),
    ],
)
def test_refuses(
    arguments: list[str], option: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # With "=", as argparse would take a value like -1 for an option.
    joined = [
        f"{name}={value}" for name, value in zip(arguments[::2], arguments[1::2], strict=False)
    ]
    given = joined if len(arguments) == 2 else arguments
    with pytest.raises(ConfigError) as caught:
        parse(*given)
    assert caught.value.option == option
    assert remedy in caught.value.remedy
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"kvstored: error: {option}=")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frob"], "unrecognized arguments: --frob"),
        (["--mem", "1G"], "unrecognized arguments: --mem 1G"),
        (["--memory"], "--memory: expected one argument"),
        (["serve"], "unrecognized arguments: serve"),
    ],
)
def test_unknown_options_are_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("kvstored: error: ")
    assert words in said
    assert "kvstored --help" in said
    assert said.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvstored {VERSION}\n"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("listen", "memory", "node-id", "pool-capacity", "drain", "insecure", "version"):
        assert f"--{option}" in text


# --- memory ------------------------------------------------------------------------------------


def test_an_arena_that_fits_is_taken() -> None:
    check_memory(GIB, SystemMemory(available_bytes=GIB + PROCESS_BYTES))
    check_memory(GIB, SystemMemory(available_bytes=TIB, commit_left_bytes=TIB, group_bytes=TIB))


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (SystemMemory(available_bytes=GIB), "1GiB are available (MemAvailable"),
        (SystemMemory(available_bytes=GIB + PROCESS_BYTES - 1), "1.12GiB are available"),
        (SystemMemory(available_bytes=TIB, commit_left_bytes=512 * MIB), "512MiB may still be"),
        (SystemMemory(available_bytes=TIB, commit_left_bytes=-MIB), "0B may still be committed"),
        (SystemMemory(available_bytes=TIB, group_bytes=GIB), "1GiB are allowed to its control"),
    ],
)
def test_an_arena_that_does_not_fit_is_refused(memory: SystemMemory, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(GIB, memory)
    assert caught.value.option == "--memory"
    assert caught.value.value == "1GiB"
    assert words in caught.value.remedy
    assert "128MiB of them are for the process itself" in caught.value.remedy


def fake_system(root: Path, overcommit: int, group: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal:       2000 kB\nMemAvailable:   1000 kB\nCommitLimit:     900 kB\n"
        "Committed_AS:    200 kB\nHugePages_Total:       0\n"
    )
    (root / "proc/sys/vm/overcommit_memory").write_text(f"{overcommit}\n")
    (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{group}\n")
    return root


def test_reads_what_the_kernel_says(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 0, "/")
    assert read_system_memory(root) == SystemMemory(available_bytes=1000 * 1024)


def test_counts_promises_where_the_kernel_counts_them(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 2, "/")
    assert read_system_memory(root).commit_left_bytes == 700 * 1024


def test_the_lowest_limit_of_the_control_groups_around_us_counts(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 0, "/system.slice/kvstored.service")
    group = root / "sys/fs/cgroup/system.slice/kvstored.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("5000000\n")
    assert read_system_memory(root).group_bytes == 5_000_000
    (group / "memory.max").write_text("4000000\n")
    assert read_system_memory(root).group_bytes == 4_000_000


def test_this_system_can_be_asked() -> None:
    assert read_system_memory().available_bytes > 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_on_a_terminal_is_one_line_that_goes_away() -> None:
    terminal, clock = io.StringIO(), Clock()
    progress = TouchProgress(terminal, clock)
    progress(64 * MIB, GIB)
    assert terminal.getvalue() == ""
    clock.now = 0.1
    progress(128 * MIB, GIB)
    progress(192 * MIB, GIB)
    progress(GIB, GIB)
    line = "kvstored: arena: 128MiB of 1GiB touched"
    assert terminal.getvalue() == f"\r\x1b[K{line}\r\x1b[K"


def test_progress_in_a_log_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = TouchProgress(None, clock)
    for second in range(25):
        clock.now = float(second)
        progress(second * GIB, 100 * GIB)
    assert caplog.messages == [
        "arena: 10GiB of 100GiB touched",
        "arena: 20GiB of 100GiB touched",
    ]


# --- the process -------------------------------------------------------------------------------


def record(level: int, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("kvstore.x", level, __file__, 1, message, arguments, None)


def test_log_lines() -> None:
    plain = LogFormatter(timed=False)
    assert plain.format(record(logging.INFO, "listening on %s", "x")) == "kvstored: listening on x"
    assert plain.format(record(logging.WARNING, "odd")) == "kvstored: warning: odd"
    timed = LogFormatter(timed=True).format(record(logging.INFO, "up"))
    assert timed.endswith(" kvstored: up")
    assert timed[:2] == "20"


def test_peers_write_no_lines_into_the_log() -> None:
    line = LogFormatter(timed=False).format(record(logging.INFO, "from %s", "a\nkvstored: \x1b[2J"))
    assert line == "kvstored: from a\\nkvstored: \\x1b[2J"
    assert printable("größer als 1") == "größer als 1"


def test_the_limit_of_descriptors_is_raised_as_far_as_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_descriptor_limit(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
        raise_descriptor_limit(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert not caplog.messages
        if hard != resource.RLIM_INFINITY:
            raise_descriptor_limit(hard + 1)
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
            assert f"{hard} descriptors are allowed" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert soft <= hard or hard == resource.RLIM_INFINITY


def test_what_a_start_made_is_kept_out_of_garbage_collection() -> None:
    gc.unfreeze()
    try:
        settle_garbage()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


# --- the unit ----------------------------------------------------------------------------------

UNIT = ROOT / "systemd" / "kvstored.service"


def setting(name: str) -> str:
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith(f"{name}=")]
    return line.partition("=")[2]


def test_the_unit_starts_a_daemon_that_exists() -> None:
    assert setting("ExecStart") == "/usr/local/bin/kvstored $KVSTORED_OPTIONS"
    (assignment,) = shlex.split(setting("Environment"))
    name, _, options = assignment.partition("=")
    assert name == "KVSTORED_OPTIONS"
    config = parse(*shlex.split(options))
    assert all(endpoint.is_loopback for endpoint in config.endpoints)
    assert float(setting("TimeoutStopSec")) > config.drain_s
    assert int(setting("LimitNOFILE")) > ServerOptions(node_id="n").connections_max


@pytest.mark.slow
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    systemd_analyze = shutil.which("systemd-analyze")
    if systemd_analyze is None:
        pytest.skip("no systemd-analyze here")
    # It also looks whether the command is installed, which is not what is asked.
    # In quotes, since the path of the interpreter may have spaces.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/kvstored", f'"{sys.executable}"'))
    result = subprocess.run(
        [systemd_analyze, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "kvstored.service" not in result.stderr
