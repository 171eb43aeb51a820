"""The command `kvagent`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from kvstore.service.command import exit_status
from kvstore_client.agent.config import PROGRAM, parse_config
from kvstore_client.agent.process import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent until it is told to stop.

    Returns:
        Exit status: 0 after a stop, 2 for an option that cannot be, 1 for anything else.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(PROGRAM, lambda: run(parse_config(given, socket.gethostname(), os.getpid())))


if __name__ == "__main__":
    sys.exit(main())
