"""What `kvbench emulate` says for people, and for programs."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.units import format_size_bytes
from kvstore_bench.emulate.options import Options
from kvstore_bench.emulate.results import Result
from kvstore_bench.emulate.search import Found
from kvstore_bench.replay.report import align
from kvstore_client.selector import Policy

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1


def headline(options: Options) -> str:
    """The cluster and the work in a line."""
    shape, work = options.shape, options.work
    turns = sum(1 for _ in work.turns)
    return (
        f"{shape.prefill}P{shape.decode}D, storage NICs of {_rate(shape.storage_nic_Bps)}, compute"
        f" NICs of {_rate(shape.compute_nic_Bps)}; {len(work.sessions)} sessions, {turns} turns,"
        f" {format_size_bytes(work.hit_bytes)} of hits"
    )


def describe(options: Options) -> Iterable[str]:
    """What will be run, and how it was scaled."""
    work, shape, compute = options.work, options.shape, options.compute
    scale, turns = work.scale, list(work.turns)
    yield headline(options)
    for (node, network), rate_Bps in shape.rates_Bps.items():
        yield f"  {node}: {network} NIC of {_rate(rate_Bps)}"
    yield (
        f"  scaled: {scale.bytes_per_token} bytes a token, a block of {work.block_tokens} tokens"
        f" for {scale.token_scale} of the trace, {len(work.sessions)} of {work.session_count}"
        f" sessions, {len(turns)} of {work.turn_count} turns"
    )
    yield (
        f"  blocks of {format_size_bytes(work.block_bytes)} in {scale.layers} layers; longest"
        f" prompt {format_size_bytes(work.longest_bytes)}, new"
        f" {format_size_bytes(work.new_bytes)}"
    )
    prefill_s = sum(map(compute.prefill_s, turns))
    decode_s = sum(sum(compute.answer_s(turn)) for turn in turns)
    direct_Bps = shape.storage_Bps("prefill")
    load_s = work.hit_bytes / direct_Bps if direct_Bps else 0.0
    yield (
        f"  ideal times: loads {load_s:.1f} s directly; prefill {prefill_s:.1f} s, decode"
        f" {decode_s:.1f} s in all; layers {'overlap' if compute.overlap else 'do not overlap'};"
        f" deadline {options.deadline_s:.0f} s"
    )
    if options.arrivals.rate:
        yield f"  sessions begin at random, {options.arrivals.rate:g} a second"


def table(results: Sequence[Result]) -> list[str]:
    """A line for each run, beside the first of its trial."""
    rows = [
        ["policy", "jct s", "speed-up", "ttft p50", "p99", "fetch p50", "p99", "loaded MB/s",
         "relay", "busiest NIC", "wrong", "missed"]
    ]  # fmt: skip
    direct = [result.jct_s for result in results if result.policy == Policy.DIRECT]
    seen: dict[str, int] = {}
    for result in results:
        trial = seen[result.policy] = seen.get(result.policy, -1) + 1
        base = direct[trial] if trial < len(direct) else float("nan")
        paths = result.bytes_by_path
        total = sum(paths.values())
        rows.append(
            [
                result.policy,
                f"{result.jct_s:.1f}",
                _number(base / result.jct_s),
                *(_number(result.ttft_s[name]) for name in ("p50", "p99")),
                *(_number(result.fetch_s[name]) for name in ("p50", "p99")),
                _number(result.load_Bps / 1e6),
                f"{paths['relay'] / total:.2f}" if total else "-",
                _number(result.nic_max_over_avg),
                str(result.wrong_blocks),
                str(result.missed_blocks),
            ]
        )
    return align(rows, right=True)


def voids(results: Sequence[Result]) -> list[str]:
    """A line for each run that may not be compared with others."""
    return [
        f"{result.policy}: VOID, {result.missed_blocks} blocks were missed, {result.wrong_blocks}"
        f" wrong: {'; '.join(result.errors) or 'no reason was given'}"
        for result in results
        if result.void
    ]


def search_table(found: Sequence[Found]) -> list[str]:
    """The highest rate of each policy, beside the first."""
    if not found:
        return []
    rows = [["policy", "sessions/s", "of the first", "ttft p90 within s", "tries"]]
    for one in found:
        beside = one.sessions_per_s / found[0].sessions_per_s if found[0].sessions_per_s else 0.0
        rows.append(
            [
                one.policy,
                f"{one.sessions_per_s:.3g}",
                _number(beside),
                _number(one.limit_s),
                str(len(one.tries)),
            ]
        )
    return align(rows, right=True)


def as_json(
    options: Options, results: Sequence[Result], found: Sequence[Found] = ()
) -> dict[str, Any]:
    """All figures."""
    work, scale = options.work, options.work.scale
    return {
        "version": JSON_VERSION,
        "time": time.time(),
        "machine": {"kernel": platform.release(), "python": platform.python_version()},
        "work": {
            "sources": list(work.sources),
            "sessions": len(work.sessions),
            "turns": sum(1 for _ in work.turns),
            "hit_bytes": work.hit_bytes,
            "new_bytes": work.new_bytes,
            "block_bytes": work.block_bytes,
            "bytes_per_token": scale.bytes_per_token,
            "token_scale": scale.token_scale,
            "layers": scale.layers,
            "groups": options.groups,
        },
        "compute": {
            "token_s": options.compute.token_s,
            "attention_s": options.compute.attention_s,
            "decode_s": options.compute.decode_s,
            "overlap": options.compute.overlap,
        },
        "arrival_rate": options.arrivals.rate,
        "nics_Bps": {plan.name: dict(plan.rates_Bps) for plan in options.shape.plans()},
        "searches": [
            {
                "policy": one.policy,
                "limit_s": one.limit_s,
                "sessions_per_s": one.sessions_per_s,
                "tries": [{"rate": rate, "ttft_p90_s": ttft_s} for rate, ttft_s in one.tries],
            }
            for one in found
        ],
        "runs": [
            {
                "prefill": options.shape.prefill,
                "decode": options.shape.decode,
                **result.plain(),
            }
            for result in results
        ],
    }


def _rate(rate_Bps: float) -> str:
    return f"{rate_Bps * 8 / 1e6:g} Mbit/s" if rate_Bps else "no limit"


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


__all__ = ["as_json", "describe", "headline", "search_table", "table", "voids"]
