"""Rates of links: what is read, and what is refused because it means two things."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import ConfigError
from kvstore.service.linkrate import parse_rate_Bps
from kvstore.units import SIZE_BYTES_MAX


@pytest.mark.parametrize(
    ("text", "rate_Bps"),
    [
        ("0", 0),
        ("8bit/s", 1),
        ("7bit", 0),
        ("400Mbit/s", 50_000_000),
        ("400mbit", 50_000_000),
        ("400 MBit", 50_000_000),
        ("25Gbit/s", 3_125_000_000),
        ("2.5gbit", 312_500_000),
        ("1.0001kbit", 125),
        ("8kibit", 1024),
        ("8Mibit/s", 1024**2),
        ("1tbit", 125_000_000_000),
        ("1Pbit", 125_000_000_000_000),
        ("4096B/s", 4096),
        ("50MB/s", 50 * 1024**2),
        ("50MiB/s", 50 * 1024**2),
        ("50mB", 50 * 1024**2),
        ("1.5GB/s", 3 * 512 * 1024**2),
        (" 1kB/s\n", 1024),
        ("4096PB", SIZE_BYTES_MAX),
    ],
)
def test_reads(text: str, rate_Bps: int) -> None:
    assert parse_rate_Bps(text, "--link-rate") == rate_Bps


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "B", "bit/s", "-1bit", "+1bit", "1e9bit", "1.bit", ".5Mbit", "1,5Mbit"),
        # Bits to one program and bytes to another.
        *("1", "100", "50M", "50M/s", "400Mb/s", "400mb", "400Mbps", "400mbps", "1bps"),
        *("1ibit", "1iB", "1kkbit", "1xbit", "1  Mbit", "1Mbit/h", "1Mbit/s/s", "٣bit", "50%"),
        "1" * 21 + "bit",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rate_Bps(text, "--link-rate")
    assert caught.value.option == "--link-rate"
    assert caught.value.value == text
    assert "as in 400Mbit/s, 25gbit or 50MB/s" in caught.value.remedy


def test_refuses_more_than_the_largest() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rate_Bps("4097PB/s", "--link-rate")
    assert str(caught.value) == "--link-rate=4097PB/s: at most 4096PiB/s"


@given(st.text(max_size=12))
def test_other_text_is_refused_and_nothing_else_happens(text: str) -> None:
    try:
        rate_Bps = parse_rate_Bps(text, "rate")
    except ConfigError:
        return
    assert 0 <= rate_Bps <= SIZE_BYTES_MAX
