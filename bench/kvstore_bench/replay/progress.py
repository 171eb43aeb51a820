"""How far a replay is: a line that moves on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from kvstore.units import format_size_bytes
from kvstore_bench.replay.player import Played

if TYPE_CHECKING:
    from rich.progress import Progress as MovingLine, TaskID

PLAIN_LINES = 10


class Progress:
    """Shows the progress of `total` requests, for `with`.

    Args:
        total: Requests to come.
        output: Where to show it; the moving line needs a terminal, and the package rich.
    """

    def __init__(self, total: int, output: TextIO | None = None) -> None:
        self._total = total
        self._output = sys.stderr if output is None else output
        self._count = self._blocks = self._used = self._read_bytes = self._wrong = 0
        self._rich: MovingLine | None = None
        self._task: TaskID

    def __enter__(self) -> Progress:
        if self._output.isatty():
            self._rich = _moving_line(self._output)
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task("replaying", total=self._total, state="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def add(self, played: Played) -> None:
        """One more request has ended."""
        self._count += 1
        self._blocks += played.blocks
        self._used += played.used
        self._read_bytes += played.read_bytes
        self._wrong += played.wrong
        if self._rich is not None:
            self._rich.update(self._task, advance=1, state=self._state())
        elif self._count * PLAIN_LINES // self._total != (self._count - 1) * PLAIN_LINES // (
            self._total
        ):
            print(
                f"  {self._count / self._total:4.0%}  {self._count:,} of {self._total:,} requests,"
                f" {self._state()}",
                file=self._output,
                flush=True,
            )

    def _state(self) -> str:
        rate = self._used / self._blocks if self._blocks else 0.0
        wrong = f", {self._wrong:,} WRONG BLOCKS" if self._wrong else ""
        return f"hit rate {rate:.1%}, {format_size_bytes(self._read_bytes)} read{wrong}"


def _moving_line(output: TextIO) -> MovingLine | None:
    """A progress bar of rich, or None where it is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress as MovingLine,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    return MovingLine(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(file=output),
    )


__all__ = ["Progress"]
