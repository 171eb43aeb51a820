"""A command's parser, and how its errors become a line and an exit status."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError, TransportError
from kvstore.service.command import CommandParser, exit_status
from kvstore.version import VERSION


def parser() -> CommandParser:
    made = CommandParser("kvtest", "A test.", "that is\n  all")
    made.add_argument("--memory")
    made.add_process_options()
    return made


def test_defaults_of_a_process() -> None:
    given = parser().parse_args([])
    assert (given.drain, given.insecure, given.log_level) == ("30", False, "info")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frob"], "unrecognized arguments: --frob"),
        (["--mem", "1G"], "unrecognized arguments: --mem 1G"),
        (["--memory"], "--memory: expected one argument"),
    ],
)
def test_unknown_options_are_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == f"kvtest: error: {said[15:].partition(' (see')[0]} (see kvtest --help)\n"
    assert words in said


def test_the_end_of_the_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.endswith("\n\nthat is\n  all\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvtest {VERSION}\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("--x", 1, "must be 2"), 2, "--x=1: must be 2"),
        (TransportError("listen on x: taken"), 1, "listen on x: taken"),
        (PermissionError(13, "Permission denied"), 1, "[Errno 13] Permission denied"),
        (MemoryError(), 1, "MemoryError"),
        (TransportError("one\ntwo\x1b[2J"), 1, "one\\ntwo\\x1b[2J"),
    ],
)
def test_what_stops_a_command_is_one_line(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    assert exit_status("kvtest", body) == status
    assert capsys.readouterr().err == f"kvtest: error: {said}\n"


def test_a_command_that_ends_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("kvtest", lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_our_own_mistakes_are_not_hidden() -> None:
    def body() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        exit_status("kvtest", body)
