"""Several trials of the same jobs: medians, and each job beside the limit. Pure.

Jobs take turns within a trial, so that what else happens on the machine meets all of them. A
ratio is taken within a trial, and of those the median: the two numbers of a ratio are then
seconds apart and not minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstore_bench.job import Job
from kvstore_bench.measured import Measured, measured
from kvstore_bench.report import bandwidth_text
from kvstore_bench.runner import JobResult

# A limit that is farther than this from its median in some trial measures what else runs.
SPREAD_MAX = 0.1


def summarize(results: Sequence[JobResult]) -> list[dict[str, Any]]:
    """One entry a job, in the order of their first trial; failed trials are left out.

    `ratio` compares with the first job whose ioengine is raw and whose I/Os are as large, in
    blocks of the same size; where threads spin, with the first job that is the same without them.
    It is None without one, and of a job with a rate, which is not to be as fast as it can.
    """
    by_job: dict[str, dict[int, Measured]] = {}
    jobs: dict[str, Job] = {}
    limits: dict[tuple[int, int], str] = {}
    undisturbed: dict[Job, str] = {}
    for result in results:
        job, found = result.job, measured(result)
        jobs[job.name] = job
        of_job = by_job.setdefault(job.name, {})
        if found is not None and not result.error:
            of_job[result.trial] = found
        if job.ioengine == "raw":
            limits.setdefault((job.bs, job.batch), job.name)
        if not job.spin:
            undisturbed.setdefault(_without_spin(job), job.name)
    entries = []
    for name, found_by_trial in by_job.items():
        job = jobs[name]
        if job.spin:
            reference = undisturbed.get(_without_spin(job), "")
        elif job.io_interval_s:
            reference = ""
        else:
            reference = limits.get((job.bs, job.batch), "")
        entries.append(_entry(name, found_by_trial, reference, by_job.get(reference, {})))
    return entries


def _without_spin(job: Job) -> Job:
    """What jobs have in common that differ in what spins beside them."""
    return msgspec.structs.replace(
        job, name="", given=(), spin=0, spin_outside=False, stonewall=False
    )


def unstable(summary: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings: jobs that others are compared with, and that differ between trials."""
    warnings = []
    for entry in summary:
        median = entry["bw_bytes"]
        if entry["jobname"] != entry["reference"] or not median:
            continue
        low, high = entry["bw_bytes_min"], entry["bw_bytes_max"]
        if low < (1 - SPREAD_MAX) * median or high > (1 + SPREAD_MAX) * median:
            percent = 100 * (high - low) / median
            warnings.append(
                f"unstable: {entry['jobname']} differs by {percent:.0f} % between trials;"
                " close other programs"
            )
    return warnings


def _entry(
    name: str, found: dict[int, Measured], reference: str, limit: dict[int, Measured]
) -> dict[str, Any]:
    rates = [one.bw_bytes for one in found.values()]
    ratios = [
        one.bw_bytes / limit[trial].bw_bytes
        for trial, one in found.items()
        if trial in limit and limit[trial].bw_bytes
    ]
    return {
        "jobname": name,
        "trials": len(found),
        "transports": sorted(
            {
                name
                for one in found.values()
                for name in (*one.read.transports, *one.write.transports)
            }
        ),
        "bw_bytes": _median(rates),
        "bw_bytes_min": min(rates, default=None),
        "bw_bytes_max": max(rates, default=None),
        "reference": reference,
        "ratio": _median(ratios),
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "cpu_s_per_gib": _median([one.cpu_s_per_gib for one in found.values()]),
        "client_s_per_gib": _median([one.client_s_per_gib for one in found.values()]),
        "server_s_per_gib": _median([one.server_s_per_gib for one in found.values()]),
        "server_us_per_block": _median([one.server_us_per_block for one in found.values()]),
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary_text(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as a table."""
    references = list(dict.fromkeys(e["reference"] for e in summary if e["reference"]))
    head = ["job", "transport", "trials", "median bandwidth"]
    head.append(f"of {references[0]}" if len(references) == 1 else "ratio" if references else "")
    head += ["[min-max]", "cpu-s/GiB", "client", "server", "us/block"]
    rows = [head]
    for entry in summary:
        low, high = entry["ratio_min"], entry["ratio_max"]
        rate = entry["bw_bytes"]
        rows.append(
            [
                entry["jobname"],
                "+".join(entry["transports"]) or "-",
                str(entry["trials"]),
                "-" if rate is None else bandwidth_text(rate),
                _ratio(entry, named=len(references) > 1),
                "-" if low is None else f"[{low:.2f}-{high:.2f}]",
                _number(entry["cpu_s_per_gib"], 3),
                _number(entry["client_s_per_gib"], 3),
                _number(entry["server_s_per_gib"], 3),
                _number(entry["server_us_per_block"]),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines = ["Medians; a ratio is taken within a trial:", *(f"  {line}" for line in lines)]
    return "\n".join([*lines, *unstable(summary)]) + "\n"


def _ratio(entry: dict[str, Any], named: bool) -> str:
    if entry["ratio"] is None:
        return "-"
    return f"{entry['ratio']:.2f}" + (f" of {entry['reference']}" if named else "")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
