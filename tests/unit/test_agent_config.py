"""Options of the agent, as its library has them and as its command does, and its unit."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.serving import ServerOptions
from kvstore.transport.marking import RELAY_MARKING
from kvstore.version import VERSION
from kvstore_client import AsyncClient
from kvstore_client.agent.config import NAMES, Config, parse_config
from kvstore_client.agent.options import (
    POOLS_MAX,
    RATE_BYTES_MIN,
    RELAYS_MAX,
    AgentOptions,
    check_options,
)
from tests.support.tree import ROOT

MIB, GIB = 1024**2, 1024**3
STORAGE = "tcp://10.1.0.5:7450"


def parse(*arguments: str) -> Config:
    return parse_config(["--storage", STORAGE, *arguments], "host", 123)


def options(**changes: object) -> AgentOptions:
    made = AgentOptions(storage=(STORAGE,), node_id="n")
    return msgspec.structs.replace(made, **changes)


# --- the library's -----------------------------------------------------------------------------


def test_defaults() -> None:
    made = options()
    assert made == AgentOptions(
        storage=(STORAGE,),
        node_id="n",
        listen=("tcp://127.0.0.1:7460",),
        local="",
        relays=(),
        policy="balanced",
        memory_bytes=GIB,
        token="",
        copies=1,
        drop_idle=False,
        verify_relayed=False,
        relay_rate_Bps=0,
        link_rate_Bps=0,
        interface="",
        priority=RELAY_MARKING.priority,
        dscp=RELAY_MARKING.dscp,
        pool_readers={},
        deadline_s=5.0,
        connect_timeout_s=1.0,
        drain_s=30.0,
        insecure=False,
    )
    assert made.drain_s == ServerOptions(node_id="n").drain_s
    assert made.deadline_s == AsyncClient(STORAGE).deadline_s


def test_addresses_come_back_in_their_normal_forms() -> None:
    endpoints = check_options(
        options(
            listen=("tcp://LOCALHOST:0", "tcp://[::1]:7460"),
            local="unix:///s",
            relays=("tcp://d1:7460",),
        )
    )
    assert endpoints.storage == (parse_endpoint(STORAGE),)
    assert endpoints.relays == (parse_endpoint("tcp://d1:7460"),)
    assert [str(endpoint) for endpoint in endpoints.served] == [
        "tcp://localhost:0",
        "tcp://[::1]:7460",
        "unix:///s",
    ]
    assert endpoints.local == endpoints.served[-1]


def test_an_agent_may_serve_only_other_nodes_or_only_this_one() -> None:
    assert len(check_options(options()).served) == 1
    assert len(check_options(options(listen=(), local="unix:///s")).served) == 1


@pytest.mark.parametrize(
    ("changes", "option", "remedy"),
    [
        ({"storage": ()}, "storage", "name at least one daemon"),
        ({"storage": STORAGE}, "storage", "Expected `array`, got `str`"),
        ({"storage": ("a",)}, "storage", "must be one of tcp://HOST:PORT"),
        ({"storage": ("tcp://a:0",)}, "storage", "needs a port from 1"),
        ({"storage": (STORAGE, STORAGE)}, "storage", "must be given once"),
        ({"listen": ("unix:///s",)}, "listen", "scheme must be one of tcp"),
        ({"listen": ()}, "listen", "serves nobody; give listen or local"),
        ({"listen": ("tcp://10.2.0.1:1",)}, "listen", "no authentication; bind to 127.0.0.1"),
        (
            {"listen": ("tcp://[::]:1",), "insecure": True, "link_rate_Bps": GIB},
            "listen",
            "is on all interfaces: interface says whose link yields",
        ),
        ({"local": "tcp://127.0.0.1:1"}, "local", "scheme must be one of unix"),
        ({"local": "/run/s"}, "local", "unix:///PATH"),
        (
            {"storage": ("unix:///s",), "local": "unix:///s"},
            "local",
            "is a daemon (storage); choose another path",
        ),
        ({"relays": ("unix:///s",)}, "relays", "scheme must be one of tcp"),
        ({"relays": ("tcp://d1:0",)}, "relays", "needs a port from 1"),
        ({"relays": ("tcp://127.0.0.1:7460",)}, "relays", "is this agent itself"),
        ({"relays": (STORAGE,)}, "relays", "is a daemon (storage)"),
        (
            {"relays": tuple(f"tcp://d{n}:1" for n in range(RELAYS_MAX + 1))},
            "relays",
            f"at most {RELAYS_MAX}",
        ),
        ({"node_id": ""}, "node_id", "must be printable"),
        ({"policy": "fast"}, "policy", "one of direct, round_robin, shortest_queue, balanced"),
        ({"transport": "carrier pigeon"}, "transport", "one of auto, tcp, unix, shm, rdma"),
        ({"transport": "shm", "pool": "a"}, "transport", "cannot be together with"),
        ({"pool": "\n"}, "pool", ""),
        ({"memory_bytes": MIB - 1}, "memory_bytes", "must be 1MiB to 1PiB"),
        ({"memory_bytes": -1}, "memory_bytes", "must be 1MiB to 1PiB"),
        ({"memory_bytes": 1.5}, "memory_bytes", "Expected `int`, got `float`"),
        ({"copies": 0}, "copies", "a whole number from 1 to 2"),
        ({"copies": 3}, "copies", "a whole number from 1 to 2"),
        ({"copies": True}, "copies", "Expected `int`, got `bool`"),
        ({"insecure": "no"}, "insecure", "Expected `bool`, got `str`"),
        ({"priority": 7}, "priority", "a whole number from 0 to 6"),
        ({"priority": -1}, "priority", "a whole number from 0 to 6"),
        ({"dscp": 64}, "dscp", "a whole number from 0 to 63"),
        ({"relay_rate_Bps": -1}, "relay_rate_Bps", "must be 0, for none, or at least 250000"),
        ({"link_rate_Bps": RATE_BYTES_MIN - 1}, "link_rate_Bps", "at least 250000"),
        ({"interface": "ib0"}, "interface", "has no effect without link_rate_Bps"),
        ({"interface": "sixteen-letters-", "link_rate_Bps": GIB}, "interface", "at most 15"),
        ({"interface": "a/b", "link_rate_Bps": GIB}, "interface", "name of a network interface"),
        ({"interface": "..", "link_rate_Bps": GIB}, "interface", "name of a network interface"),
        ({"interface": "a b", "link_rate_Bps": GIB}, "interface", "name of a network interface"),
        ({"pool_readers": {"a b": frozenset("n")}}, "pool_readers", "letters, digits"),
        ({"pool_readers": {"p": frozenset()}}, "pool_readers", "name at least one node"),
        ({"pool_readers": {"p": frozenset([" "])}}, "pool_readers p", "without spaces"),
        ({"pool_readers": {"p": "n"}}, "pool_readers", "Expected `array`, got `str`"),
        (
            {"pool_readers": {f"p{n}": frozenset("n") for n in range(POOLS_MAX + 1)}},
            "pool_readers",
            "at most 256 pools",
        ),
        ({"deadline_s": 0.0}, "deadline_s", "more than 0, at most 600"),
        ({"deadline_s": float("nan")}, "deadline_s", "more than 0, at most 600"),
        ({"connect_timeout_s": 0.0}, "connect_timeout_s", "more than 0, at most 60"),
        ({"connect_timeout_s": float("inf")}, "connect_timeout_s", "more than 0, at most 60"),
        ({"drain_s": -1.0}, "drain_s", "must be 0 to 3600 seconds"),
    ],
)
def test_the_library_refuses(changes: dict[str, object], option: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(options(**changes))
    assert caught.value.option == option
    assert remedy in caught.value.remedy


def test_what_is_just_allowed_is_taken() -> None:
    check_options(
        options(
            storage=("unix:///run/kvstored.sock", STORAGE),
            listen=("tcp://10.2.0.1:7460", "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
            insecure=True,
            memory_bytes=MIB,
            copies=2,
            priority=6,
            dscp=63,
            relay_rate_Bps=RATE_BYTES_MIN,
            link_rate_Bps=RATE_BYTES_MIN,
            interface="fifteen-letters",
            deadline_s=600,
            drain_s=0,
        )
    )


# --- the command's -----------------------------------------------------------------------------


def test_defaults_of_the_command() -> None:
    config = parse()
    assert config.log_level == "info"
    assert config.agent == AgentOptions(storage=(STORAGE,), node_id="host:7460")


def test_everything_can_be_chosen() -> None:
    config = parse(
        *("--storage", "tcp://10.1.0.6:7450", "--listen", "tcp://10.2.0.1:7460"),
        *("--listen", "tcp://[::1]:0", "--local", "unix:///run/kv/agent.sock"),
        *("--relay", "tcp://d1:7460", "--relay=tcp://d2:7460", "--policy", "shortest_queue"),
        *("--memory", "512M", "--node-id", "prefill-1", "--copies", "2", "--verify-relayed"),
        "--drop-idle",
        *("--relay-rate", "50MB/s", "--link-rate", "400mbit", "--interface", "ib0"),
        *("--priority", "0", "--dscp", "1", "--pool-readers", "a=p1,p2", "--pool-readers=b=p1"),
        *("--drain", "0.5", "--insecure", "--log-level", "debug"),
    )
    assert config.log_level == "debug"
    assert config.agent == AgentOptions(
        storage=(STORAGE, "tcp://10.1.0.6:7450"),
        node_id="prefill-1",
        listen=("tcp://10.2.0.1:7460", "tcp://[::1]:0"),
        local="unix:///run/kv/agent.sock",
        relays=("tcp://d1:7460", "tcp://d2:7460"),
        policy="shortest_queue",
        memory_bytes=512 * MIB,
        copies=2,
        drop_idle=True,
        verify_relayed=True,
        relay_rate_Bps=50 * MIB,
        link_rate_Bps=50_000_000,
        interface="ib0",
        priority=0,
        dscp=1,
        pool_readers={"a": frozenset({"p1", "p2"}), "b": frozenset({"p1"})},
        drain_s=0.5,
        insecure=True,
    )


@pytest.mark.parametrize(
    ("arguments", "node_id"),
    [
        (["--listen", "tcp://127.0.0.1:7461", "--local", "unix:///s"], "host:7461"),
        (["--listen", "tcp://127.0.0.1:0"], "host:pid123"),
        (["--listen", "none", "--local", "unix:///run/kv.sock"], "host:/run/kv.sock"),
    ],
)
def test_agents_of_one_host_have_different_names(arguments: list[str], node_id: str) -> None:
    assert parse(*arguments).agent.node_id == node_id


def test_an_agent_may_listen_for_its_own_engines_alone() -> None:
    assert parse("--listen", "none", "--local", "unix:///s").agent.listen == ()


REFUSED = [
    ("--storage=7450", "--storage", "must be one of tcp://HOST:PORT"),
    (f"--storage={STORAGE}", "--storage", "must be given once"),
    ("--listen=none", "--listen", "serves nobody; give --listen or --local"),
    ("--listen=tcp://10.2.0.1:1", "--listen", "allow it with --insecure"),
    ("--listen=7460", "--listen", "must be one of tcp://HOST:PORT"),
    ("--local=7460", "--local", "must be one of tcp://HOST:PORT"),
    (f"--relay={STORAGE}", "--relay", "is a daemon (--storage)"),
    ("--policy=fast", "--policy", "must be one of direct"),
    ("--memory=lots", "--memory", "a size is a number"),
    ("--memory=1k", "--memory", "must be 1MiB to 1PiB"),
    ("--node-id=", "--node-id", "must be printable"),
    ("--copies=two", "--copies", "must be a whole number"),
    ("--copies=3", "--copies", "must be a whole number from 1 to 2"),
    ("--relay-rate=400Mbps", "--relay-rate", "a rate is 0, or a number and bit/s"),
    ("--link-rate=25", "--link-rate", "a rate is 0, or a number and bit/s"),
    ("--link-rate=1kbit", "--link-rate", "at least 250000 bytes/s (2Mbit/s)"),
    ("--interface=ib0", "--interface", "has no effect without --link-rate"),
    ("--priority=-1", "--priority", "must be a whole number"),
    ("--priority=7", "--priority", "must be a whole number from 0 to 6"),
    ("--dscp=0x10", "--dscp", "must be a whole number"),
    ("--dscp=64", "--dscp", "must be a whole number from 0 to 63"),
    ("--pool-readers=a", "--pool-readers", "must be POOL=NODE[,NODE...]"),
    ("--pool-readers=a=", "--pool-readers", "name at least one node"),
    ("--pool-readers=a=n,", "--pool-readers a", "must be printable"),
    ("--pool-readers= =n", "--pool-readers", "letters, digits"),
    ("--pool-readers=a=n --pool-readers=a=m", "--pool-readers", "pool 'a' must be given once"),
    ("--drain=soon", "--drain", "must be 0 to 3600 seconds"),
    ("--drain=-1", "--drain", "must be 0 to 3600 seconds"),
    ("--log-level=loud", "--log-level", "must be one of debug, info, warning, error"),
]


@pytest.mark.parametrize(("line", "option", "remedy"), REFUSED)
def test_the_command_refuses(line: str, option: str, remedy: str) -> None:
    arguments = line.split(" --")
    with pytest.raises(ConfigError) as caught:
        parse(arguments[0], *(f"--{rest}" for rest in arguments[1:]))
    assert caught.value.option == option
    assert remedy in caught.value.remedy


def test_storage_has_to_be_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config([], "host", 1)
    assert str(caught.value) == "--storage=none: name at least one daemon"


def test_errors_name_options_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in msgspec.structs.fields(AgentOptions):
        if field.name in NAMES:
            assert f"  {NAMES[field.name]}" in text
    # Of the rest two are flags, which nothing is wrong with, and no command has these.
    rest = {field.name for field in msgspec.structs.fields(AgentOptions)} - set(NAMES)
    assert rest == {"drop_idle", "verify_relayed", "token", "deadline_s", "connect_timeout_s"}


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "two kinds of socket" in text
    # The example can be typed.
    example = text[text.index("  kvagent --storage") : text.index("\nand on the second")]
    command, *arguments = shlex.split(example.replace("\\\n", ""))
    assert command == "kvagent"
    assert parse_config(arguments, "host", 1).agent.node_id == "prefill-1"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvagent {VERSION}\n"


# --- the unit ----------------------------------------------------------------------------------

UNIT = ROOT / "systemd" / "kvagent.service"


def setting(name: str) -> str:
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith(f"{name}=")]
    return line.partition("=")[2]


def test_the_unit_starts_an_agent_that_exists() -> None:
    assert setting("ExecStart") == "/usr/local/bin/kvagent $KVAGENT_OPTIONS"
    (assignment,) = shlex.split(setting("Environment"))
    name, _, typed = assignment.partition("=")
    assert name == "KVAGENT_OPTIONS"
    agent = parse_config(shlex.split(typed), "host", 1).agent
    endpoints = check_options(agent)
    assert all(endpoint.is_loopback for endpoint in endpoints.served)
    assert endpoints.local is not None
    assert endpoints.local.path.startswith(f"/run/{setting('RuntimeDirectory')}/")
    assert float(setting("TimeoutStopSec")) > agent.drain_s
    assert int(setting("LimitNOFILE")) > ServerOptions(node_id="n").connections_max


@pytest.mark.slow
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    systemd_analyze = shutil.which("systemd-analyze")
    if systemd_analyze is None:
        pytest.skip("no systemd-analyze here")
    # It also looks whether the command is installed, which is not what is asked.
    # In quotes, since the path of the interpreter may have spaces.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/kvagent", f'"{sys.executable}"'))
    result = subprocess.run(
        [systemd_analyze, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "kvagent.service" not in result.stderr
