"""The command line of a process: its parser, and errors in one line with an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from kvstore.errors import ConfigError, KVStoreError
from kvstore.service.log import printable
from kvstore.service.options import DRAIN_S, LOG_LEVELS
from kvstore.version import VERSION


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of a command is said.

    Names of options are never abbreviated: a later option would change what they mean.
    """

    def __init__(self, program: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=program,
            description=description,
            epilog=epilog or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def add_process_options(self) -> None:
        """What every process that serves may be told: the last of its options."""
        self.add_argument(
            "--drain",
            metavar="S",
            default=f"{DRAIN_S:g}",
            help="seconds that a stop waits for requests under way (default %(default)s)",
        )
        self.add_argument(
            "--insecure",
            action="store_true",
            help="listen also where other hosts can connect, although nobody has to authenticate",
        )
        self.add_argument(
            "--log-level",
            metavar="LEVEL",
            default="info",
            help=f"one of {', '.join(LOG_LEVELS)} (default %(default)s)",
        )
        self.add_argument("--version", action="version", version=f"{self.prog} {VERSION}")


def exit_status(program: str, body: Callable[[], None]) -> int:
    """Run a command to its end; what stops it is one line on standard error.

    Returns:
        0 if it went well, 2 for an option that cannot be, 1 for anything else.
    """
    try:
        body()
    except (KVStoreError, OSError, MemoryError) as error:
        text = str(error) or type(error).__name__
        sys.stderr.write(f"{program}: error: {printable(text)}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0
