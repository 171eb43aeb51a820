"""The command `kvbench compare`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore_bench.comparison import (
    BETTER,
    CHANCE_MAX,
    TRIALS_MIN,
    WORSE,
    Comparison,
    Row,
    compare,
)
from kvstore_bench.report import bandwidth_text
from kvstore_bench.resultfile import read_results

EXIT_SAME, EXIT_WORSE = 0, 1
THRESHOLD_PERCENT = 5.0
_UNITS = ((1e6, "ms"), (1e3, "us"), (1, "ns"))

EPILOG = f"""
examples:
  kvbench run limits.ini --trials=5 --output-format=json --output=before.json
  kvbench run limits.ini --trials=5 --output-format=json --output=after.json
  kvbench compare before.json after.json
      medians of both, their ratio, and whether they differ by more than their trials do
  kvbench compare before.json after.json --threshold=2 || echo slower
      smaller differences count too

A value is "better" or "worse" if its medians differ by more than the threshold, and if trials of
one and the same thing would lie as far apart in at most one of {1 / CHANCE_MAX:.0f} comparisons
(rank-sum test of Mann and Whitney, two-sided); else it is "same", or "noise" where medians are
farther apart. That takes {TRIALS_MIN} trials of each at least; with fewer the table says so.
Where a job was compared with a reference (the job of ioengine=raw, see `kvbench run`), the ratio
to it within each trial decides, and bandwidth is shown only: the two runs met the machine in
different moods. Where the reference itself differs, nothing but ratios is judged.
fio's own JSON can be compared too; jobs of one name are its trials.

exit status: 0 nothing that is judged is worse; 1 something is, or a job failed in B that did not
in A; 2 a file cannot be read, or holds nothing that both have.
"""


def add_compare_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare` to the commands of `kvbench`."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two results of `run`: better, worse, or within the noise of their trials",
        description="Compare two files of results, and say what differs beyond the noise.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="A.json", help="written by kvbench run --output-format")
    parser.add_argument("after", metavar="B.json", help="the same jobs, later")
    parser.add_argument(
        "--threshold",
        metavar="PERCENT",
        default=f"{THRESHOLD_PERCENT:g}",
        help=f"smaller differences of medians are none ({THRESHOLD_PERCENT:g})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare; the exit status.

    Raises:
        ConfigError: A file cannot be read, or there is nothing to compare.
    """
    threshold = _threshold(args.threshold)
    before, after = read_results(Path(args.before)), read_results(Path(args.after))
    found = compare(before, after, threshold)
    if not found.rows:
        names = ", ".join(before.jobs)
        raise ConfigError("B.json", args.after, f"has none of the jobs of {args.before}: {names}")
    print(as_text(found, args.before, args.after), end="")
    return EXIT_WORSE if found.worse else EXIT_SAME


def _threshold(text: str) -> float:
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 1000:
        raise ConfigError("--threshold", text, "must be a percentage from 0 to 1000")
    return percent / 100


def as_text(found: Comparison, before: str, after: str) -> str:
    """The comparison as a table."""
    rows = [["job", "what", "A", "[min-max]", "B", "[min-max]", "B/A", "verdict"]]
    last = ""
    for row in found.rows:
        rows.append([row.job if row.job != last else "", *_cells(row)])
        last = row.job
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"A: {before}", f"B: {after}", ""]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += ["", *found.notes] if found.notes else []
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    ratio = row.ratio
    verdict = row.verdict
    if row.verdict in (BETTER, WORSE):
        verdict += f" (chance {row.chance:.2g})" + " - shown only" * (not row.counts)
    return [
        row.what,
        _median_text(row.kind, row.before),
        _range_text(row.before),
        _median_text(row.kind, row.after),
        _range_text(row.after),
        "-" if ratio is None else f"{ratio:.3f}",
        verdict,
    ]


def _median_text(kind: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    median = statistics.median(values)
    match kind:
        case "bandwidth":
            return bandwidth_text(median)
        case "latency":
            factor, unit = next(
                (factor, unit) for factor, unit in _UNITS if median >= 10 * factor or factor == 1
            )
            return f"{median / factor:.1f} {unit}"
        case "iops":
            return f"{median:.1f}" if median < 1000 else f"{median:.0f}"
        case _:
            return f"{median:.3f}"


def _range_text(values: Sequence[float]) -> str:
    """How far trials lie from their median."""
    median = statistics.median(values) if values else 0.0
    if not median or len(values) < 2:
        return "-"
    low, high = min(values) / median - 1, max(values) / median - 1
    return f"[{low:+.1%} {high:+.1%}]"


__all__ = ["add_compare_parser", "as_text", "run"]
