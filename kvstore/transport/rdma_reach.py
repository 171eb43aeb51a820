"""What could not be connected lately, so that it is not tried again and again. Pure."""

from __future__ import annotations

from collections import OrderedDict

# Of a wait for an address that nobody answers for, which stops the loop for a second, one in so
# long; and a session that begins meanwhile goes without the rail.
UNREACHED_S = 30.0
# A peer may name as many addresses as it likes; the oldest are forgotten.
UNREACHED_MAX = 1024


class Unreached:
    """Names that could not be reached by a rail, each for `UNREACHED_S`."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[int, str], float] = OrderedDict()

    def note(self, place: int, name: str, now: float) -> None:
        """A peer, or an address, was not reached by the rail in a place."""
        self._until.pop((place, name), None)
        self._until[place, name] = now + UNREACHED_S
        if len(self._until) > UNREACHED_MAX:
            self._until.popitem(last=False)

    def lately(self, place: int, name: str, now: float) -> bool:
        """Whether that is not long ago."""
        return now < self._until.get((place, name), now)

    def forget(self, name: str) -> None:
        """Try a name again by all rails."""
        for key in [key for key in self._until if key[1] == name]:
            del self._until[key]


__all__ = ["UNREACHED_MAX", "UNREACHED_S", "Unreached"]
