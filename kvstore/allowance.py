"""So much in a second, for what others can make us do as often as they like. Pure."""

from __future__ import annotations


class Allowance:
    """An amount that grows with time, and of which who asks takes a part.

    Args:
        per_second: How fast it grows.
        most: What it begins with, and what is saved up at most.
    """

    def __init__(self, per_second: float, most: float) -> None:
        self._per_second = per_second
        self._most = most
        self._left = most
        self._grown_at = 0.0

    def take(self, now: float, amount: float) -> bool:
        """Take all of an amount, or nothing when there is less; `now` in seconds."""
        grown = max(0.0, now - self._grown_at) * self._per_second
        self._left = min(self._most, self._left + grown)
        self._grown_at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True
