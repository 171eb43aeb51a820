"""What a replay found: sums, percentiles, and how they go over the turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import msgspec
import numpy as np

from kvstore.units import format_size_bytes
from kvstore.version import VERSION
from kvstore_bench.replay.plan import Plan
from kvstore_bench.replay.player import Played

OutcomeT = TypeVar("OutcomeT", bound=IntEnum)


class Latency(msgspec.Struct, frozen=True):
    """Percentiles in seconds over the requests that had one."""

    count: int = 0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """All requests at one place in their conversations, or at some that follow each other.

    Attributes:
        turn: From 1; the first of them.
        count: How many places these are.
        blocks, hits: Blocks of the prompts, and those of them that were used from the store.
    """

    turn: int
    count: int = 1
    requests: int
    blocks: int
    hits: int
    fetch: Latency

    @property
    def hit_rate(self) -> float:
        """Share of blocks that came from the store."""
        return self.hits / self.blocks if self.blocks else 0.0


class Arena(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the daemons at the end, all together."""

    total_bytes: int = 0
    used_bytes: int = 0
    evicted_blocks: int = 0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that a replay found; `--json` writes it as it stands.

    Attributes:
        hit_rate_blocks: Blocks used from the store, of all full blocks of the prompts.
        hit_rate_tokens: Tokens of those blocks, of all tokens of the prompts.
        hit_rate_max: What a store that forgets nothing would reach, in blocks.
        fetching_s, putting_s: Time in which something was being fetched (put).
        wrong_blocks: Said to be hits, and held other bytes; None if they were not compared.
        arena: None if no daemon answered at the end.
        failure: Why not all of it could be replayed, or measured; empty if all could.
    """

    tool: str
    traces: tuple[str, ...]
    endpoints: list[str]
    own_daemon: bool
    concurrency: int
    bytes_per_token: int
    layers: int
    block_tokens: tuple[int, ...]
    block_bytes: tuple[int, ...]
    sessions: int
    sessions_in_traces: int
    requests: int
    requests_in_traces: int
    elapsed_s: float
    prompt_tokens: int
    blocks: int
    distinct_blocks: int
    hit_blocks: int
    hit_rate_blocks: float
    hit_rate_tokens: float
    hit_rate_max: float
    wrong_blocks: int | None
    read_bytes: int
    written_bytes: int
    fetching_s: float
    putting_s: float
    lookup: Latency
    fetch: Latency
    put: Latency
    fetch_outcomes: dict[str, int]
    put_outcomes: dict[str, int]
    lookups_unreachable: int
    errors: dict[str, int]
    arena: Arena | None
    failure: str
    turns: list[Turn]


def make_report(
    plan: Plan,
    played: Sequence[Played],
    *,
    endpoints: Sequence[str],
    own_daemon: bool,
    concurrency: int,
    verified: bool,
    elapsed_s: float,
    fetching_s: float,
    putting_s: float,
    arena: Arena | None,
    failure: str = "",
) -> Report:
    """Sum up the requests of a replay."""
    blocks = sum(request.blocks for request in played)
    tokens = sum(request.tokens for request in played)
    hits = sum(request.used for request in played)
    hit_tokens = sum(request.used * request.block_tokens for request in played)
    return Report(
        tool=f"kvbench replay {VERSION}",
        traces=plan.traces,
        endpoints=list(endpoints),
        own_daemon=own_daemon,
        concurrency=concurrency,
        bytes_per_token=plan.scale.bytes_per_token,
        layers=plan.scale.layers,
        block_tokens=plan.block_sizes,
        block_bytes=tuple(map(plan.block_bytes, plan.block_sizes)),
        sessions=len(plan.conversations),
        sessions_in_traces=plan.session_count,
        requests=len(played),
        requests_in_traces=plan.request_count,
        elapsed_s=elapsed_s,
        prompt_tokens=tokens,
        blocks=blocks,
        distinct_blocks=sum(plan.distinct_blocks.values()),
        hit_blocks=hits,
        hit_rate_blocks=hits / blocks if blocks else 0.0,
        hit_rate_tokens=hit_tokens / tokens if tokens else 0.0,
        hit_rate_max=plan.hit_rate_max,
        wrong_blocks=sum(request.wrong for request in played) if verified else None,
        read_bytes=sum(request.read_bytes for request in played),
        written_bytes=sum(request.written_bytes for request in played),
        fetching_s=fetching_s,
        putting_s=putting_s,
        lookup=latency(request.lookup_s for request in played if request.blocks),
        fetch=latency(request.fetch_s for request in played),
        put=latency(request.put_s for request in played),
        fetch_outcomes=_names(request.fetched for request in played),
        put_outcomes=_names(request.put for request in played),
        lookups_unreachable=sum(request.unreachable for request in played),
        errors=dict(Counter(error for request in played for error in request.errors)),
        arena=arena,
        failure=failure,
        turns=by_turn(played),
    )


def latency(samples: Iterable[float | None]) -> Latency:
    """Percentiles of the samples that are numbers."""
    values = np.array([sample for sample in samples if sample is not None])
    if not len(values):
        return Latency()
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Latency(len(values), p50, p90, p99, float(values.max()))


def by_turn(played: Sequence[Played], groups_max: int | None = None) -> list[Turn]:
    """The requests turn by turn, or so many turns together that no more groups than that come.

    The first turn, in which nothing can be found, stays alone.
    """
    turns = max((request.turn for request in played), default=-1) + 1
    width = 1 if groups_max is None else max(1, -(-(turns - 1) // (groups_max - 1)))
    groups: dict[int, list[Played]] = {}
    for request in played:
        first = request.turn and 1 + (request.turn - 1) // width * width
        groups.setdefault(first, []).append(request)
    return [
        Turn(
            turn=first + 1,
            count=min(width, turns - first) if first else 1,
            requests=len(requests),
            blocks=sum(request.blocks for request in requests),
            hits=sum(request.used for request in requests),
            fetch=latency(request.fetch_s for request in requests),
        )
        for first, requests in sorted(groups.items())
    ]


def _names(counters: Iterable[Counter[OutcomeT]]) -> dict[str, int]:
    total: Counter[OutcomeT] = Counter()
    for counter in counters:
        total.update(counter)
    return {outcome.name: total[outcome] for outcome in sorted(total)}


def to_json(report: Report) -> bytes:
    """The report for programs; turns carry their hit rates."""
    record: dict[str, Any] = msgspec.to_builtins(report)
    for turn, encoded in zip(report.turns, record["turns"], strict=True):
        encoded["hit_rate"] = turn.hit_rate
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


# --- for people --------------------------------------------------------------------------------


def format_seconds(seconds: float) -> str:
    """A duration with three digits and its unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def rows(report: Report) -> list[tuple[str, str]]:
    """The report as a table of two columns."""
    wrong = report.wrong_blocks
    arena = report.arena
    table = [
        ("requests", f"{report.requests:,} in {report.elapsed_s:.1f} s"),
        ("blocks in prompts", f"{report.blocks:,}, of them {report.distinct_blocks:,} distinct"),
        (
            "hit rate",
            f"{report.hit_rate_blocks:.2%} of blocks (possible {report.hit_rate_max:.2%}),"
            f" {report.hit_rate_tokens:.2%} of tokens",
        ),
        ("wrong blocks", "not checked" if wrong is None else f"{wrong:,}"),
        ("read", _moved(report.read_bytes, report.fetching_s)),
        ("written", _moved(report.written_bytes, report.putting_s)),
        ("lookup latency", _percentiles(report.lookup)),
        ("fetch latency", _percentiles(report.fetch)),
        ("put latency", _percentiles(report.put)),
        ("fetch outcomes", _outcomes(report.fetch_outcomes)),
        ("put outcomes", _outcomes(report.put_outcomes)),
    ]
    if arena is None:
        table.append(("arena", "unknown: no daemon answers any more"))
    elif arena.total_bytes:
        table.append(
            (
                "arena",
                f"{format_size_bytes(arena.used_bytes)} of {format_size_bytes(arena.total_bytes)}"
                f" used, {arena.evicted_blocks:,} blocks evicted",
            )
        )
    if report.lookups_unreachable:
        table.append(("unreachable", f"a daemon, in {report.lookups_unreachable:,} lookups"))
    common = Counter(report.errors).most_common(3)
    table += [("error", f"{count:,} times: {error}") for error, count in common]
    return table


def turn_rows(report: Report) -> list[tuple[str, ...]]:
    """Some of the turns: heading, then a row a turn; 1, 2, 5, 10, 20, ... and the last."""
    table: list[tuple[str, ...]] = [
        ("turn", "requests", "blocks", "hit rate", "fetch p50", "p90", "p99", "max")
    ]
    for turn in report.turns:
        # What is left of 1, 2, 5, 10, 20, ... without its zeros.
        if str(turn.turn).rstrip("0") not in ("1", "2", "5") and turn is not report.turns[-1]:
            continue
        figures = (turn.fetch.p50_s, turn.fetch.p90_s, turn.fetch.p99_s, turn.fetch.max_s)
        table.append(
            (
                str(turn.turn),
                f"{turn.requests:,}",
                f"{turn.blocks:,}",
                f"{turn.hit_rate:.1%}",
                *(format_seconds(figure) if turn.fetch.count else "" for figure in figures),
            )
        )
    return table


def align(table: Sequence[Sequence[str]], right: bool) -> list[str]:
    """Lines of a table whose columns stand under each other, set to the left or right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def _moved(size_bytes: int, busy_s: float) -> str:
    if not size_bytes:
        return "nothing"
    rate = f", {format_size_bytes(int(size_bytes / busy_s))}/s" if busy_s else ""
    return f"{format_size_bytes(size_bytes)} in {format_seconds(busy_s)}{rate}"


def _percentiles(figures: Latency) -> str:
    if not figures.count:
        return "none"
    return (
        f"p50 {format_seconds(figures.p50_s)}, p90 {format_seconds(figures.p90_s)},"
        f" p99 {format_seconds(figures.p99_s)}, max {format_seconds(figures.max_s)}"
    )


def _outcomes(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


__all__ = [
    "Arena",
    "Latency",
    "Report",
    "Turn",
    "align",
    "by_turn",
    "format_seconds",
    "latency",
    "make_report",
    "rows",
    "to_json",
    "turn_rows",
]
