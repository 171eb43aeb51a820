"""Sizes as operators write and read them: 4096, 64k, 512MiB, 1.5G. Pure.

Prefixes are binary whether or not an "i" follows, as in fio's job files: k = 1024. Memory and
blocks come in powers of two, and a unit that means two things is worse than a strict one.
"""

from __future__ import annotations

import re

from kvstore.errors import ConfigError

# What the protocol's counts may hold; far above any memory or disk.
SIZE_BYTES_MAX = 1 << 62

_PREFIXES = "kmgtp"
_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))? ?([kmgtp]?)(i?)(b?)", re.ASCII)
_SHAPE = "a size is a number and perhaps a unit, as in 4096, 64k, 512MiB or 1.5G (k = 1024)"


def parse_size_bytes(text: str, option: str) -> int:
    """Read a size; upper and lower case are the same.

    Args:
        text: The size; a fraction of a byte is cut off.
        option: Name of the option it came from, for the error.

    Raises:
        ConfigError: Names the option, the text and what is allowed.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(option, text, _SHAPE)
    whole, fraction, prefix, binary, _ = match.groups()
    if not prefix and (binary or fraction):
        raise ConfigError(option, text, _SHAPE)
    unit = 1024 ** (_PREFIXES.index(prefix) + 1) if prefix else 1
    size = int(whole) * unit
    if fraction:
        size += int(fraction) * unit // 10 ** len(fraction)
    if size > SIZE_BYTES_MAX:
        raise ConfigError(option, text, f"at most {format_size_bytes(SIZE_BYTES_MAX)}")
    return size


def format_size_bytes(size_bytes: int) -> str:
    """A size in the largest unit that it fills, to three digits: 512B, 1.5GiB.

    Sizes of up to three digits in their unit come out whole, and `parse_size_bytes` reads
    everything that this writes.
    """
    unit, name = 1, "B"
    for prefix in _PREFIXES:
        if size_bytes < unit * 1024:
            break
        unit, name = unit * 1024, f"{prefix.upper()}iB"
    if size_bytes % unit == 0:
        return f"{size_bytes // unit}{name}"
    value = size_bytes / unit
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") + name if digits else f"{value:.0f}{name}"
