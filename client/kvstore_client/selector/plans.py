"""What goes into a decision and what comes out: a request for blocks, and a plan of runs."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple


class Policy(enum.StrEnum):
    """How a request is spread over the paths."""

    DIRECT = "direct"
    """Never by a relay: the baseline."""
    ROUND_ROBIN = "round_robin"
    """Whole requests, direct and by relays in turn."""
    SHORTEST_QUEUE = "shortest_queue"
    """Whole requests, to the side whose storage link has fewer bytes waiting."""
    BALANCED = "balanced"
    """Each request in parts, so that all paths end together."""


class Span(NamedTuple):
    """Consecutive blocks that one daemon owns.

    Attributes:
        first, last: Indices of blocks, `[first, last)`.
        daemon: Index of the daemon, as in `Inflight.daemons`.
    """

    first: int
    last: int
    daemon: int


class Request(NamedTuple):
    """What is to be fetched.

    Attributes:
        spans: All blocks, each once.
        block_bytes: Bytes of a block that are asked for: of some layers, if not of all.
        decode_node: Node id of the request's decode node, the relay that is preferred because
            it needs the bytes itself later; "" if it is not known.
    """

    spans: Sequence[Span]
    block_bytes: int
    decode_node: str = ""


class PlannedRun(NamedTuple):
    """Consecutive blocks on one path.

    Attributes:
        first, last: Indices of blocks, `[first, last)`.
        daemon: Index of the daemon that owns them.
        relay: Node id of the relay; "" for direct.
    """

    first: int
    last: int
    daemon: int
    relay: str = ""


class Plan(NamedTuple):
    """Which blocks go which way, and why.

    The blocks of `runs` and those of `unreachable` together are those of the request, each
    once. Direct runs hold the beginning: what a reader can use is the prefix up to the first
    gap, and the path with fewer parts that can fail is the better one for it.

    Attributes:
        runs: In the order of the blocks.
        unreachable: Blocks for which no path is up; try their next owner, or compute them.
        estimate_s: When the last byte is expected; infinite if nothing can be fetched.
        reason: A sentence for people, with the numbers behind it.
    """

    runs: list[PlannedRun]
    unreachable: list[Span]
    estimate_s: float
    reason: str

    def relayed_blocks(self) -> int:
        """Blocks that go by relays."""
        return sum(run.last - run.first for run in self.runs if run.relay)


def lay_out(
    spans: Sequence[Span], up: Sequence[bool], direct_blocks: int, quotas: Sequence[tuple[str, int]]
) -> tuple[list[PlannedRun], list[Span]]:
    """Cut spans into runs: direct ones first, then each relay's blocks in turn.

    Args:
        up: Whether each daemon can be reached directly.
        direct_blocks: Blocks to go direct, at most those of daemons that are up.
        quotas: How many blocks each relay carries. What exceeds the sum of all is
            unreachable.
    """
    runs: list[PlannedRun] = []
    unreachable: list[Span] = []
    waiting = iter(quotas)
    relay, relay_blocks = next(waiting, ("", 0))
    for first, last, daemon in spans:
        if direct_blocks and up[daemon]:
            stop = min(last, first + direct_blocks)
            runs.append(PlannedRun(first, stop, daemon))
            direct_blocks -= stop - first
            first = stop
        while first < last:
            while relay and not relay_blocks:
                relay, relay_blocks = next(waiting, ("", 0))
            if not relay:
                unreachable.append(Span(first, last, daemon))
                break
            stop = min(last, first + relay_blocks)
            runs.append(PlannedRun(first, stop, daemon, relay))
            relay_blocks -= stop - first
            first = stop
    return runs, unreachable
