"""The command `kvctl`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from kvstore.errors import ConfigError, KVStoreError
from kvstore_client.ctl import doctor, ping, status, top
from kvstore_client.ctl.options import command_parser, common_options
from kvstore_client.ctl.tables import printable

# As a shell reports a process that a signal has ended.
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands.

    Returns:
        Exit status, as the help says.
    """
    parser, subparsers = command_parser()
    for command in (status, ping, top, doctor):
        command.add_parser(subparsers)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        ended: int = asyncio.run(given.run(common_options(given), given, sys.stdout))
        sys.stdout.flush()
        return ended
    except ConfigError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # Who reads us has seen enough. What is buffered would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (KVStoreError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(error: Exception, ended: int) -> int:
    sys.stderr.write(f"kvctl: error: {printable(str(error) or type(error).__name__)}\n")
    return ended


if __name__ == "__main__":
    sys.exit(main())
