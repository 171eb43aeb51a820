"""Whether one run's results differ from another's by more than their trials differ. Pure.

A value is compared by its medians, and differs when both hold:

- the medians are farther apart than a threshold, below which nobody cares;
- trials of the two runs are not mixed as chance would mix them: the rank-sum test of Mann and
  Whitney (Annals of Mathematical Statistics 18, 1947), exact, two-sided. It takes nothing for
  granted about how values are distributed, and speaks of three trials of each at the earliest.

Two runs are not interleaved: what else the machine did meanwhile differs too. Where jobs have a
reference, as `raw`, the ratio to it within each trial is judged instead of what depends on the
machine; and where the reference itself differs, latencies and costs are shown and not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from kvstore_bench.resultfile import DIRECTIONS, ResultFile, TrialResult

# Three trials of each reach it if all of one lie above all of the other: 2 of 20 orders.
CHANCE_MAX = 0.1
TRIALS_MIN = 3
PERCENTILES = (50.0, 99.0)
# An exact distribution takes count^4 steps; beyond, the normal one is as good.
EXACT_MAX = 20

#: Verdicts. SAME: medians lie within the threshold; NOISE: they do not, and trials are as mixed.
BETTER, WORSE, SAME, NOISE, FEW, FAILED = (
    "better",
    "worse",
    "same",
    "noise",
    "too few trials",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A value of a job in both runs.

    Attributes:
        what: "read bandwidth" and so on.
        kind: "bandwidth", "iops", "latency", "cost" or "ratio".
        before, after: Of each trial.
        chance: How often trials of the same thing would lie this far apart.
        counts: Whether a worse one makes the whole comparison one.
    """

    job: str
    what: str
    kind: str
    before: Sequence[float]
    after: Sequence[float]
    chance: float
    verdict: str
    counts: bool

    @property
    def ratio(self) -> float | None:
        """The median after, in medians before."""
        if not self.before or not self.after or not statistics.median(self.before):
            return None
        return statistics.median(self.after) / statistics.median(self.before)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All values of two runs, and what is to be said beside them."""

    rows: Sequence[Row]
    notes: Sequence[str]

    @property
    def worse(self) -> bool:
        """Whether something that counts is worse."""
        return any(row.counts and row.verdict in (WORSE, FAILED) for row in self.rows)


def chance_of(before: Sequence[float], after: Sequence[float]) -> float:
    """How often two samples of the same thing would be ranked as one-sidedly as these."""
    count, other = len(before), len(after)
    if not count or not other:
        return 1.0
    # Pairs in which the later one is larger; equal ones are half a pair.
    wins = sum((a < b) + (a == b) / 2 for a in before for b in after)
    extreme = min(wins, count * other - wins)
    if max(count, other) > EXACT_MAX:
        deviation = math.sqrt(count * other * (count + other + 1) / 12)
        distance = max(0.0, count * other / 2 - extreme - 0.5) / deviation
        return min(1.0, math.erfc(distance / math.sqrt(2)))
    orders = sum(_orders(count, other, wins) for wins in range(math.floor(extreme) + 1))
    # Equal values make it larger than it is, never smaller.
    orders += _orders(count, other, math.ceil(extreme)) if extreme % 1 else 0
    return min(1.0, 2 * orders / math.comb(count + other, count))


@cache
def _orders(count: int, other: int, wins: int) -> int:
    """In how many orders of two samples the second wins that many pairs."""
    if wins < 0 or wins > count * other:
        return 0
    if not count or not other:
        return 1
    # The largest value is the second's, and wins against all of the first, or the first's.
    return _orders(count, other - 1, wins - count) + _orders(count - 1, other, wins)


def compare(before: ResultFile, after: ResultFile, threshold: float) -> Comparison:
    """Compare the jobs that both have.

    Args:
        threshold: Ratios closer to 1 than this are no difference.
    """
    notes = _notes(before, after)
    references = {
        job: name for job, name in before.references.items() if after.references.get(job) == name
    }
    shifted = {
        name
        for name in dict.fromkeys(references.values())
        if _row(before, after, name, "bandwidth", "bandwidth", _bandwidth, threshold).verdict
        in (BETTER, WORSE)
    }
    notes += [
        f"{name} itself differs: the machine does, and only ratios to {name} are judged"
        for name in sorted(shifted)
    ]
    rows: list[Row] = []
    for job in before.jobs:
        if job in after.jobs:
            rows += _rows(before, after, job, references.get(job, ""), shifted, threshold)
    return Comparison(rows, notes)


def _rows(
    before: ResultFile,
    after: ResultFile,
    job: str,
    reference: str,
    shifted: set[str],
    threshold: float,
) -> list[Row]:
    if not before.good(job) or not after.good(job):
        failed = bool(before.good(job)) and not after.good(job)
        return [Row(job, "all trials", "", (), (), 1.0, FAILED, failed)]
    # A reference measures the machine, and what is compared with it has its ratio.
    is_reference = job == reference or job in before.references.values()
    by_ratio = bool(reference) and not is_reference
    rates_count = not by_ratio and not is_reference
    others_count = not is_reference and reference not in shifted
    rows = []

    def add(what: str, kind: str, value: _Value, counts: bool) -> None:
        row = _row(before, after, job, what, kind, value, threshold, counts)
        if row.before and row.after:
            rows.append(row)

    for name in DIRECTIONS:
        add(f"{name} bandwidth", "bandwidth", _of(name, lambda d: d.bw_bytes), rates_count)
        add(f"{name} IOPS", "iops", _of(name, lambda d: d.iops), rates_count)
        label = _latency_label(before, after, job, name)
        for percent in PERCENTILES if label else ():
            value = _of(name, lambda d, percent=percent: d.percentiles_ns.get(percent))
            add(f"{name} {label} p{percent:g}", "latency", value, others_count)
        add(f"{name} first p50", "latency", _of(name, lambda d: d.first_ns), others_count)
    add("cpu-s/GiB", "cost", lambda trial: trial.cpu_s_per_gib, others_count)
    if by_ratio:
        first, second = _ratios(before, job, reference), _ratios(after, job, reference)
        rows.append(_judged(job, f"of {reference}", "ratio", first, second, threshold, counts=True))
    return rows


_Value = Callable[[TrialResult], float | None]


def _bandwidth(trial: TrialResult) -> float | None:
    return trial.bw_bytes


def _of(direction: str, value: Callable[..., float | None]) -> _Value:
    def of(trial: TrialResult) -> float | None:
        found = trial.directions.get(direction)
        return None if found is None else value(found)

    return of


def _latency_label(before: ResultFile, after: ResultFile, job: str, direction: str) -> str:
    """What latencies both have; empty if they are not of the same."""
    labels = {
        trial.directions[direction].latency
        for file in (before, after)
        for trial in file.good(job)
        if direction in trial.directions
    }
    return labels.pop() if len(labels) == 1 else ""


def _ratios(file: ResultFile, job: str, reference: str) -> list[float]:
    limits = {trial.trial: trial.bw_bytes for trial in file.good(reference)}
    return [
        trial.bw_bytes / limits[trial.trial] for trial in file.good(job) if limits.get(trial.trial)
    ]


def _row(
    before: ResultFile,
    after: ResultFile,
    job: str,
    what: str,
    kind: str,
    value: _Value,
    threshold: float,
    counts: bool = True,
) -> Row:
    first, second = (
        [found for trial in file.good(job) if (found := value(trial)) is not None]
        for file in (before, after)
    )
    return _judged(job, what, kind, first, second, threshold, counts)


def _judged(
    job: str,
    what: str,
    kind: str,
    before: Sequence[float],
    after: Sequence[float],
    threshold: float,
    counts: bool,
) -> Row:
    chance = chance_of(before, after)
    row = Row(job, what, kind, before, after, chance, SAME, counts)
    ratio = row.ratio
    verdict = SAME
    if min(len(before), len(after)) < TRIALS_MIN:
        verdict = FEW
    elif ratio is not None and abs(ratio - 1) > threshold:
        larger_is_better = kind in ("bandwidth", "iops", "ratio")
        verdict = BETTER if (ratio > 1) == larger_is_better else WORSE
        if chance > CHANCE_MAX:
            verdict = NOISE
    return Row(job, what, kind, before, after, chance, verdict, counts)


def _notes(before: ResultFile, after: ResultFile) -> list[str]:
    notes = []
    for file, other in ((before, after), (after, before)):
        missing = [job for job in file.jobs if job not in other.jobs]
        if missing:
            notes.append(f"only in {file.name}: {', '.join(missing)}")
    if before.machine and after.machine:
        names = [name for name in before.machine if before.machine[name] != after.machine.get(name)]
        if names:
            notes.append(f"the machines differ: {', '.join(names)}")
    for job, trials in before.jobs.items():
        if job not in after.jobs:
            continue
        first, second = trials[0].options, after.jobs[job][0].options
        changed = [
            f"{name}={first.get(name, '-')} and {second.get(name, '-')}"
            for name in sorted({*first, *second})
            if first.get(name) != second.get(name)
        ]
        if changed:
            notes.append(f"{job}: options differ: {'; '.join(changed)}")
    notes += [f"{file.name}: {text}" for file in (before, after) for text in file.warnings]
    return notes


__all__ = ["CHANCE_MAX", "TRIALS_MIN", "Comparison", "Row", "chance_of", "compare"]
