"""The command `kvbench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvstore.version import VERSION
from kvstore_bench.command import add_run_parser, flags_with_values
from kvstore_bench.generate import add_generate_parser
from kvstore_bench.replay import add_replay_parser
from kvstore_bench.simulate import add_simulate_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands.

    Returns:
        Exit status, as the help of each command says.
    """
    words = flags_with_values(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(words)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvbench",
        description="Measure the storage of KV-cache: its data path beside the limit of the"
        " host, and real or generated sessions of agents.",
        epilog="`kvbench COMMAND --help` explains a command, with examples. To begin with:\n\n"
        "  kvbench run limits.ini\n      how close to a bare socket pair this host comes\n"
        "  kvbench generate --sessions 4 --output s.json.gz && kvbench replay s.json.gz\n"
        "      sessions of agents against a daemon, every byte compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvbench {VERSION}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    add_run_parser(subparsers)
    add_replay_parser(subparsers)
    add_generate_parser(subparsers)
    add_simulate_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
