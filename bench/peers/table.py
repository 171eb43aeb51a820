"""What was measured, as tables that a person reads and a document takes (Markdown). Pure.

A ratio is taken within a trial and a depth: the two numbers of a ratio are then seconds apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.catalogue import BY_NAME, ENTRIES, LIMIT

GIB = 1024**3
# A limit that is farther than this from its median in some trial measures what else runs.
SPREAD_MAX = 0.1
# Cores that something else had while a peer was measured, from which on that is told.
OTHER_CORES_MAX = 0.2

#: A section as a worker says it.
Section = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One peer in one trial.

    Attributes:
        get, put: What its worker said.
    """

    peer: str
    block_bytes: int
    depth: int
    trial: int
    get: Section
    put: Section

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dict(vars(self))


def gib_per_s(section: Section) -> float:
    """How fast."""
    rate: float = section["bytes"] / section["seconds"] / GIB
    return rate


def cost_s(section: Section, end: str) -> float:
    """Processor seconds a GiB of `client` or `server`."""
    cost: float = section[f"{end}_s"] / (section["bytes"] / GIB)
    return cost


def tables(cells: Sequence[Cell]) -> str:
    """A table for each size of a block, of reads and of writes."""
    parts = []
    for block_bytes in dict.fromkeys(cell.block_bytes for cell in cells):
        of_size = [cell for cell in cells if cell.block_bytes == block_bytes]
        for kind, title in (("get", "Reads"), ("put", "Writes")):
            rows = list(_rows(of_size, kind))
            parts.append(f"{title}, {size_text(block_bytes)} blocks:\n\n{markdown(rows)}")
    return "\n".join(parts)


def summary(cells: Sequence[Cell]) -> str:
    """One table of everything: each peer at the depth at which it was fastest.

    Of `raw`, and processor seconds a GiB of client and server together.
    """
    kinds = [
        (size, kind, f"{word} of {size_text(size)}")
        for size in dict.fromkeys(cell.block_bytes for cell in cells)
        for kind, word in (("get", "reads"), ("put", "writes"))
    ]
    rows: list[Sequence[str]] = [("peer", "by", *(title for _, _, title in kinds))]
    for entry in ENTRIES:
        of_peer = [cell for cell in cells if cell.peer == entry.name]
        if of_peer:
            columns = [
                _best([c for c in cells if c.block_bytes == s], entry.name, k) for s, k, _ in kinds
            ]
            rows.append((f"`{entry.name}`", entry.how, *columns))
    return markdown(rows)


def _best(cells: Sequence[Cell], peer: str, kind: str) -> str:
    """A peer's figures at its best depth; empty if it has none."""
    found = []
    for depth in {cell.depth for cell in cells}:
        own = [cell for cell in cells if (cell.peer, cell.depth) == (peer, depth)]
        if own:
            rate = statistics.median(gib_per_s(getattr(cell, kind)) for cell in own)
            found.append((rate, depth, own))
    if not found:
        return ""
    rate, _, own = max(found, key=lambda one: one[:2])
    cost = statistics.median(
        cost_s(getattr(cell, kind), "client") + cost_s(getattr(cell, kind), "server")
        for cell in own
    )
    ratio = f"{rate:.2f} GiB/s" if peer == LIMIT else _ratio(own, kind, _limits(cells, kind))
    return f"{ratio}, {cost:.2f} s"


def _rows(cells: Sequence[Cell], kind: str) -> Iterable[Sequence[str]]:
    yield (
        "peer",
        "by",
        "under way",
        "GiB/s",
        f"of `{LIMIT}` [min–max]",
        "CPU-s/GiB client + server",
        "batch, ms: p50",
        "p99",
    )
    limits = _limits(cells, kind)
    for entry in ENTRIES:
        for depth in sorted({cell.depth for cell in cells}):
            found = [cell for cell in cells if (cell.peer, cell.depth) == (entry.name, depth)]
            if found:
                yield _row(found, kind, limits)


def _row(
    cells: Sequence[Cell], kind: str, limits: Mapping[tuple[int, int], float]
) -> Sequence[str]:
    """One peer at one depth."""
    sections: list[Section] = [getattr(cell, kind) for cell in cells]

    def median(value: Callable[[Section], float]) -> float:
        return statistics.median(map(value, sections))

    client_s = median(lambda section: cost_s(section, "client"))
    server_s = median(lambda section: cost_s(section, "server"))
    entry = BY_NAME[cells[0].peer]
    return (
        f"`{entry.name}`",
        entry.how,
        str(cells[0].depth),
        f"{median(gib_per_s):.2f}",
        _ratio(cells, kind, limits),
        f"{client_s:.3f} + {server_s:.3f} = {client_s + server_s:.3f}",
        f"{median(lambda section: section['batch_ms']['p50']):.2f}",
        f"{median(lambda section: section['batch_ms']['p99']):.2f}",
    )


def _limits(cells: Sequence[Cell], kind: str) -> dict[tuple[int, int], float]:
    """GiB/s of the limit by depth and trial, of cells of one size."""
    return {
        (cell.depth, cell.trial): gib_per_s(getattr(cell, kind))
        for cell in cells
        if cell.peer == LIMIT
    }


def _ratio(cells: Sequence[Cell], kind: str, limits: Mapping[tuple[int, int], float]) -> str:
    """Median, lowest and highest ratio to the limit; empty without one."""
    ratios = [
        gib_per_s(getattr(cell, kind)) / limits[cell.depth, cell.trial]
        for cell in cells
        if (cell.depth, cell.trial) in limits
    ]
    if not ratios:
        return ""
    return f"**{statistics.median(ratios):.2f}** [{min(ratios):.2f}–{max(ratios):.2f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table; the first is its head. Text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return f"| {' | '.join(cells)} |\n"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|\n"
    return line(rows[0]) + rule + "".join(map(line, rows[1:]))


def warnings(cells: Sequence[Cell]) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    for block_bytes, depth in dict.fromkeys((cell.block_bytes, cell.depth) for cell in cells):
        rates = [
            gib_per_s(cell.get)
            for cell in cells
            if (cell.peer, cell.block_bytes, cell.depth) == (LIMIT, block_bytes, depth)
        ]
        if not rates:
            continue
        median = statistics.median(rates)
        far = max(abs(rate - median) for rate in rates) / median
        if far > SPREAD_MAX:
            found.append(
                f"unstable: {LIMIT} ({size_text(block_bytes)}, depth {depth}) differs by up to"
                f" {100 * far:.0f} % from its median; close other programs"
            )
    for name in dict.fromkeys(cell.peer for cell in cells):
        others = statistics.median(cell.get["other_cores"] for cell in cells if cell.peer == name)
        if others > OTHER_CORES_MAX:
            found.append(f"unstable: something else had {others:.1f} cores while {name} read")
    return found


def size_text(size_bytes: int) -> str:
    """A size in the largest unit that leaves no rest."""
    for unit, factor in (("MiB", 1024**2), ("KiB", 1024)):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} bytes"
