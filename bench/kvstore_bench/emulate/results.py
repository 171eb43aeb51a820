"""What a run of a policy comes to: times, rates, bytes by path and by link. Pure."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.messages import ServedBy
from kvstore_bench.emulate.records import Played, Record
from kvstore_bench.shaped.network import STORAGE
from kvstore_bench.shaped.traffic import Reading

# A cluster is loaded while what is asked for and has not come takes its storage links so long.
LOADED_S = 1.0
# The links of nodes are compared over windows of so long.
BALANCE_WINDOW_S = 1.0

DIRECT, RELAY = ServedBy.DIRECT.name.lower(), ServedBy.RELAY.name.lower()


@dataclass(frozen=True, slots=True)
class Links:
    """The storage links that loads come by.

    Attributes:
        names: Of the nodes: those that any policy may use.
        rate_Bps: Of all of them together; 0 where they are not shaped.
    """

    names: Sequence[str]
    rate_Bps: float


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `nan` where there was nothing to measure.

    Attributes:
        jct_s: From the beginning to the end of the last turn.
        session_s, ttft_s, fetch_s: Of sessions; from the arrival of a turn to its first token;
            of loads that had hits.
        load_Bps: What storage links of GPU nodes received while the cluster was loaded, by the
            kernel's counters; and for how long that was.
        bytes_by_path: Hits by the way by which they came to the prefill node.
        link_bytes: By node, and `storage_rx` and the like.
        nic_max_over_avg: Of these links in windows while the cluster was loaded: the busiest
            beside the average; the mean over windows.
        selector_us: Of choices of paths: the bounds, powers of two, that half and 99 of 100 kept.
        wrong_blocks, missed_blocks: 0, or the run is void.
        errors: Why, the first of each.
    """

    policy: str
    turns: int
    jct_s: float
    session_s: Mapping[str, float]
    ttft_s: Mapping[str, float]
    fetch_s: Mapping[str, float]
    load_Bps: float
    loaded_s: float
    bytes_by_path: Mapping[str, int]
    link_bytes: Mapping[str, Mapping[str, int]]
    nic_max_over_avg: float
    selector_us: Mapping[str, float]
    wrong_blocks: int
    missed_blocks: int
    errors: Sequence[str]

    @property
    def void(self) -> bool:
        """Whether it may not be compared with others."""
        return bool(self.wrong_blocks or self.missed_blocks)

    def plain(self) -> dict[str, Any]:
        """For JSON, where there is no `nan`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: _plain(value) for name, value in values.items()}


def summarize(played: Played, links: Links, block_bytes: int) -> Result:
    """What a run comes to.

    Args:
        links: Of the cluster.
        block_bytes: Of one block.
    """
    records = played.records
    served: Counter[str] = Counter()
    for record in records:
        served.update(record.prefilled.served)
    loaded = loaded_times(records, links, block_bytes)
    load_Bps, loaded_s = rate_while(played, links.names, loaded)
    both = [(record.prefilled, record.decoded) for record in records]
    errors = dict.fromkeys(one.error for pair in both for one in pair if one.error)
    return Result(
        policy=played.policy,
        turns=len(records),
        jct_s=played.ended_at - played.began_at,
        session_s=percentiles(played.session_s),
        ttft_s=percentiles(
            [record.decoded.first_token_at - record.arrived_at for record in records]
        ),
        fetch_s=percentiles(
            [
                record.prefilled.loaded_at - record.prefilled.began_at
                for record in records
                if record.turn.hit_count
            ]
        ),
        load_Bps=load_Bps,
        loaded_s=loaded_s,
        bytes_by_path={name: served.get(name, 0) * block_bytes for name in _paths(served)},
        link_bytes=link_bytes(played),
        nic_max_over_avg=balance(played, links.names, loaded),
        selector_us={f"p{percent}": bound_of(played.plans, percent) for percent in (50, 99)},
        wrong_blocks=sum(decoded.wrong_blocks for _, decoded in both),
        missed_blocks=sum(
            prefilled.missed_blocks + decoded.missed_blocks + decoded.unstored_blocks
            for prefilled, decoded in both
        ),
        errors=tuple(errors),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99, of the values as they are."""
    ranked = sorted(values)
    if not ranked:
        return dict.fromkeys(("mean", "p50", "p90", "p99"), float("nan"))
    found = {"mean": sum(ranked) / len(ranked)}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = ranked[min(len(ranked) - 1, len(ranked) * percent // 100)]
    return found


def bound_of(counts: Mapping[float, int], percent: int) -> float:
    """The lowest bound that so many of a hundred kept to; `nan` without any."""
    total = sum(counts.values())
    kept = 0
    for bound in sorted(counts):
        kept += counts[bound]
        if total and kept * 100 >= total * percent:
            return bound
    return float("nan")


def loaded_times(
    records: Sequence[Record], links: Links, block_bytes: int
) -> list[tuple[float, float]]:
    """When so much was asked for and had not come that the links were busy with it for
    `LOADED_S`, in order. The bytes of a load are taken to come evenly."""
    if not links.rate_Bps:
        return []
    # What is queued is a line between these times: by how much it jumps, and its slope changes.
    steps: list[tuple[float, float, float]] = []
    for record in records:
        size = record.turn.hit_count * block_bytes
        began_at, loaded_at = record.prefilled.began_at, record.prefilled.loaded_at
        if size and loaded_at > began_at:
            slope = size / (loaded_at - began_at)
            steps += [(began_at, size, -slope), (loaded_at, 0.0, slope)]
    steps.sort()
    enough = LOADED_S * links.rate_Bps
    found: list[tuple[float, float]] = []
    queued = slope = 0.0
    for (at, jump, bend), (until, _, _) in itertools.pairwise([*steps, (_END, 0.0, 0.0)]):
        queued += jump
        slope += bend
        if until == _END:
            break
        after = queued + slope * (until - at)
        if queued >= enough:
            low = until if after >= enough else at + (queued - enough) / -slope
            if found and found[-1][1] == at:
                found[-1] = (found[-1][0], low)
            else:
                found.append((at, low))
        queued = after
    return found


def rate_while(
    played: Played, names: Sequence[str], times: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """What the storage links of some nodes received a second within these times, and for how
    long that was. Between two readings bytes are taken to come evenly."""
    places = _places(played, names)
    total = seconds = 0.0
    for one, then in itertools.pairwise(played.readings):
        if then.at <= one.at:
            continue
        within_s = sum(max(0.0, min(then.at, last) - max(one.at, first)) for first, last in times)
        size = sum(then.bytes[place] - one.bytes[place] for place in places)
        total += size * within_s / (then.at - one.at)
        seconds += within_s
    return (total / seconds if seconds else float("nan")), seconds


def balance(played: Played, names: Sequence[str], times: Sequence[tuple[float, float]]) -> float:
    """The busiest storage link beside the average, over windows that lie within these times."""
    places = _places(played, names)
    ratios: list[float] = []
    if not played.readings:
        return float("nan")
    for first, last in times:
        at = first
        while at + BALANCE_WINDOW_S <= last:
            before, after = _at(played.readings, at), _at(played.readings, at + BALANCE_WINDOW_S)
            carried = [after[place] - before[place] for place in places]
            if sum(carried):
                ratios.append(max(carried) * len(carried) / sum(carried))
            at += BALANCE_WINDOW_S
    return sum(ratios) / len(ratios) if ratios else float("nan")


def link_bytes(played: Played) -> dict[str, dict[str, int]]:
    """What each link carried, by node."""
    found: dict[str, dict[str, int]] = {}
    if played.readings:
        first, last = played.readings[0].bytes, played.readings[-1].bytes
        for (node, network, way), before, after in zip(played.links, first, last, strict=True):
            found.setdefault(node, {})[f"{network}_{way}"] = after - before
    return found


def _places(played: Played, names: Sequence[str]) -> list[int]:
    wanted = {(name, STORAGE, "rx") for name in names}
    return [place for place, link in enumerate(played.links) if link in wanted]


def _at(readings: Sequence[Reading], at: float) -> list[float]:
    """What the counters said at a time, between readings."""
    for one, then in itertools.pairwise(readings):
        if one.at <= at <= then.at and then.at > one.at:
            share = (at - one.at) / (then.at - one.at)
            return [a + (b - a) * share for a, b in zip(one.bytes, then.bytes, strict=True)]
    return [float(value) for value in readings[-1].bytes]


def _paths(served: Mapping[str, int]) -> list[str]:
    return [DIRECT, RELAY, *sorted(set(served) - {DIRECT, RELAY})]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


_END = float("inf")

__all__ = [
    "BALANCE_WINDOW_S",
    "LOADED_S",
    "Links",
    "Result",
    "balance",
    "bound_of",
    "link_bytes",
    "loaded_times",
    "percentiles",
    "rate_while",
    "summarize",
]
