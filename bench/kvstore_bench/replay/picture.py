"""The picture of a replay: hit rate and fetch latency over the turns of a session."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.units import format_size_bytes
from kvstore_bench.outputs import check_output, write_output
from kvstore_bench.replay.report import Report, Turn

# More points than this cannot be told apart in a panel of this width.
POINTS_MAX = 80
# Where less than this share of the sessions is left, a line jumps with each of them.
SPARSE_SHARE = 0.1
SUFFIXES = (".png", ".svg", ".pdf")
# Colours that stay apart for the colour-blind, from: M. Okabe, K. Ito, "Color Universal
# Design", 2008.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"


def check_picture(path: Path) -> None:
    """Refuse now what could not be drawn, or written, after the replay.

    Raises:
        ConfigError: Says what is missing or allowed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("--plot", path, f"must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", path, "needs matplotlib: pip install 'dualpath-kvstore[bench]'")
    check_output("--plot", path)


def draw(report: Report, curve: Sequence[Turn], path: Path) -> None:
    """Draw two panels over the turns: hit rate, and latency of fetches.

    Args:
        curve: The turns, or groups of them where there are many.

    Raises:
        OutputError: The file cannot be written.
    """
    # It takes a second to import, and most commands draw nothing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{_title(report)}\n", fontsize=12, fontweight="bold")
    figure.text(0.5, 0.958, _subtitle(report), ha="center", va="top", color="#555555")
    _draw_hit_rate(upper, curve)
    _draw_latency(lower, curve)
    for axes in (upper, lower):
        axes.grid(True, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the panel, where no data can be.
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    width = max(turn.count for turn in curve)
    together = f" ({width} turns a point)" if width > 1 else ""
    lower.set_xlabel(f"turn of the session{together}")
    lower.set_xlim(1, max(2, len(report.turns)))
    lower.set_xticks([1, *(tick for tick in lower.get_xticks() if 1 < tick <= len(report.turns))])
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower())
    write_output("--plot", path, data.getvalue())


def _title(report: Report) -> str:
    sessions = "1 session" if report.sessions == 1 else f"{report.sessions:,} sessions"
    wrong = report.wrong_blocks
    checked = "not checked" if wrong is None else f"{wrong:,} wrong blocks"
    return (
        f"{sessions}, {report.requests:,} requests: {report.hit_rate_blocks:.1%} of blocks"
        f" from the store, {checked}"
    )


def _subtitle(report: Report) -> str:
    sizes = " and ".join(map(format_size_bytes, report.block_bytes))
    read = format_size_bytes(report.read_bytes)
    return (
        f"blocks of {sizes} ({report.bytes_per_token} bytes a token), {read} read,"
        f" {report.concurrency} sessions side by side, no think times"
    )


def _draw_hit_rate(axes: Any, curve: Sequence[Turn]) -> None:
    sessions = curve[0].requests / curve[0].count
    axes.stairs(
        [100 * turn.requests / turn.count / sessions for turn in curve],
        [*(turn.turn - 0.5 for turn in curve), curve[-1].turn + curve[-1].count - 0.5],
        fill=True,
        color=_GREY,
        alpha=0.35,
        label="sessions that get this far, %",
    )
    _draw_line(
        axes,
        curve,
        [100 * turn.hit_rate for turn in curve],
        sparse_from(curve),
        color=_BLUE,
        label="blocks used from the store, %",
    )
    axes.set_ylim(0, 103)
    axes.set_ylabel("hit rate, %")


def _draw_latency(axes: Any, curve: Sequence[Turn]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    fetched = [turn for turn in curve if turn.fetch.count]
    if not fetched:
        axes.text(0.5, 0.5, "nothing was fetched", ha="center", transform=axes.transAxes)
        return
    places = [_middle(turn) for turn in fetched]
    median = [turn.fetch.p50_s * 1e3 for turn in fetched]
    # The points before the sparse ones, without those at which nothing was fetched.
    sparse = sum(turn.fetch.count > 0 for turn in curve[: sparse_from(curve)])
    axes.fill_between(
        places,
        median,
        [turn.fetch.p90_s * 1e3 for turn in fetched],
        color=_ORANGE,
        alpha=0.25,
        linewidth=0,
        label="up to the 90th percentile",
    )
    axes.plot(
        places,
        [turn.fetch.max_s * 1e3 for turn in fetched],
        color=_GREY,
        linewidth=0,
        marker=".",
        markersize=4,
        label="slowest",
    )
    _draw_line(
        axes,
        fetched,
        median,
        sparse,
        color=_ORANGE,
        label="median time to fetch all hits of a prompt",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("fetch latency, ms")


def _middle(turn: Turn) -> float:
    return turn.turn + (turn.count - 1) / 2


def sparse_from(curve: Sequence[Turn]) -> int:
    """Index of the first point that so few sessions reach that it says little; or the end."""
    sessions = curve[0].requests / curve[0].count
    for index, turn in enumerate(curve):
        if turn.requests / turn.count < SPARSE_SHARE * sessions:
            return index
    return len(curve)


def _draw_line(
    axes: Any, curve: Sequence[Turn], values: Sequence[float], sparse: int, **style: Any
) -> None:
    """A line that is thin and faded from point `sparse` on."""
    places = [_middle(turn) for turn in curve]
    # Few points are marked; many are a line.
    marker = "o" if len(curve) <= 40 else ""
    axes.plot(
        places[:sparse], values[:sparse], linewidth=1.8, marker=marker, markersize=3.5, **style
    )
    # From the last full point, so that there is no gap.
    first = max(0, sparse - 1)
    if sparse < len(curve):
        style["label"] = "_"  # not in the legend
        axes.plot(places[first:], values[first:], linewidth=0.8, alpha=0.4, zorder=1.5, **style)


__all__ = ["POINTS_MAX", "SUFFIXES", "check_picture", "draw", "sparse_from"]
