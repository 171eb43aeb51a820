"""Text in columns, and figures as an operator reads them. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

from kvstore.units import format_size_bytes

COLUMN_GAP = "  "
# No node id is longer; what a peer sends beyond that shall not fill the screen.
CELL_COLUMNS_MAX = 256
_WIDE = frozenset("WF")


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would not print.

    Peers choose some of the words, such as their node id; nobody else shall draw on the screen.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in _WIDE else 1 for c in text)


def clip(text: str, columns: int) -> str:
    """The beginning of `text` that fits."""
    if width(text) <= columns:
        return text
    taken, used = [], 0
    for character in text:
        used += width(character)
        if used > columns:
            break
        taken.append(character)
    return "".join(taken)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> list[str]:
    """Lines of a table. Columns are as wide as their widest cell.

    Args:
        right: Names of columns that stand at the right, as figures do.
    """
    lines = [[clip(printable(cell), CELL_COLUMNS_MAX) for cell in row] for row in (header, *rows)]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    flush_right = [name in right for name in header]
    return [
        COLUMN_GAP.join(
            _pad(cell, columns, at_right)
            for cell, columns, at_right in zip(line, widths, flush_right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _pad(text: str, columns: int, at_right: bool) -> str:
    spaces = " " * (columns - width(text))
    return spaces + text if at_right else text + spaces


def bar(share: float, columns: int) -> str:
    """A share of a whole as a bar: [####......]."""
    filled = round(min(1.0, max(0.0, share)) * columns)
    return f"[{'#' * filled}{'.' * (columns - filled)}]"


def format_rate(rate_Bps: int) -> str:
    """Bytes a second."""
    return f"{format_size_bytes(rate_Bps)}/s"


def format_share(part: int, whole: int) -> str:
    """A part in percent; a dash where there is no whole."""
    return f"{100 * part / whole:.0f}%" if whole else "-"


def format_duration(seconds: float) -> str:
    """A time in its two largest units: 3d 4h, 12m 05s, 0.4s."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def format_age(seconds: float) -> str:
    """How old a report is."""
    return f"{1e3 * seconds:.0f}ms" if seconds < 1 else format_duration(seconds)
