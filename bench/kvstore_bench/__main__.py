"""The command `kvbench`."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from kvstore.errors import ConfigError, KVStoreError
from kvstore.version import VERSION
from kvstore_bench.command import add_run_parser, flags_with_values
from kvstore_bench.compare import add_compare_parser
from kvstore_bench.emulate.command import add_emulate_parser
from kvstore_bench.generate import add_generate_parser
from kvstore_bench.plot import add_plot_parser
from kvstore_bench.replay import add_replay_parser
from kvstore_bench.simulate import add_simulate_parser

EXIT_FAILED, EXIT_USAGE = 1, 2
# As a shell reports a process that a signal has ended.
EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands.

    Returns:
        Exit status, as the help of each command says.
    """
    name = "kvbench"
    try:
        try:
            args = _parse(sys.argv[1:] if arguments is None else arguments)
        finally:
            # Also of --help, which may be piped to what stops reading.
            sys.stdout.flush()
        name = f"kvbench {args.command}"
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _fail(name, error, EXIT_USAGE)
    except BrokenPipeError:
        _drop_output()
        return EXIT_PIPE_CLOSED
    except (KVStoreError, OSError) as error:
        _drop_output()
        return _fail(name, error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", EXIT_INTERRUPTED)


def _fail(name: str, error: BaseException | str, status: int) -> int:
    text = f"error: {error}" if isinstance(error, BaseException) else error
    print(f"{name}: {text}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """Let what is buffered for a closed pipe or a full device not fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    args, unknown = parser.parse_known_args(flags_with_values(words))
    if unknown:
        parser = commands[args.command]
        parser.exit(EXIT_USAGE, f"{parser.prog}: error: {_unknown(parser, unknown[0])}\n")
    return args


def _unknown(parser: argparse.ArgumentParser, word: str) -> str:
    option, equals, value = word.partition("=")
    if not option.startswith("-"):
        return f"{word}: one word too many; `{parser.prog} --help` lists what there is"
    # Without the dashes, which would make all of them alike.
    known = {name.lstrip("-"): name for act in parser._actions for name in act.option_strings}
    close = difflib.get_close_matches(option.lstrip("-"), known, n=1)
    remedy = f"did you mean {known[close[0]]}?" if close else f"`{parser.prog} --help` lists all"
    return f"{option}{equals}{value}: no such option; {remedy}"


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="kvbench",
        description="Measure the storage of KV-cache: its data path beside the limit of the"
        " host, and real or generated sessions of agents.",
        epilog="`kvbench COMMAND --help` explains a command, with examples. To begin with:\n\n"
        "  kvbench run limits.ini\n      how close to a bare socket pair this host comes\n"
        "  kvbench compare before.json after.json\n      what differs beyond the noise of trials\n"
        "  kvbench generate --sessions 4 --output s.json.gz && kvbench replay s.json.gz\n"
        "      sessions of agents against a daemon, every byte compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvbench {VERSION}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    add_run_parser(subparsers)
    add_compare_parser(subparsers)
    add_plot_parser(subparsers)
    add_replay_parser(subparsers)
    add_generate_parser(subparsers)
    add_simulate_parser(subparsers)
    add_emulate_parser(subparsers)
    return parser, dict(subparsers.choices)


if __name__ == "__main__":
    sys.exit(main())
