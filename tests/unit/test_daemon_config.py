"""Options of the daemon, and the unit that starts it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.service.options import LISTENERS_MAX
from kvstore.serving import ServerOptions
from kvstore.version import VERSION
from kvstore_daemon.__main__ import main
from kvstore_daemon.config import Config, parse_config
from tests.support.tree import ROOT

MIB, GIB = 1024**2, 1024**3


def parse(*arguments: str) -> Config:
    return parse_config(arguments, "host", 123)


def test_defaults() -> None:
    assert parse() == Config(
        endpoints=(parse_endpoint("tcp://127.0.0.1:7450"),),
        memory_bytes=GIB,
        node_id="host:7450",
        pool="",
        memory_users=(),
        pool_capacities={},
        drain_s=30.0,
        insecure=False,
        log_level="info",
    )
    assert parse().drain_s == ServerOptions(node_id="n").drain_s


def test_everything_can_be_chosen() -> None:
    assert parse(
        *("--listen", "tcp://[::1]:0", "--listen", "unix:///run/kv.sock", "--pool", "a"),
        *("--memory-user", "daemon", "--memory-user=1234"),
        *("--listen", "rdma://10.0.0.1:7451?device=mlx5_0:1,mlx5_1&gid_index=3"),
        *("--memory", "512M", "--node-id", "kv-1", "--drain", "0.5", "--insecure"),
        *("--pool-capacity", "a=64MiB", "--pool-capacity=b.c=1g", "--log-level=debug"),
    ) == Config(
        endpoints=(
            parse_endpoint("tcp://[::1]:0"),
            parse_endpoint("unix:///run/kv.sock"),
            parse_endpoint("rdma://10.0.0.1:7451?device=mlx5_0:1,mlx5_1&gid_index=3"),
        ),
        memory_bytes=512 * MIB,
        node_id="kv-1",
        pool="a",
        memory_users=("daemon", "1234"),
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
        (["--listen", "quic://127.0.0.1:1"], "--listen", "must be one of tcp://HOST:PORT"),
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
