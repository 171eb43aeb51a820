"""Sizes: what is read, what is refused and with which words, and the way back to text."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import ConfigError
from kvstore.units import SIZE_BYTES_MAX, format_size_bytes, parse_size_bytes

KIB, MIB, GIB, TIB, PIB = (1024**power for power in range(1, 6))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("512B", 512),
        ("4k", 4 * KIB),
        ("4K", 4 * KIB),
        ("4kb", 4 * KIB),
        ("4KiB", 4 * KIB),
        ("4ki", 4 * KIB),
        ("64MiB", 64 * MIB),
        ("512M", 512 * MIB),
        ("1GiB", GIB),
        ("1gb", GIB),
        ("2T", 2 * TIB),
        ("3p", 3 * PIB),
        ("1.5G", GIB + 512 * MIB),
        ("0.25k", 256),
        ("1.0001k", 1024),
        ("1 GiB", GIB),
        (" 64k\n", 64 * KIB),
        ("4096P", SIZE_BYTES_MAX),
    ],
)
def test_reads(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text, "--memory") == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "k", "GiB", "-1", "+1", "1e9", "1.5", "0.5B", "1.G", ".5G", "1,5G", "1_000"),
        *("1x", "1i", "1ib", "1kk", "1GiBs", "1  G", "1 G B", "٣", "1k;", "0x10", "1" * 21),
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size_bytes(text, "--memory")
    assert caught.value.option == "--memory"
    assert caught.value.value == text
    assert "as in 4096, 64k, 512MiB or 1.5G" in caught.value.remedy


@pytest.mark.parametrize("text", ["4611686018427387905", "4097P", "99999999999999999999p"])
def test_refuses_more_than_the_largest(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size_bytes(text, "bs")
    assert str(caught.value) == f"bs={text}: at most 4096PiB"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (4096, "4KiB"),
        (10 * MIB + 1, "10MiB"),
        (MIB - 1, "1024KiB"),
        (GIB, "1GiB"),
        (GIB + GIB // 4, "1.25GiB"),
        (12 * GIB + GIB // 2, "12.5GiB"),
        (700 * GIB + GIB // 2, "700GiB"),
        (1000 * TIB, "1000TiB"),
        (5000 * PIB, "5000PiB"),
    ],
)
def test_writes(size_bytes: int, text: str) -> None:
    assert format_size_bytes(size_bytes) == text


@given(st.integers(0, SIZE_BYTES_MAX // 2))
def test_what_is_written_is_read_again(size_bytes: int) -> None:
    again = parse_size_bytes(format_size_bytes(size_bytes), "size")
    assert abs(again - size_bytes) <= size_bytes * 0.006


@given(st.integers(0, 999), st.integers(0, 5))
def test_whole_units_come_back_exactly(count: int, power: int) -> None:
    size_bytes = count * 1024**power
    assert parse_size_bytes(format_size_bytes(size_bytes), "size") == size_bytes


@given(st.text(max_size=12))
def test_other_text_is_refused_and_nothing_else_happens(text: str) -> None:
    try:
        size_bytes = parse_size_bytes(text, "size")
    except ConfigError:
        return
    assert 0 <= size_bytes <= SIZE_BYTES_MAX
