"""What was measured, its targets, and a table of it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        values: One a trial, or one a report.
        at_least, at_most: The target, for `value`.
        value: The median, unless something else was meant.
        notes: What there is to say to each value.
    """

    measurement: str
    name: str
    unit: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None
    value: float = field(default=float("nan"))
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.value != self.value:
            object.__setattr__(self, "value", statistics.median(self.values))

    @property
    def target(self) -> str:
        """The target for people."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def plain(self) -> dict[str, object]:
        """All of it, for JSON."""
        return {
            "measurement": self.measurement,
            "name": self.name,
            "unit": self.unit,
            "value": self.value,
            "values": list(self.values),
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": self.met,
            "notes": list(self.notes),
        }


def table(figures: Sequence[Figure]) -> list[str]:
    """All figures for people: a line each, with its target and whether it is met."""
    rows = [("", "", "median", "lowest", "highest", "", "target", "")]
    last = ""
    for figure in figures:
        one = len(figure.values) == 1
        rows.append(
            (
                "" if figure.measurement == last else figure.measurement,
                figure.name,
                _number(figure.value),
                "" if one else _number(min(figure.values)),
                "" if one else _number(max(figure.values)),
                figure.unit,
                figure.target,
                {None: "", True: "met", False: "missed"}[figure.met],
            )
        )
        last = figure.measurement
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 2 <= place <= 4 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


__all__ = ["Figure", "table"]
