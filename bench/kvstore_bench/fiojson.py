"""Results as JSON, in fio's shape, so that what reads fio's results reads ours. Pure.

JSON history (`"kvbench format"`):

1   fio 3's names and units. An I/O of `kv` is a batch of blocks. Ours beside fio's: `trial`,
    `error_text`, `cpu` and `blocks` in each job, `batch` always among its options; `blocks_iops`,
    blocks a second, beside `iops`; `transports` and `paths`, bytes by what moved them and by the
    path, in each direction; `spin`, the threads that spin in each clone and their processor time;
    `views`, with path=views: what leasing, verifying and giving back an I/O's views took;
    `wait_ns`, with a rate, in each direction: from when an I/O was due until it began, which is
    part of `lat_ns`; `first_ns`, with order=layer: until the first group of layers was there;
    `rate`, what was asked for and how late it was at the end; `hit_rate`, of blocks that were
    read; `summary` and `warnings` over several trials. Of fio's there are no `iodepth_*` and
    `latency_depth` and following, which nobody measures here, and no `bw_agg`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from kvstore.version import VERSION
from kvstore_bench.histogram import PERCENTILES, VALUE_MAX, Histogram
from kvstore_bench.job import Job
from kvstore_bench.measured import MeasuredDirection, measured, percent_of
from kvstore_bench.runner import JobResult
from kvstore_bench.sampling import spread

FORMAT = 1

_DIRECTIONS = ("read", "write", "trim")
# fio's histograms end here, and what converts its bins looks no farther: slower I/Os are in the
# last of its buckets (stat.h: 29 groups of 64).
FIO_BIN_MAX_NS = 17_112_760_320
# The edges of fio's latency distributions, and its names: what is below the first, then below
# the next ... (stat.c, `io_u_mark_latency`), in nanoseconds, microseconds and milliseconds.
_EDGES = (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)
_EDGES_MS = (*_EDGES, 2000)


def as_json(
    results: Sequence[JobResult], now: float, machine: dict[str, Any], bins: bool
) -> dict[str, Any]:
    """All results, for `json.dumps`.

    Args:
        now: Seconds since 1970.
        machine: What it ran on.
        bins: Whether to add all buckets of the latencies (json+).
    """
    return {
        "fio version": f"kvbench-{VERSION}",
        "kvbench format": FORMAT,
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(now)),
        "global options": {},
        "machine": machine,
        "jobs": [_job_json(result, bins) for result in results],
    }


_NOTHING = MeasuredDirection([], 0.0)


def _job_json(result: JobResult, bins: bool) -> dict[str, Any]:
    job, found = result.job, measured(result)
    entry: dict[str, Any] = {
        "jobname": job.name,
        "groupid": result.group,
        "trial": result.trial,
        "job_start": int(result.began_at * 1000),
        "error": 1 if result.error else 0,
        "error_text": result.error,
        "eta": 0,
        "elapsed": round(result.elapsed_s),
        # Beside what was given `batch`, without which nobody knows what an I/O is.
        "job options": {"name": job.name, "batch": str(job.batch), **_given(job)},
    }
    # What was not done has zeros, as fio's.
    entry |= {name: _direction_json(_NOTHING, job.bs, 0, bins) for name in _DIRECTIONS}
    if found is None:
        return entry
    runtime_ms = round(found.runtime_s * 1000)
    share = 100 / found.clones_s if found.clones_s else 0.0
    entry |= {
        "read": _direction_json(found.read, job.bs, runtime_ms, bins),
        "write": _direction_json(found.write, job.bs, runtime_ms, bins),
        **_distribution([found.read.clat, found.write.clat]),
        "job_runtime": round(found.clones_s * 1000),
        "usr_cpu": found.user_s * share,
        "sys_cpu": found.system_s * share,
        "ctx": found.switches,
        "majf": found.major_faults,
        "minf": found.minor_faults,
        "server_cpu": percent_of(found.server_s, found.runtime_s),
        "cpu": {
            "client_s": found.client_s,
            "server_s": found.server_s,
            "client_s_per_gib": found.client_s_per_gib,
            "server_s_per_gib": found.server_s_per_gib,
            "s_per_gib": found.cpu_s_per_gib,
            "server_us_per_block": found.server_us_per_block,
        },
        "spin": {"threads": job.spin, "outside": job.spin_outside, "cpu_s": found.spin_s},
        "blocks": {
            "outcomes": dict(sorted(found.outcomes.items())),
            "checked": found.checked_blocks,
            "wrong": found.wrong_blocks,
        },
    }
    if job.io_interval_s:
        entry["rate"] = {
            "iops_asked": job.numjobs / job.io_interval_s,
            "process": job.rate_process,
            "behind_s": found.behind_s,
        }
    if job.hit_rate < 100:
        entry["hit_rate"] = {"asked": job.hit_rate, "percent": found.hit_percent}
    if job.path == "views":
        entry["views"] = {
            "verify_us_mean": found.verify_us_mean,
            "other_us_mean": found.views_us - found.verify_us_mean,
        }
    return entry


def _given(job: Job) -> dict[str, str]:
    """The options as they were written, and what follows from a model."""
    of_model = {"bs": str(job.bs), "layers": str(job.layers)} if job.model else {}
    return {**of_model, **dict(job.given)}


def _direction_json(
    found: MeasuredDirection, block_bytes: int, runtime_ms: int, bins: bool
) -> dict[str, Any]:
    return {
        "io_bytes": found.bytes,
        "io_kbytes": found.bytes // 1024,
        "bw_bytes": round(found.bw_bytes),
        "bw": round(found.bw_bytes / 1024),
        "iops": found.iops,
        "blocks_iops": found.bw_bytes / block_bytes,
        "transports": dict(sorted(found.transports.items())),
        "paths": dict(sorted(found.paths.items())),
        "runtime": runtime_ms if found.ios else 0,
        "total_ios": found.ios,
        "short_ios": found.short_ios,
        "drop_ios": 0,
        **_samples_json(found),
        **({"wait_ns": _latency_json(found.wait, bins)} if found.wait.count else {}),
        **({"first_ns": _latency_json(found.first, bins)} if found.first.count else {}),
        "slat_ns": _latency_json(found.slat, bins),
        "clat_ns": _latency_json(found.clat, bins),
        "lat_ns": _latency_json(found.lat, bins),
    }


def _samples_json(found: MeasuredDirection) -> dict[str, Any]:
    rates = found.windows.rates()
    bandwidth = spread(size_bytes / 1024 for size_bytes, _ in rates)
    ios = spread(count for _, count in rates)
    return {
        "bw_min": round(bandwidth.minimum),
        "bw_max": round(bandwidth.maximum),
        "bw_mean": bandwidth.mean,
        "bw_dev": bandwidth.deviation,
        "bw_samples": bandwidth.count,
        "iops_min": round(ios.minimum),
        "iops_max": round(ios.maximum),
        "iops_mean": ios.mean,
        "iops_stddev": ios.deviation,
        "iops_samples": ios.count,
    }


def _latency_json(found: Histogram, bins: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "min": found.minimum if found.count else 0,
        "max": found.maximum,
        "mean": found.mean,
        "stddev": found.deviation,
        "N": found.count,
    }
    if found.count:
        entry["percentile"] = {f"{p:.6f}": found.percentile(p) for p in PERCENTILES}
        if bins:
            entry["bins"] = _bins(found)
    return entry


def _bins(found: Histogram) -> dict[str, int]:
    """The buckets, whose places and middles are fio's, but for the end."""
    bins: dict[str, int] = {}
    for value, count in found.bins().items():
        name = str(min(value, FIO_BIN_MAX_NS))
        bins[name] = bins.get(name, 0) + count
    return bins


def _distribution(histograms: Sequence[Histogram]) -> dict[str, dict[str, float]]:
    """`latency_ns`, `latency_us` and `latency_ms`: percent of all I/Os by their order of
    magnitude."""
    names = [
        *(("latency_ns", str(edge), edge) for edge in _EDGES),
        *(("latency_us", str(edge), edge * 1000) for edge in _EDGES),
        *(("latency_ms", str(edge), edge * 1_000_000) for edge in _EDGES_MS),
        ("latency_ms", ">=2000", VALUE_MAX + 1),
    ]
    total = sum(histogram.count for histogram in histograms)
    found: dict[str, dict[str, float]] = {}
    for kind, name, _ in names:
        found.setdefault(kind, {})[name] = 0.0
    edges = [edge for _, _, edge in names]
    for histogram in histograms:
        for value, count in histogram.bins().items():
            kind, name, _ = names[bisect_right(edges, value)]
            found[kind][name] += 100 * count / total
    return found
