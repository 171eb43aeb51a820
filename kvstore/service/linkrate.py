"""Rates of links as operators write them: 400Mbit/s, 50MB/s. Pure.

Networks are sold in bits, and their prefixes are decimal, as in tc(8): 400Mbit is 50,000,000
bytes a second. Rates in bytes have the prefixes of sizes (k = 1024, see `kvstore.units`), as
fio's do. A bare number is bits to tc and bytes to fio, "Mbps" megabytes to tc and megabits to most
people, and "Mb" either: these are refused, since nobody would notice a rate that is eight times
off.
"""

from __future__ import annotations

import re

from kvstore.errors import ConfigError
from kvstore.units import SIZE_BYTES_MAX, format_size_bytes

_PREFIXES = "kmgtp"
_RATE = re.compile(
    r"(?P<whole>[0-9]{1,20})(?:\.(?P<fraction>[0-9]{1,20}))? ?"
    r"(?P<prefix>[kmgtpKMGTP]?)(?P<binary>[iI]?)(?P<unit>B|[bB][iI][tT])(?:/s)?",
    re.ASCII,
)
_SHAPE = (
    "a rate is 0, or a number and bit/s (k = 1000) or B/s (k = 1024), as in 400Mbit/s, 25gbit or"
    " 50MB/s"
)


def parse_rate_Bps(text: str, option: str) -> int:
    """Read a rate, in bytes a second.

    Args:
        text: The rate; a fraction of a byte a second is cut off.
        option: Name of the option it came from, for the error.

    Raises:
        ConfigError: Names the option, the text and what is allowed.
    """
    stripped = text.strip()
    if stripped == "0":
        return 0
    match = _RATE.fullmatch(stripped)
    if match is None or (match["binary"] and not match["prefix"]):
        raise ConfigError(option, text, _SHAPE)
    in_bytes = match["unit"] == "B"
    thousand = 1024 if in_bytes or match["binary"] else 1000
    power = _PREFIXES.index(match["prefix"].lower()) + 1 if match["prefix"] else 0
    fraction = match["fraction"] or ""
    unit: int = thousand**power
    number = int(match["whole"] + fraction) * unit
    rate_Bps = int(number // 10 ** len(fraction)) // (1 if in_bytes else 8)
    if rate_Bps > SIZE_BYTES_MAX:
        raise ConfigError(option, text, f"at most {format_size_bytes(SIZE_BYTES_MAX)}/s")
    return rate_Bps
