"""The command `kvstored`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from kvstore.errors import ConfigError, KVStoreError
from kvstore_daemon.config import parse_config
from kvstore_daemon.process import printable, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop.

    Returns:
        Exit status: 0 after a stop, 2 for an option that cannot be, 1 for anything else.
    """
    try:
        given = sys.argv[1:] if arguments is None else arguments
        run(parse_config(given, socket.gethostname(), os.getpid()))
    except ConfigError as error:
        return _fail(error, 2)
    except (KVStoreError, OSError, MemoryError) as error:
        return _fail(error, 1)
    return 0


def _fail(error: Exception, status: int) -> int:
    text = str(error) or type(error).__name__
    sys.stderr.write(f"kvstored: error: {printable(text)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
