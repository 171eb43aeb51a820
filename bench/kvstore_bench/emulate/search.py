"""The highest rate of sessions at which a limit is kept: doubled or halved, then bisected. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Neighbours that are this close are told apart by chance alone.
PRECISION = 1.1
TRIES_MAX = 10


@dataclass(slots=True)
class RateSearch:
    """Says which rate to try next, and what was found.

    Args:
        first: Rate that is tried first, sessions a second.

    Attributes:
        kept: The highest rate that kept to the limit; 0 while none has.
        broken: The lowest that did not; infinite while all have.
        tries: How many were made.
    """

    first: float
    kept: float = 0.0
    broken: float = math.inf
    tries: int = field(default=0)

    @property
    def next(self) -> float | None:
        """The rate to try next; None when it is known well enough, or was tried often enough."""
        if self.tries == TRIES_MAX or self.broken <= self.kept * PRECISION:
            return None
        if not self.tries:
            return self.first
        if self.broken == math.inf:
            return self.kept * 2
        if not self.kept:
            return self.broken / 2
        return math.sqrt(self.kept * self.broken)

    def tried(self, rate: float, kept: bool) -> None:
        """How a rate has fared. Chance may let a higher one keep what a lower one broke: then the
        lower one counts as kept."""
        self.tries += 1
        if kept:
            self.kept = max(self.kept, rate)
            if self.broken <= self.kept:
                self.broken = math.inf
        else:
            self.broken = min(self.broken, rate)
            if self.kept >= self.broken:
                self.kept = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate of one policy.

    Attributes:
        limit_s: That nine of ten turns had their first token within.
        sessions_per_s: The rate; 0 if none that was tried kept to it.
        tries: Rates, and the time that nine of ten kept to.
    """

    policy: str
    limit_s: float
    sessions_per_s: float
    tries: list[tuple[float, float]]


__all__ = ["PRECISION", "TRIES_MAX", "Found", "RateSearch"]
