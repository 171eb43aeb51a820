"""Tables of bench/peers: ratios within a trial, medians, and doubts."""

from __future__ import annotations

from typing import Any

from peers.table import GIB, Cell, markdown, size_text, summary, tables, warnings

MIB = 1024**2


def section(rate: float, client_s: float = 0.1, other_cores: float = 0.0) -> dict[str, Any]:
    """One that moved a GiB at so many GiB/s."""
    return {
        "bytes": GIB,
        "seconds": 1 / rate,
        "client_s": client_s,
        "server_s": 0.2,
        "other_cores": other_cores,
        "batch_ms": {"p50": 3.0, "p99": 4.5},
    }


def cell(
    peer: str, trial: int, rate: float, put: float = 1.0, depth: int = 1, **words: float
) -> Cell:
    return Cell(peer, MIB, depth, trial, section(rate, **words), section(put))


def row(cells: list[Cell], name: str, kind: str = "Reads") -> list[str]:
    """The columns of a peer's row."""
    text = tables(cells)
    (table,) = [part for part in text.split("\n\n") if part.startswith("| peer")][
        0 if kind == "Reads" else 1 :
    ][:1]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
    return [column.strip() for column in line.strip("|").split("|")]


def test_ratios_are_taken_within_a_trial_and_of_those_the_median() -> None:
    # The machine is half as fast in trial 2; the ratio of medians would be 3/4 = 0.75.
    cells = [cell("raw", 1, 4), cell("raw", 2, 2), cell("raw", 3, 4)]
    cells += [cell("redis", 1, 2), cell("redis", 2, 1.8), cell("redis", 3, 3.2)]
    assert row(cells, "redis")[3:5] == ["2.00", "**0.80** [0.50–0.90]"]


def test_a_ratio_is_to_the_limit_at_the_same_depth() -> None:
    cells = [cell("raw", 1, 4), cell("raw", 1, 2, depth=2), cell("redis", 1, 1, depth=2)]
    assert row(cells, "redis")[4] == "**0.50** [0.50–0.50]"


def test_without_the_limit_there_is_no_ratio() -> None:
    assert row([cell("redis", 1, 2)], "redis")[3:5] == ["2.00", ""]


def test_writes_have_a_table_and_a_limit_of_their_own() -> None:
    cells = [cell("raw", 1, 4, put=2), cell("redis", 1, 1, put=1)]
    assert row(cells, "redis", "Writes")[4] == "**0.50** [0.50–0.50]"


def test_processor_time_is_by_bytes() -> None:
    assert row([cell("redis", 1, 2, client_s=0.25)], "redis")[5] == "0.250 + 0.200 = 0.450"


def test_sizes_and_depths_have_rows_of_their_own() -> None:
    cells = [cell("raw", 1, 1), cell("raw", 1, 1, depth=2)]
    cells.append(Cell("raw", 64 * 1024, 1, 1, section(1), section(1)))
    text = tables(cells)
    assert [line for line in text.splitlines() if line.endswith("blocks:")] == [
        "Reads, 1 MiB blocks:",
        "Writes, 1 MiB blocks:",
        "Reads, 64 KiB blocks:",
        "Writes, 64 KiB blocks:",
    ]
    assert text.count("`raw` ") == 2 * 3 + 4


def test_the_summary_has_each_peer_at_the_depth_at_which_it_was_fastest() -> None:
    cells = [cell("raw", 1, 4), cell("raw", 1, 2, depth=2)]
    # Twice the limit at depth 2, and yet slower than at depth 1.
    cells += [cell("redis", 1, 5, client_s=0.25), cell("redis", 1, 4, depth=2)]
    lines = summary(cells).splitlines()
    columns = [[column.strip() for column in line.strip("|").split("|")] for line in lines]
    assert columns[0][2:] == ["reads of 1 MiB", "writes of 1 MiB"]
    assert columns[2][0::2] == ["`raw`", "4.00 GiB/s, 0.30 s"]
    assert columns[3][0::2] == ["`redis`", "**1.25** [1.25–1.25], 0.45 s"]
    assert len(lines) == 4


def test_a_size_that_a_peer_was_not_measured_at_stays_empty() -> None:
    cells = [cell("raw", 1, 4), cell("redis", 1, 5)]
    cells.append(Cell("raw", 64 * 1024, 1, 1, section(1), section(1)))
    assert summary(cells).splitlines()[3].rstrip("| ").endswith("0.30 s")
    assert summary([]) == markdown([("peer", "by")])


def test_an_unsteady_limit_is_told() -> None:
    steady = [cell("raw", trial, rate) for trial, rate in enumerate((3.8, 4, 4.2))]
    assert warnings(steady) == []
    (warning,) = warnings([*steady, cell("raw", 4, 3.0)])
    assert "raw (1 MiB, depth 1)" in warning
    assert "23 %" in warning


def test_programs_beside_are_told() -> None:
    (warning,) = warnings([cell("redis", 1, 1, other_cores=0.7)])
    assert "0.7 cores while redis" in warning
    assert warnings([cell("redis", 1, 1, other_cores=0.1)]) == []


def test_columns_line_up() -> None:
    lines = markdown([("a", "head"), ("longer", "x")]).splitlines()
    assert lines == ["| a      | head |", "|--------|------|", "| longer | x    |"]


def test_sizes_are_whole() -> None:
    assert [size_text(n) for n in (MIB, 64 * 1024, 1536 * 1024, 100)] == [
        "1 MiB",
        "64 KiB",
        "1536 KiB",
        "100 bytes",
    ]
