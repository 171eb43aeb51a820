"""The picture of an emulation: how long each policy took, and what storage NICs carried."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore_bench.emulate.records import Played
from kvstore_bench.emulate.results import Result
from kvstore_bench.emulate.shape import Shape
from kvstore_bench.outputs import write_output
from kvstore_bench.shaped.network import STORAGE
from kvstore_bench.shaped.traffic import Reading, rates

# Shades of two colours: prefill nodes below, decode nodes on top, as in the pictures of fetches.
_BLUES = ("#0072B2", "#56A5D6", "#003F63", "#8FC7EA")
_ORANGES = ("#D55E00", "#F0904A", "#8A3D00", "#F7BC93")
_TEXT = "#555555"
# A picture has room for so many intervals.
_INTERVALS_MAX = 150


def draw(runs: Sequence[tuple[Played, Result]], shape: Shape, title: str, path: Path) -> None:
    """Draw completion times above, and below for each policy what storage NICs received.

    Raises:
        OutputError: The file cannot be written.
    """
    # It takes a second to import.
    from matplotlib.figure import Figure

    timed = [(played, result) for played, result in runs if played.links]
    figure = Figure(figsize=(9.0, 2.4 + 1.9 * len(timed)), dpi=150, layout="constrained")
    heights = [0.35 * len(runs) + 0.5, *[1.5] * len(timed)]
    every = figure.subplots(
        len(timed) + 1, 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    figure.suptitle(title, fontsize=10, fontweight="bold")
    _draw_times(every[0], runs)
    last_s = max((played.ended_at - played.began_at for played, _ in timed), default=1.0)
    limit_MBps = shape.storage_Bps("prefill", "decode") / 1e6
    for axes, (played, result) in zip(every[1:], timed, strict=True):
        _draw_links(axes, played, result, limit_MBps)
        axes.set_xlim(0, last_s * 1.02)
    if timed:
        every[-1].set_xlabel("time, s")
        handles, labels = every[1].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower())
    write_output("--plot", path, data.getvalue())


def _draw_times(axes: Any, runs: Sequence[tuple[Played, Result]]) -> None:
    names = [result.policy for _, result in runs]
    times = [result.jct_s for _, result in runs]
    places = range(len(runs) - 1, -1, -1)
    bars = axes.barh(
        places, times, color=["#BBBBBB" if not p.links else "#0072B2" for p, _ in runs]
    )
    axes.set_yticks(places, names)
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=9, color=_TEXT)
    axes.set_title("completion time of all sessions", loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_links(axes: Any, played: Played, result: Result, limit_MBps: float) -> None:
    step = max(1, len(played.readings) // _INTERVALS_MAX)
    readings = _thinned(played.readings, step)
    base: list[float] = []
    counts = {"prefill": 0, "decode": 0}
    for place, (node, network, way) in enumerate(played.links):
        kind = next((kind for kind in counts if node.startswith(kind)), "")
        if network != STORAGE or way != "rx" or not kind:
            continue
        shades = _BLUES if kind == "prefill" else _ORANGES
        color = shades[counts[kind] % len(shades)]
        counts[kind] += 1
        found = rates(readings, place, played.began_at)
        lower = base or [0.0] * len(found.values_Bps)
        base = [under + value / 1e6 for under, value in zip(lower, found.values_Bps, strict=True)]
        axes.stairs(
            base, found.edges, baseline=lower, fill=True, color=color, alpha=0.65,
            label=f"storage NIC of {node}",
        )  # fmt: skip
    if limit_MBps:
        axes.axhline(limit_MBps, color="#BBBBBB", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, limit_MBps * 1.15)
    loaded = f", {result.load_Bps / 1e6:.0f} MB/s while loaded" if result.loaded_s else ""
    axes.set_title(f"{result.policy}: {result.jct_s:.1f} s{loaded}", loc="left", fontsize=10)
    axes.set_ylabel("received, MB/s", fontsize=9)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _thinned(readings: Sequence[Reading], step: int) -> list[Reading]:
    kept = list(readings[::step])
    if kept[-1] is not readings[-1]:
        kept.append(readings[-1])
    return kept


__all__ = ["draw"]
