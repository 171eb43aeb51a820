"""The log of a process: one line a message on standard error, for a terminal or the journal."""

from __future__ import annotations

import logging
import os
import sys


class LogFormatter(logging.Formatter):
    """One line a message, for a terminal or the journal.

    Peers choose some of the words, such as their node id: what is not printable is escaped,
    so that nobody else writes lines into our log.

    Args:
        program: Name of the command; each line begins with it.
        timed: Whether a time stands before each line; the journal has its own.
    """

    def __init__(self, program: str, timed: bool) -> None:
        super().__init__("%(asctime)s %(message)s" if timed else "%(message)s")
        self.default_msec_format = "%s.%03d"
        self._program = program

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        record.message = f"{self._program}: {level}{printable(record.message)}"
        return super().formatMessage(record)


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would not print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up_log(program: str, level: str) -> None:
    """Send the log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(program, timed="JOURNAL_STREAM" not in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler])
