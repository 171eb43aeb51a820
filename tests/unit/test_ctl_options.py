"""What can be typed after `kvctl`, and what is said about it."""

from __future__ import annotations

import re

import pytest

from kvstore.errors import ConfigError
from kvstore_client.ctl import ping, status, top
from kvstore_client.ctl.__main__ import main
from kvstore_client.ctl.options import (
    ENDPOINT,
    ENDPOINTS_MAX,
    TIMEOUT_S,
    Common,
    command_parser,
    common_options,
)

COMMANDS = {"status": status, "ping": ping, "top": top}
A, B = "tcp://127.0.0.1:1", "unix:///run/b.sock"


def parse(*words: str) -> Common:
    parser, subparsers = command_parser()
    for command in (status, ping, top):
        command.add_parser(subparsers)
    return common_options(parser.parse_args(words))


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is said about a wrong option; the exit status is 2."""
    ended: object
    try:
        ended = main(words)
    except SystemExit as error:  # argparse ends by itself
        ended = error.code
    said = capsys.readouterr()
    assert (ended, said.out) == (2, "")
    assert re.fullmatch(r"kvctl: error: .*\n", said.err)
    return said.err


def test_defaults() -> None:
    common = parse("status")
    assert [str(endpoint) for endpoint in common.endpoints] == [ENDPOINT]
    assert (common.timeout_s, common.json) == (TIMEOUT_S, False)


@pytest.mark.parametrize("command", COMMANDS)
def test_common_options_stand_before_the_command_or_after_it(command: str) -> None:
    words = ["--endpoint", A, "--endpoint", B, "--timeout", "7", "--json"]
    expected = parse(*words, command)
    assert [str(endpoint) for endpoint in expected.endpoints] == [A, B]
    assert (expected.timeout_s, expected.json) == (7.0, True)
    assert parse(command, *words) == expected
    assert parse(*words[:2], command, *words[2:]) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--endpoint", "here", "status"), "--endpoint=here: must be one of tcp://HOST:PORT"),
        (("--endpoint", "rdma://h:1", "ping"), "--endpoint=rdma://h:1: scheme must be tcp or unix"),
        (("--endpoint", "tcp://h:0", "top"), "--endpoint=tcp://h:0: needs a host and a port"),
        (("--endpoint", A, "status", "--endpoint", A), f"--endpoint={A}: must be given once"),
        (("status", "--timeout", "soon"), "--timeout=soon: must be 0.01 to 600 seconds"),
        (("status", "--timeout", "nan"), "--timeout=nan: must be"),
        (("--timeout", "-1", "status"), "--timeout=-1: must be"),
        (("ping", "--count", "0"), "--count=0: must be a whole number from 1 to"),
        (("ping", "--count", "9" * 5000), "must be a whole number"),
        (("ping", "--interval", "0"), "--interval=0: must be 0.01 to 3600 seconds"),
        (("top", "--count", "1.5"), "--count=1.5: must be a whole number"),
        (("top", "--interval", "0.01"), "--interval=0.01: must be 0.1 to 3600 seconds"),
        (("top", "--sort", "size"), "--sort=size: must be one of endpoint, name, queue"),
        (("top", "--siort", "size"), "unrecognized arguments: --siort"),
        (("dance",), "invalid choice: 'dance'"),
        ((), "required: COMMAND"),
    ],
)
def test_a_wrong_option_gets_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert said in failure(capsys, *words)


def test_endpoints_have_an_end() -> None:
    words = [f"--endpoint=tcp://127.0.0.1:{port}" for port in range(1, ENDPOINTS_MAX + 2)]
    with pytest.raises(ConfigError, match=f"at most {ENDPOINTS_MAX}"):
        parse(*words, "status")
    assert len(parse(*words[:-1], "status").endpoints) == ENDPOINTS_MAX


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_by_example_and_tells_the_exit_status(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(rf"examples:\n  kvctl .*{command}", shown)
    assert "exit status: 0" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_every_example_of_the_help_can_be_typed() -> None:
    for module in COMMANDS.values():
        for line in re.findall(r"^  kvctl (.*)$", module.EPILOG, re.M):
            assert parse(*re.split(r" [|>]| {3,}", line)[0].split())
