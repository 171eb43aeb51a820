"""Results as text, in fio's shape. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.units import format_size_bytes
from kvstore_bench.histogram import PERCENTILES, Histogram
from kvstore_bench.job import Job
from kvstore_bench.measured import Measured, MeasuredDirection, measured, percent_of
from kvstore_bench.runner import JobResult

# A job that was this late at its end could not keep its rate up.
BEHIND_S = 0.1

# As fio: the largest unit in which neither the smallest value nor the spread is lost.
_TIME_UNITS = ((1_000_000, "msec"), (1_000, "usec"), (1, "nsec"))
_PERCENTILES_A_LINE = 4
_BINARY = ((1024**2, "Mi"), (1024, "Ki"), (1, ""))


def describe(job: Job, group: int) -> str:
    """A job before it runs, in one line."""
    text = f"{job.name}: (g={group}): rw={job.rw}, bs={format_size_bytes(job.bs)}"
    text += f" ({job.model}, {job.page_tokens} tokens)" * bool(job.model)
    text += f", batch={job.batch}, ioengine={job.ioengine}, iodepth={job.iodepth}"
    text += f", {rate_text(job)}" * bool(job.io_interval_s)
    if job.ioengine == "kv":
        text += f", path={job.path}" * (job.path != "direct")
        text += f", transport={job.transport}" * (job.transport != "auto")
        text += f", layout={job.layout}" * (job.layout != "block")
        text += f", order={job.order} by {job.group_layers}" * (job.order != "block")
        text += f", hit_rate={job.hit_rate:g}" * (job.hit_rate < 100)
        text += ", held" * job.held
        text += ", verify_checksums=0" * (not job.verify_checksums)
    text += f", spin={_spin_text(job)}" if job.spin else ""
    return text + (f", numjobs={job.numjobs}" if job.numjobs > 1 else "")


def rate_text(job: Job) -> str:
    """How often I/Os of a clone are due, in the words of its options."""
    if job.rate_iops:
        return f"rate_iops={job.rate_iops} {job.rate_process}"
    return f"rate={format_size_bytes(job.rate)}/s {job.rate_process}"


def _spin_text(job: Job) -> str:
    return f"{job.spin} (outside)" if job.spin_outside else str(job.spin)


def as_text(results: Sequence[JobResult], trials: int) -> str:
    """All results for people, as fio prints them."""
    lines: list[str] = []
    for result in results:
        lines += ["", *_job_lines(result, trials)]
    for trial in range(1, trials + 1):
        of_trial = [result for result in results if result.trial == trial]
        for group in sorted({result.group for result in of_trial}):
            members = [result for result in of_trial if result.group == group]
            lines += ["", *_group_lines(members, group, trial if trials > 1 else 0)]
    return "\n".join(lines[1:]) + "\n"


def _job_lines(result: JobResult, trials: int) -> list[str]:
    job, found = result.job, measured(result)
    began = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(result.began_at))
    trial = f", trial={result.trial}/{trials}" if trials > 1 else ""
    head = f"{job.name}: (groupid={result.group}, jobs={job.numjobs}{trial}): "
    lines = [head + f"err= {1 if result.error else 0}: {began}"]
    if result.error:
        lines.append(f"  error: {result.error}")
    if found is None:
        return lines
    unit = "" if job.ioengine == "raw" else f" ({job.batch} blocks an I/O)" * (job.batch > 1)
    for name, direction in (("read", found.read), ("write", found.write)):
        if direction.ios:
            lines += _direction_lines(name, direction, found.runtime_s, unit)
    share = 100 / found.clones_s if found.clones_s else 0.0
    cpu = f"  cpu          : usr={found.user_s * share:.2f}%, sys={found.system_s * share:.2f}%"
    cpu += f", ctx={found.switches}, majf={found.major_faults}, minf={found.minor_faults}"
    server_percent = percent_of(found.server_s, found.runtime_s)
    if server_percent is not None:
        cpu += f", server={server_percent:.2f}%"
    lines.append(cpu)
    if job.spin:
        lines.append(f"  spin         : threads={_spin_text(job)}, cpu={found.spin_s * share:.2f}%")
    if found.client_s_per_gib is not None and job.ioengine != "null":
        lines.append(f"  cpu-s/GiB    : {_cpu_text(found)}")
    if found.outcomes:
        counts = ", ".join(f"{word}={count}" for word, count in sorted(found.outcomes.items()))
        lines.append(f"  blocks       : {counts}")
    if job.hit_rate < 100 and job.reads:
        percent = found.hit_percent
        came = "-" if percent is None else f"{percent:.2f}%"
        lines.append(f"  hit rate     : {came} of {job.hit_rate:g}%")
    if job.io_interval_s:
        lines.append(f"  rate         : {_rate_line(job, found)}")
    lines += _travel_lines(found)
    if job.path == "views" and found.read.ios:
        other_us = found.views_us - found.verify_us_mean
        text = f"{other_us:.1f} us an I/O beside {found.verify_us_mean:.1f} us of verification"
        lines.append(f"  views        : {text}" + ", copied out for verify=1" * job.verify)
    if job.verify:
        lines.append(f"  verify       : {found.checked_blocks} blocks, {found.wrong_blocks} wrong")
    return lines


def _rate_line(job: Job, found: Measured) -> str:
    asked = job.numjobs / job.io_interval_s
    did = found.read.iops + found.write.iops
    text = f"asked {_rate_number(asked)} IOPS, did {_rate_number(did)}"
    if found.behind_s > max(BEHIND_S, job.io_interval_s):
        text += f"; fell behind: {found.behind_s:.2f} s at the end, so that waits grow with runtime"
    return text


def _rate_number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _travel_lines(found: Measured) -> list[str]:
    """What moved the bytes, and by which path where that is not the usual one."""
    both = bool(found.read.ios and found.write.ios)
    lines = []
    for label, reads, writes, usual in (
        ("transport", found.read.transports, found.write.transports, set[str]()),
        ("path", found.read.paths, found.write.paths, {"direct"}),
    ):
        if {*reads, *writes} <= usual:
            continue
        parts = [
            f"{direction} " * both
            + ", ".join(f"{name}={format_size_bytes(size)}" for name, size in sorted(sizes.items()))
            for direction, sizes in (("read", reads), ("write", writes))
            if sizes
        ]
        lines.append(f"  {label:<13}: {'; '.join(parts)}")
    return lines


def _cpu_text(found: Measured) -> str:
    client = found.client_s_per_gib or 0.0
    if found.server_s_per_gib is None or found.cpu_s_per_gib is None:
        return f"client {client:.3f} (the server's is not known: its process is not ours)"
    text = f"{found.cpu_s_per_gib:.3f} = client {client:.3f} + server {found.server_s_per_gib:.3f}"
    if found.server_us_per_block is not None:
        text += f"; server {found.server_us_per_block:.2f} us a block"
    return text


def _direction_lines(name: str, found: MeasuredDirection, runtime_s: float, unit: str) -> list[str]:
    total, runtime = format_size_bytes(found.bytes), f"{runtime_s * 1000:.0f}msec"
    lines = [
        f"  {name}: IOPS={_count_text(found.iops)}, BW={bandwidth_text(found.bw_bytes)}"
        f"({total}/{runtime}){unit}"
    ]
    if found.short_ios:
        lines.append(f"    short: {found.short_ios} of {found.ios} I/Os lack blocks")
    if found.wait.count:
        lines.append(_latency_line("wait", found.wait))
    for label, histogram in (("slat", found.slat), ("clat", found.clat), (" lat", found.lat)):
        if histogram.maximum or label != "slat":
            lines.append(_latency_line(label, histogram))
    if found.first.count:
        lines.append(_latency_line("first", found.first))
    # With a rate, what the caller of an I/O sees begins when it was due.
    if found.wait.count:
        return lines + _percentile_lines("lat", found.lat)
    return lines + _percentile_lines("clat", found.clat)


def _time_unit(found: Histogram) -> tuple[int, str]:
    for factor, name in _TIME_UNITS:
        if found.minimum > 2 * factor and found.maximum >= 100 * factor:
            return factor, name
    return _TIME_UNITS[-1]


def _latency_line(label: str, found: Histogram) -> str:
    factor, name = _time_unit(found)
    return (
        f"    {label} ({name}): min={found.minimum // factor}, max={found.maximum // factor},"
        f" avg={found.mean / factor:.2f}, stdev={found.deviation / factor:.2f}"
    )


def _percentile_lines(label: str, found: Histogram) -> list[str]:
    factor, name = _time_unit(found)
    values = [(percent, found.percentile(percent) // factor) for percent in PERCENTILES]
    width = max(len(str(value)) for _, value in values)
    cells = [f"{percent:5.2f}th=[{value:>{width}}]" for percent, value in values]
    lines = [f"    {label} percentiles ({name}):"]
    for at in range(0, len(cells), _PERCENTILES_A_LINE):
        lines.append("     | " + ", ".join(cells[at : at + _PERCENTILES_A_LINE]))
    return lines


def _group_lines(results: Sequence[JobResult], group: int, trial: int) -> list[str]:
    lines = [f"Run status group {group} (all jobs)" + (f", trial {trial}:" if trial else ":")]
    found = [m for m in map(measured, results) if m is not None]
    for label, directions in (
        ("READ", [(m.read, m.runtime_s) for m in found if m.read.ios]),
        ("WRITE", [(m.write, m.runtime_s) for m in found if m.write.ios]),
    ):
        if not directions:
            continue
        rate = sum(direction.bw_bytes for direction, _ in directions)
        total = sum(direction.bytes for direction, _ in directions)
        times = [round(runtime_s * 1000) for _, runtime_s in directions]
        lines.append(
            f"  {label:>5}: bw={bandwidth_text(rate)}, io={format_size_bytes(total)}"
            f" ({_decimal(total)}B), run={min(times)}-{max(times)}msec"
        )
    return lines


def bandwidth_text(bytes_per_s: float) -> str:
    """Bytes a second with both kinds of prefixes: `2383MiB/s (2499MB/s)`."""
    factor, prefix = next(
        (factor, prefix) for factor, prefix in _BINARY if bytes_per_s >= factor or factor == 1
    )
    binary = bytes_per_s / factor
    digits = 1 if binary < 100 and factor > 1 else 0
    return f"{binary:.{digits}f}{prefix}B/s ({_decimal(bytes_per_s)}B/s)"


def _decimal(value: float) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * (10 if prefix == "G" else 1):
            scaled = value / factor
            return f"{scaled:.{1 if scaled < 100 else 0}f}{prefix}"
    return f"{value:.0f}"


def _count_text(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"
