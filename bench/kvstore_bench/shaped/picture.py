"""The picture of the two paths: what each NIC carries over time, one panel a policy."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_bench.outputs import write_output
from kvstore_bench.shaped.traffic import Reading, rates

# Colours as in the picture of a replay.
_BLUE, _ORANGE, _DARK, _GREY = "#0072B2", "#D55E00", "#333333", "#BBBBBB"
_TEXT = "#555555"
# Places of the links in a reading: the fields of `Sample`.
_PREFILL, _DECODE, _COMPUTE = range(3)
# In rates of a storage NIC: two of them, and room for the times of fetches.
_TOP = 2.55
# And on the right of the last fetch, for the names of lines.
_RIGHT = 1.14


@dataclass(frozen=True, slots=True)
class Panel:
    """One policy at work.

    Attributes:
        title: What is to be said of it.
        readings: Of the three links.
        fetches: When each began and ended, by the clock of the readings, and a word on it.
    """

    title: str
    readings: Sequence[Reading]
    fetches: Sequence[tuple[float, float, str]]


def draw(panels: Sequence[Panel], title: str, subtitle: str, nic_Bps: float, path: Path) -> None:
    """Draw the panels below each other, over one axis of time.

    The two storage NICs stand on each other: what both bring a second is the height of all.

    Args:
        nic_Bps: The rate of a storage NIC.

    Raises:
        OutputError: The file cannot be written.
    """
    # It takes a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.5), dpi=150, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    figure.text(0.5, 0.958, subtitle, ha="center", va="top", color="#555555")
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, nic_Bps)
    handles, labels = all_axes[0].get_legend_handles_labels()
    # Once for all panels.
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    all_axes[-1].set_xlabel("time, s")
    last = max(panel.readings[-1].at - panel.readings[0].at for panel in panels)
    all_axes[-1].set_xlim(0, last * _RIGHT)
    all_axes[-1].set_ylim(0, nic_Bps / 1e6 * _TOP)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower())
    write_output("--plot", path, data.getvalue())


def _draw_panel(axes: Any, panel: Panel, nic_Bps: float) -> None:
    zero = panel.readings[0].at
    nic = nic_Bps / 1e6
    prefill, decode = (rates(panel.readings, place, zero) for place in (_PREFILL, _DECODE))
    lower = [value / 1e6 for value in prefill.values_Bps]
    upper = [under + value / 1e6 for under, value in zip(lower, decode.values_Bps, strict=True)]
    areas = (
        (lower, 0, _BLUE, "storage NIC of the prefill node"),
        (upper, lower, _ORANGE, "storage NIC of the decode node, on top"),
    )
    for values, base, color, name in areas:
        axes.stairs(
            values, prefill.edges, baseline=base, fill=True, color=color, alpha=0.55, label=name
        )
    # Blocks come over the compute network at its own rate, which is more than a panel holds:
    # over two intervals it is even.
    compute = rates(panel.readings[::2], _COMPUTE, zero)
    axes.stairs(
        [value / 1e6 for value in compute.values_Bps],
        compute.edges,
        color=_DARK,
        linewidth=1.2,
        linestyle=(0, (2, 1)),
        label="compute NIC of the prefill node",
    )
    for count, name in ((1, "one storage NIC"), (2, "both storage NICs")):
        axes.axhline(count * nic, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axes.text(
            0.998,
            count * nic + 0.02 * nic,
            name,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=8,
            color=_TEXT,
        )
    for began_at, ended_at, word in panel.fetches:
        axes.text(
            (began_at + ended_at) / 2 - zero,
            nic * 2.16,
            f"{ended_at - began_at:.2f} s{word and chr(10)}{word}",
            ha="center",
            va="bottom",
            fontsize=9,
            color=_TEXT,
        )
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_ylabel("received, MB/s")
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


__all__ = ["Panel", "draw"]
