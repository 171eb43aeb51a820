"""The command `kvbench plot`: bandwidth of each trial, and how latencies are distributed."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.errors import ConfigError
from kvstore_bench.outputs import check_output, write_output
from kvstore_bench.resultfile import DIRECTIONS, ResultFile, read_results

SUFFIXES = (".png", ".svg", ".pdf")
# Lines of one picture that an eye can follow.
LINES_MAX = 16
# Colours that stay apart for the colour-blind, from: M. Okabe, K. Ito, "Color Universal
# Design", 2008. Lines beyond them are dashed.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#A0A000")
_TICKS = (50.0, 90.0, 99.0, 99.9, 99.99)
_TEXT = "#555555"

EPILOG = """
examples:
  kvbench run limits.ini --trials=5 --output-format=json --output=limits.json
  kvbench plot limits.json
      writes limits.svg
  kvbench plot limits.json --output=limits.png

Above: the bandwidth of each job in each trial; lines that run side by side say that jobs differ,
and lines that jump together say that the machine did something else. Below: the latency that a
share of the I/Os did not exceed, the median of the trials as a line and all of them as a band; a
line ends where only one I/O took longer.
With a rate, latencies are counted from when an I/O was due. fio's own JSON can be drawn too.
It needs matplotlib: pip install 'dualpath-kvstore[bench]'.

exit status: 0 drawn; 1 it could not be written; 2 the file holds no results, or matplotlib is
missing.
"""


class Line(NamedTuple):
    """One direction of one job.

    Attributes:
        rates_MBps: Of each trial, by its number.
        percentiles: (percentage, lowest, median, highest of the trials in milliseconds), up to
            the one that a single I/O exceeded.
        latency: What they are of.
    """

    label: str
    rates_MBps: dict[int, float]
    percentiles: list[tuple[float, float, float, float]]
    latency: str


def add_plot_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plot` to the commands of `kvbench`."""
    parser = subparsers.add_parser(
        "plot",
        help="draw results of `run`: bandwidth by trial, latency percentiles",
        description="Draw a file of results: bandwidth by trial, and latency percentiles.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.json", help="written by kvbench run --output-format")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="",
        help=f"where to: ends in {', '.join(SUFFIXES)} (FILE.svg)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw; the exit status.

    Raises:
        ConfigError: There is nothing to draw, or nothing to draw it with.
        OutputError: The picture could not be written.
    """
    source = Path(args.file)
    path = Path(args.output) if args.output else source.with_suffix(".svg")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("--output", path, f"must end in {', '.join(SUFFIXES)}")
    results = read_results(source)
    lines = lines_of(results)
    if not lines:
        raise ConfigError("FILE", source, "all jobs have failed: there is nothing to draw")
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "needs matplotlib: pip install 'dualpath-kvstore[bench]'"
        raise ConfigError("--output", path, remedy)
    check_output("--output", path)
    write_output("--output", path, draw(lines, results, path.suffix[1:].lower()))
    print(path)
    return 0


def lines_of(results: ResultFile) -> list[Line]:
    """What there is to draw, in the order of the file; failed trials are left out."""
    lines = []
    for job in results.jobs:
        trials = results.good(job)
        used = [name for name in DIRECTIONS if any(name in one.directions for one in trials)]
        for name in used:
            found = {one.trial: one.directions[name] for one in trials if name in one.directions}
            # Trials of one job have the same percentages.
            known = [one.percentiles_ns for one in found.values()]
            shared = sorted(set.intersection(*(set(one) for one in known)))
            # Of ten I/Os nobody knows what 99 % of them did not exceed.
            fewest = min(one.ios for one in found.values())
            shared = [percent for percent in shared if fewest * (100 - percent) > 99.9]
            values = [(percent, [one[percent] / 1e6 for one in known]) for percent in shared]
            lines.append(
                Line(
                    f"{job} {name}" if len(used) > 1 else job,
                    {trial: one.bw_bytes / 1e6 for trial, one in found.items()},
                    [
                        (percent, min(each), statistics.median(each), max(each))
                        for percent, each in values
                    ],
                    next(iter(found.values())).latency,
                )
            )
    return lines


def draw(lines: list[Line], results: ResultFile, kind: str) -> bytes:
    """The picture.

    Args:
        kind: "png", "svg" or "pdf".
    """
    # It takes a second to import, and most commands draw nothing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1)
    shown = lines[:LINES_MAX]
    left_out = f", {len(lines) - len(shown)} more are not shown" * (len(lines) > len(shown))
    figure.suptitle(f"{Path(results.name).name}{left_out}\n", fontsize=12, fontweight="bold")
    figure.text(0.5, 0.958, _subtitle(results), ha="center", va="top", color=_TEXT)
    for number, line in enumerate(shown):
        style = {
            "color": _COLORS[number % len(_COLORS)],
            "linestyle": "-" if number < len(_COLORS) else "--",
        }
        _draw_rates(upper, line, style)
        _draw_latencies(lower, line, style)
    trials = sorted({trial for line in shown for trial in line.rates_MBps})
    upper.set_xticks(trials)
    upper.set_xlim(trials[0] - 0.5, trials[-1] + 0.5)
    upper.set_ylim(0, 1.08 * max(max(line.rates_MBps.values()) for line in shown) or 1)
    upper.set_xlabel("trial")
    upper.set_ylabel("bandwidth, MB/s")
    _label_latencies(lower, sorted({line.latency for line in shown}))
    for axes in (upper, lower):
        axes.grid(True, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    return data.getvalue()


def _subtitle(results: ResultFile) -> str:
    machine = results.machine
    parts = [f"{machine['cpus']} × {machine['cpu']}"] if {"cpu", "cpus"} <= set(machine) else []
    failed = sum(bool(trial.error) for trials in results.jobs.values() for trial in trials)
    parts += [f"{failed} trials have failed"] if failed else []
    parts += ["unstable: see its warnings"] if results.warnings else []
    return ", ".join(parts)


def _draw_rates(axes: Any, line: Line, style: dict[str, str]) -> None:
    axes.plot(
        list(line.rates_MBps),
        list(line.rates_MBps.values()),
        marker="o",
        markersize=4,
        linewidth=1.5,
        label=line.label,
        **style,
    )


def _draw_latencies(axes: Any, line: Line, style: dict[str, str]) -> None:
    # A histogram's first buckets may be of 0 ns, which a logarithm has no place for.
    points = [point for point in line.percentiles if point[0] < 100 and point[1] > 0]
    places = [_nines(percent) for percent, *_ in points]
    if not points:
        return
    axes.plot(places, [median for _, _, median, _ in points], linewidth=1.5, **style)
    axes.fill_between(
        places,
        [low for _, low, _, _ in points],
        [high for _, _, _, high in points],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )


def _nines(percent: float) -> float:
    """Where a percentage stands: each nine more is as wide as the last one."""
    return -math.log10(1 - percent / 100)


def _label_latencies(axes: Any, labels: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{' or '.join(labels)}, ms")
    axes.set_xticks([_nines(percent) for percent in _TICKS], [f"{one:g} %" for one in _TICKS])
    axes.set_xlabel("share of the I/Os that took no longer")


__all__ = ["Line", "add_plot_parser", "draw", "lines_of", "run"]
