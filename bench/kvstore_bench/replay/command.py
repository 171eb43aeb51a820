"""The command `kvbench replay`: options, daemons, and what is printed."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvstore.errors import ConfigError, KVStoreError
from kvstore.loadreport import PUSH_GAP_S
from kvstore.messages import Status
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore_bench.daemons import Daemons
from kvstore_bench.replay.picture import POINTS_MAX, check_picture, draw
from kvstore_bench.replay.plan import Plan, Scale, make_plan
from kvstore_bench.replay.player import Played, Player
from kvstore_bench.replay.progress import Progress
from kvstore_bench.replay.report import (
    Arena,
    Report,
    align,
    by_turn,
    make_report,
    rows,
    to_json,
    turn_rows,
)
from kvstore_bench.trace import load_traces
from kvstore_client import AsyncClient

_DESCRIPTION = """\
Replay recorded requests of LLM serving against real daemons. Each request looks
up the blocks of its prompt, fetches those that are stored, and puts the others.
What a block holds is made from its key, so that every byte that comes back is
compared, beyond the checksums of the store.

TRACE is a file of coding-agent sessions (github.com/callanjfox/kv-cache-tester)
or of Mooncake requests (github.com/kvcache-ai/Mooncake), plain or gzip, or a
pattern in quotes. `kvbench generate` makes one for those who have none.

Requests of a session follow each other without a pause; think times are left
out. Without --endpoint it starts a daemon of its own, with an arena that holds
every distinct block.
"""
_EXAMPLES = """\
examples:
  kvbench replay 'traces/*.json.gz'
  kvbench replay chat.jsonl.gz --sessions 500 --memory 1GiB --plot chat.png
  kvbench replay agents.json --endpoint tcp://127.0.0.1:7450 --json result.json

exit status: 0 all well; 1 wrong blocks, or the daemons failed; 2 a wrong option
or trace; 130 interrupted.
"""
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def add_replay_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kvbench replay`."""
    parser = subparsers.add_parser(
        "replay",
        help="replay recorded requests and check every byte",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="file, or pattern in quotes")
    scale = parser.add_argument_group("scale")
    scale.add_argument(
        "--bytes-per-token",
        default="64",
        metavar="SIZE",
        help="KV of a token, all layers (default: 64; real models have 40k to 500k)",
    )
    scale.add_argument(
        "--layers", type=int, default=1, metavar="N", help="layers of a block (default: 1)"
    )
    scale.add_argument("--sessions", type=int, metavar="N", help="only the first N sessions")
    scale.add_argument("--turns", type=int, metavar="N", help="only the first N of each session")
    scale.add_argument(
        "--concurrency",
        type=int,
        default=4,
        metavar="N",
        help="sessions side by side (default: 4)",
    )
    store = parser.add_argument_group("store")
    store.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="URI",
        help="a running daemon; give all of them (default: starts one)",
    )
    store.add_argument(
        "--memory",
        metavar="SIZE",
        help="arena of the daemon that it starts (default: room for every distinct block)",
    )
    store.add_argument(
        "--run-id",
        metavar="NAME",
        help="replays of one name find each other's blocks (default: a new name)",
    )
    store.add_argument(
        "--deadline",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds of a fetch or put (default: 30)",
    )
    store.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare what was read with what its key says (default: yes)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="hit rate and latency over turns, .png or .svg"
    )
    parser.set_defaults(run=run_replay)


def run_replay(args: argparse.Namespace) -> int:
    """`kvbench replay`; returns the exit status."""
    try:
        return _run(args)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except KVStoreError as error:
        return _fail(error, EXIT_FAILED)
    except BaseExceptionGroup as group:
        # One task's failure ends the others; it comes wrapped.
        known = group.subgroup(KVStoreError)
        if known is None:
            raise
        return _fail(_first(known), EXIT_FAILED)
    except KeyboardInterrupt:
        print("kvbench replay: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(error: BaseException, status: int) -> int:
    print(f"kvbench replay: error: {error}", file=sys.stderr)
    return status


def _first(group: BaseExceptionGroup[KVStoreError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _run(args: argparse.Namespace) -> int:
    _check(args)
    scale = Scale(
        bytes_per_token=parse_size_bytes(args.bytes_per_token, "--bytes-per-token"),
        layers=args.layers,
        sessions=args.sessions,
        turns=args.turns,
    )
    plan = make_plan(load_traces(args.traces), scale)
    memory_bytes = parse_size_bytes(args.memory, "--memory") if args.memory else plan.arena_bytes
    to_stdout = args.json is not None and str(args.json) == "-"
    # With the figures on standard output, what is for people goes to the other one.
    people = sys.stderr if to_stdout else sys.stdout
    for line in align(_scaling(plan, args, memory_bytes), right=False):
        print(line, file=people, flush=True)
    report, played = asyncio.run(_replay(plan, args, memory_bytes))
    print(file=people)
    for line in [*align(rows(report), right=False), "", *align(turn_rows(report), right=True)]:
        print(line, file=people)
    if to_stdout:
        sys.stdout.write(to_json(report).decode())
    elif args.json is not None:
        _write(args.json, to_json(report))
    if args.plot is not None:
        draw(report, by_turn(played, POINTS_MAX), args.plot)
        print(f"\n  picture in {args.plot}", file=people)
    return _verdict(report)


def _check(args: argparse.Namespace) -> None:
    if args.concurrency < 1:
        raise ConfigError("--concurrency", args.concurrency, "must be at least 1")
    if not 0 < args.deadline <= 600:
        raise ConfigError("--deadline", args.deadline, "must be more than 0 and at most 600")
    if args.endpoint and args.memory:
        raise ConfigError(
            "--memory", args.memory, "is for the daemon that is started without --endpoint"
        )
    if args.plot is not None:
        check_picture(args.plot)


def _scaling(plan: Plan, args: argparse.Namespace, memory_bytes: int) -> list[tuple[str, str]]:
    sizes = ", ".join(
        f"{format_size_bytes(plan.block_bytes(tokens))} ({tokens} tokens)"
        for tokens in plan.block_sizes
    )
    layers = "1 layer" if plan.scale.layers == 1 else f"{plan.scale.layers} layers"
    traces = plan.traces[0] if len(plan.traces) == 1 else f"{len(plan.traces)} files"
    turns = "all" if plan.scale.turns is None else f"the first {plan.scale.turns}"
    table = [
        ("traces", traces),
        (
            "sessions",
            f"{len(plan.conversations):,} of {plan.session_count:,},"
            f" {args.concurrency} side by side, without think times",
        ),
        (
            "turns",
            f"{turns}: {plan.requests:,} of {plan.request_count:,} requests,"
            f" {plan.prompt_tokens:,} tokens in prompts",
        ),
        ("blocks", f"{sizes} at {plan.scale.bytes_per_token} bytes a token, {layers}"),
    ]
    if args.endpoint:
        table.append(("daemons", ", ".join(args.endpoint)))
    else:
        blocks = sum(plan.distinct_blocks.values())
        room = "" if args.memory else f", room for {blocks:,} distinct blocks"
        size = format_size_bytes(memory_bytes)
        table.append(("arena", f"{size}{room}, in a daemon of its own on loopback"))
    return table


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError("--json", path, f"cannot be written: {error.strerror}") from error


def _verdict(report: Report) -> int:
    if report.wrong_blocks:
        return _fail(KVStoreError(f"{report.wrong_blocks:,} wrong blocks"), EXIT_FAILED)
    return 0


@asynccontextmanager
async def _daemons(endpoints: list[str], memory_bytes: int) -> AsyncIterator[list[str]]:
    if endpoints:
        yield endpoints
        return
    async with Daemons(1, memory_bytes) as daemons:
        yield daemons.endpoints
        failures = daemons.failures()
        if failures:
            raise KVStoreError("; ".join(failures))


async def _replay(
    plan: Plan, args: argparse.Namespace, memory_bytes: int
) -> tuple[Report, list[Played]]:
    clock = asyncio.get_running_loop().time
    played: list[Played] = []
    async with (
        _daemons(args.endpoint, memory_bytes) as endpoints,
        AsyncClient(endpoints, deadline_s=args.deadline) as client,
    ):
        before = await _arena(client)
        with Progress(plan.requests) as progress:

            def on_played(request: Played) -> None:
                played.append(request)
                progress.add(request)

            player = Player(
                client,
                plan,
                run_id=args.run_id or secrets.token_hex(8),
                concurrency=args.concurrency,
                deadline_s=args.deadline,
                verify=args.verify,
                on_played=on_played,
            )
            started_at = clock()
            await player.play()
            elapsed_s = clock() - started_at
        # What a daemon says of its load may be that much older than the last put.
        await asyncio.sleep(2 * PUSH_GAP_S)
        after = await _arena(client)
    report = make_report(
        plan,
        played,
        endpoints=endpoints,
        own_daemon=not args.endpoint,
        concurrency=args.concurrency,
        verified=args.verify,
        elapsed_s=elapsed_s,
        fetching_s=player.fetching.total_s,
        putting_s=player.putting.total_s,
        arena=Arena(
            total_bytes=after.total_bytes,
            used_bytes=after.used_bytes,
            evicted_blocks=max(0, after.evicted_blocks - before.evicted_blocks),
        ),
    )
    return report, played


async def _arena(client: AsyncClient) -> Arena:
    """What the daemons that answer say of their memory.

    Raises:
        KVStoreError: None of them answers.
    """
    replies = await client.status()
    states = [reply for reply in replies.values() if isinstance(reply, Status)]
    if not states:
        endpoint, error = next(iter(replies.items()))
        raise KVStoreError(f"no daemon answers at {endpoint}: {error}")
    loads = [state.report.buffers for state in states]
    return Arena(
        total_bytes=sum(load.total_bytes for load in loads),
        used_bytes=sum(load.total_bytes - load.free_bytes for load in loads),
        evicted_blocks=sum(state.counters.get("blocks_evicted", 0) for state in states),
    )


__all__ = ["add_replay_parser", "run_replay"]
