"""Lines of the log: what they look like, and that peers cannot write them."""

from __future__ import annotations

import logging

from kvstore.service.log import LogFormatter, printable


def record(level: int, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("kvstore.x", level, __file__, 1, message, arguments, None)


def test_log_lines() -> None:
    plain = LogFormatter("kvstored", timed=False)
    assert plain.format(record(logging.INFO, "listening on %s", "x")) == "kvstored: listening on x"
    assert plain.format(record(logging.WARNING, "odd")) == "kvstored: warning: odd"
    timed = LogFormatter("kvstored", timed=True).format(record(logging.INFO, "up"))
    assert timed.endswith(" kvstored: up")
    assert timed[:2] == "20"


def test_peers_write_no_lines_into_the_log() -> None:
    line = LogFormatter("kvstored", timed=False).format(
        record(logging.INFO, "from %s", "a\nkvstored: \x1b[2J")
    )
    assert line == "kvstored: from a\\nkvstored: \\x1b[2J"
    assert printable("größer als 1") == "größer als 1"
