"""Traces as one stream of requests for blocks that have numbers. Pure.

Requests of all sessions are merged by time: they come when they came, however long a cache
would have taken (open loop). Sessions of coding agents are recorded one by one, and each
begins at 0; the n-th is made to start n times the stagger later. What a file put on one clock
keeps its times: the requests of a Mooncake file, and a session with its sub-agents.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

from xxhash import xxh3_64_intdigest

from kvstore.errors import ConfigError
from kvstore.layout import BLOCK_BYTES_MAX
from kvstore_bench.trace import Session, Trace, block_key

# What a store keeps is whole pages.
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they come.

    Attributes:
        traces: Names of the traces.
        session_count: Sessions that the requests are from.
        requests: Block numbers of each prompt, in the order of its chain.
        sizes: Bytes of each block, by its number.
        digests: 64-bit hash of each block's key.
    """

    traces: tuple[str, ...]
    session_count: int
    requests: tuple[array[int], ...]
    sizes: array[int]
    digests: array[int]

    @cached_property
    def block_count(self) -> int:
        """Blocks in all prompts; one that occurs in ten prompts counts ten times."""
        return sum(map(len, self.requests))

    @cached_property
    def distinct_bytes(self) -> int:
        """Memory that would hold every block."""
        return sum(self.sizes)

    @property
    def distinct_count(self) -> int:
        """Blocks that differ."""
        return len(self.sizes)

    @property
    def hit_rate_max(self) -> float:
        """Share of blocks that a cache which forgets nothing has: all but the first of each."""
        return 1 - self.distinct_count / self.block_count if self.block_count else 0.0


def make_workload(
    traces: Sequence[Trace],
    *,
    bytes_per_token: int,
    stagger_s: float,
    session_limit: int | None = None,
    turn_limit: int | None = None,
) -> Workload:
    """Merge traces into one stream.

    Args:
        bytes_per_token: KV of one token, all layers.
        stagger_s: Time between the starts of sessions that were recorded one by one.
        session_limit: Only the first sessions.
        turn_limit: Only the first requests of each session.

    Raises:
        ConfigError: An option has no sense, or makes blocks that are too large.
    """
    _check(bytes_per_token, stagger_s, session_limit, turn_limit)
    sessions = [(session, trace.block_tokens) for trace in traces for session in trace.sessions]
    sessions = sessions[:session_limit]
    starts: dict[str, float] = {}
    numbers: dict[tuple[str, int, int], int] = {}
    arrivals: list[tuple[float, array[int]]] = []
    for session, block_tokens in sessions:
        start_s = starts.setdefault(_clock(session), len(starts) * stagger_s)
        for request in session.requests[:turn_limit]:
            blocks = array("I")
            for hash_id in request.hash_ids:
                name = (session.scope, block_tokens, hash_id)
                blocks.append(numbers.setdefault(name, len(numbers)))
            arrivals.append((start_s + request.at_s, blocks))
    # Stable: what comes at the same time stays in the order of the files.
    arrivals.sort(key=itemgetter(0))
    sizes, digests = array("Q"), array("Q")
    for scope, block_tokens, hash_id in numbers:
        sizes.append(-(-block_tokens * bytes_per_token // PAGE_BYTES) * PAGE_BYTES)
        digests.append(xxh3_64_intdigest(block_key(scope, hash_id), block_tokens))
    if max(sizes, default=0) > BLOCK_BYTES_MAX:
        raise ConfigError(
            "--bytes-per-token",
            bytes_per_token,
            f"makes blocks of {max(sizes)} bytes, the limit is {BLOCK_BYTES_MAX}",
        )
    return Workload(
        traces=tuple(trace.name for trace in traces),
        session_count=len(sessions),
        requests=tuple(blocks for _, blocks in arrivals),
        sizes=sizes,
        digests=digests,
    )


def next_uses(requests: Sequence[array[int]], block_count: int) -> list[array[int]]:
    """For each block of each request, the number of the next request that names it.

    Args:
        block_count: Block numbers are below this.

    Returns:
        `len(requests)` where no request does.
    """
    coming = array("I", [len(requests)]) * block_count
    uses: list[array[int]] = []
    for number in reversed(range(len(requests))):
        uses.append(array("I", [coming[block] for block in requests[number]]))
        for block in requests[number]:
            coming[block] = number
    uses.reverse()
    return uses


def _clock(session: Session) -> str:
    """Names what the times of a session count from: its file, or the session that began it."""
    return session.name.partition("/")[0]


def _check(
    bytes_per_token: int, stagger_s: float, session_limit: int | None, turn_limit: int | None
) -> None:
    for option, value in (
        ("--bytes-per-token", bytes_per_token),
        ("--sessions", session_limit),
        ("--turns", turn_limit),
    ):
        if value is not None and value < 1:
            raise ConfigError(option, value, "must be at least 1")
    if not 0 <= stagger_s < float("inf"):
        raise ConfigError("--stagger", stagger_s, "must be 0 or more seconds")


__all__ = ["PAGE_BYTES", "Workload", "make_workload", "next_uses"]
