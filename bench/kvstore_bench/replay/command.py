"""The command `kvbench replay`: options, daemons, and what is printed."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError, KVStoreError
from kvstore.loadreport import PUSH_GAP_S
from kvstore.messages import Status
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore_bench.daemons import Daemons
from kvstore_bench.outputs import check_output, write_output
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

exit status: 0 all well; 1 wrong blocks, or the daemons failed (what was replayed
until then is reported); 2 a wrong option or trace; 130 interrupted.
"""
EXIT_FAILED = 1


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
        metavar="URI[,URI]",
        help="running daemons; may be given again (default: starts one)",
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
    """`kvbench replay`; returns the exit status.

    Raises:
        ConfigError: An option, or a trace, cannot be.
        KVStoreError: The daemons failed before anything was replayed, or a result could not
            be written.
    """
    endpoints = _check(args)
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
    for line in align(_scaling(plan, args, endpoints, memory_bytes), right=False):
        print(line, file=people, flush=True)
    report, played = asyncio.run(_replay(plan, args, endpoints, memory_bytes))
    print(file=people)
    for line in [*align(rows(report), right=False), "", *align(turn_rows(report), right=True)]:
        print(line, file=people)
    if to_stdout:
        sys.stdout.write(to_json(report).decode())
    elif args.json is not None:
        write_output("--json", args.json, to_json(report))
    if args.plot is not None:
        draw(report, by_turn(played, POINTS_MAX), args.plot)
        print(f"\n  picture in {args.plot}", file=people)
    return _verdict(report)


def _check(args: argparse.Namespace) -> list[str]:
    """Refuse what cannot be; the endpoints that were given, one by one."""
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
    if args.json is not None and str(args.json) != "-":
        check_output("--json", args.json)
    words = [word.strip() for given in args.endpoint for word in given.split(",")]
    return [str(parse_endpoint(word, "--endpoint")) for word in words]


def _scaling(
    plan: Plan, args: argparse.Namespace, endpoints: list[str], memory_bytes: int
) -> list[tuple[str, str]]:
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
    if endpoints:
        table.append(("daemons", ", ".join(endpoints)))
    else:
        blocks = sum(plan.distinct_blocks.values())
        room = "" if args.memory else f", room for {blocks:,} distinct blocks"
        size = format_size_bytes(memory_bytes)
        table.append(("arena", f"{size}{room}, in a daemon of its own on loopback"))
    return table


def _verdict(report: Report) -> int:
    failures = [report.failure] if report.failure else []
    if report.wrong_blocks:
        failures.append(f"{report.wrong_blocks:,} wrong blocks")
    for failure in failures:
        print(f"kvbench replay: error: {failure}", file=sys.stderr)
    return EXIT_FAILED if failures else 0


@asynccontextmanager
async def _daemons(
    endpoints: list[str], memory_bytes: int
) -> AsyncIterator[tuple[list[str], Callable[[], list[str]]]]:
    """Endpoints, and what tells how daemons of ours ended that should still run."""
    if endpoints:
        yield endpoints, list
        return
    async with Daemons(1, memory_bytes) as daemons:
        yield daemons.endpoints, daemons.failures


async def _replay(
    plan: Plan, args: argparse.Namespace, endpoints: list[str], memory_bytes: int
) -> tuple[Report, list[Played]]:
    clock = asyncio.get_running_loop().time
    played: list[Played] = []
    async with (
        _daemons(endpoints, memory_bytes) as (used, failures),
        AsyncClient(used, deadline_s=args.deadline) as client,
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
            failure = await _play(player, played)
            elapsed_s = clock() - started_at
        arena, silence = await _arena_after(client, before)
        failure = "; ".join(failures()) or failure or silence
    report = make_report(
        plan,
        played,
        endpoints=used,
        own_daemon=not endpoints,
        concurrency=args.concurrency,
        verified=args.verify,
        elapsed_s=elapsed_s,
        fetching_s=player.fetching.total_s,
        putting_s=player.putting.total_s,
        arena=arena,
        failure=failure,
    )
    return report, played


async def _play(player: Player, played: Sequence[Played]) -> str:
    """Play; why it ended early, if it did and there is something to report all the same."""
    try:
        await player.play()
    except KVStoreError as error:
        return _unless_nothing(error, played)
    except BaseExceptionGroup as group:
        # One task's failure ends the others; it comes wrapped.
        known = group.subgroup(KVStoreError)
        if known is None:
            raise
        first: BaseException = known
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        return _unless_nothing(first, played)
    return ""


def _unless_nothing(error: BaseException, played: Sequence[Played]) -> str:
    if not played:
        raise error
    return str(error)


async def _arena_after(client: AsyncClient, before: Arena) -> tuple[Arena | None, str]:
    """Memory of the daemons after the replay; None and the reason if none of them answers."""
    # What a daemon says of its load may be that much older than the last put.
    await asyncio.sleep(2 * PUSH_GAP_S)
    try:
        after = await _arena(client)
    except KVStoreError as error:
        return None, str(error)
    evicted = max(0, after.evicted_blocks - before.evicted_blocks)
    return msgspec.structs.replace(after, evicted_blocks=evicted), ""


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
