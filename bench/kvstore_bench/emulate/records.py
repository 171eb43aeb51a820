"""When sessions begin, and what is noted of each turn and each link. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvstore_bench.emulate.steps import Decoded, Prefilled
from kvstore_bench.emulate.work import Turn
from kvstore_bench.shaped.traffic import Reading

#: Loads and transfers cost nothing: what remains is computing.
ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When sessions begin.

    Attributes:
        rate: Sessions a second, at random times (a Poisson process); 0: all at once.
        seed: Of these times.
        idle: One begins when the one before has ended, so that each has all for itself.
    """

    rate: float = 0.0
    seed: int = 1
    idle: bool = False

    def times_s(self, count: int) -> list[float]:
        """When each session begins, from the beginning of all."""
        if not self.rate:
            return [0.0] * count
        chance, at, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            at += chance.expovariate(self.rate)
            times.append(at)
        return times


@dataclass(frozen=True, slots=True)
class Record:
    """How one turn went, by the clock of the host.

    Attributes:
        prefill_node, decode_node: Where.
        arrived_at: When it could begin.
        prefilled, decoded: What its engines said.
    """

    turn: Turn
    prefill_node: str
    decode_node: str
    arrived_at: float
    prefilled: Prefilled
    decoded: Decoded


@dataclass(slots=True)
class Played:
    """How all of it went.

    Attributes:
        began_at, ended_at: By the clock of the host.
        records: Of all turns, in the order in which they ended.
        session_s: How long each session took from its arrival.
        links: Names of what `readings` hold: node, network, and "rx" or "tx".
        readings: Bytes by the counters of the kernel, from time to time.
        plans: How many choices of paths took at most so many microseconds, by that bound.
    """

    policy: str
    began_at: float = 0.0
    ended_at: float = 0.0
    records: list[Record] = field(default_factory=list)
    session_s: list[float] = field(default_factory=list)
    links: list[tuple[str, str, str]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    plans: dict[float, int] = field(default_factory=dict)


__all__ = ["ORACLE", "Arrivals", "Played", "Record"]
