"""Columns, bars and figures of `kvctl`."""

from __future__ import annotations

import pytest

from kvstore_client.ctl.tables import (
    CELL_COLUMNS_MAX,
    bar,
    clip,
    format_age,
    format_duration,
    format_share,
    printable,
    table,
    width,
)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    lines = table(["NAME", "N"], [["a", "1000"], ["longer", "5"]], right=("N",))
    assert lines == ["NAME       N", "a       1000", "longer     5"]


def test_columns_with_the_same_name_stand_apart() -> None:
    assert table(["N", "N"], [["1", "22"]], right=("N",)) == ["N   N", "1  22"]


def test_characters_of_two_columns_count_twice() -> None:
    lines = table(["A", "B"], [["節点", "x"], ["n", "y"]])
    assert width("節点") == 4
    assert lines == ["A     B", "節点  x", "n     y"]


def test_what_a_peer_calls_itself_cannot_draw_on_the_screen() -> None:
    (_, line) = table(["A"], [["\x1b[2Jnode\n\x07"]])
    assert line == "\\x1b[2Jnode\\n\\x07"
    assert printable("vm:7450 é") == "vm:7450 é"


def test_a_cell_has_an_end() -> None:
    (_, line) = table(["A"], [["x" * 100_000]])
    assert line == "x" * CELL_COLUMNS_MAX


@pytest.mark.parametrize(
    ("columns", "text"), [(0, ""), (1, "a"), (2, "a"), (3, "a節"), (4, "a節b"), (9, "a節b")]
)
def test_clip_never_cuts_a_character_in_two(columns: int, text: str) -> None:
    assert clip("a節b", columns) == text


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "[....]"), (0.5, "[##..]"), (1.0, "[####]"), (7.0, "[####]"), (-1.0, "[....]")],
)
def test_a_bar_never_leaves_its_frame(share: float, shown: str) -> None:
    assert bar(share, 4) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (59.94, "59.9s"),
        (60.0, "1m 00s"),
        (3599.0, "59m 59s"),
        (3600.0, "1h 00m"),
        (86_399.0, "23h 59m"),
        (86_400.0, "1d 00h"),
        (10_000_000.0, "115d 17h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_ages_below_a_second_are_in_milliseconds() -> None:
    assert [format_age(0.0), format_age(0.4), format_age(1.5)] == ["0ms", "400ms", "1.5s"]


def test_a_share_of_nothing_is_unknown() -> None:
    assert [format_share(1, 2), format_share(0, 0)] == ["50%", "-"]
