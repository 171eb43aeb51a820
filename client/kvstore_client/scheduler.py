"""The engine scheduler of DualPath as pure functions: for a router, without the rest.

Rules of "DualPath: Breaking the Storage Bandwidth Bottleneck in Agentic LLM Inference",
arXiv 2602.21548: which prefill engine, which decode engine, from which side to read, and how
much of the queue a prefill engine takes into one forward batch. Loads are counted in tokens,
as there. Where the paper leaves a tie open, the engine with the fewer unfinished requests
wins, then the one that is listed first.

The caller's values are never changed: each function says what it chose, and the next call
brings loads that include it.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# Constants of the paper.
STORAGE_HORIZON_S = 3.0
"""A node's read queue is short if its storage link works it off within this time."""
COMPUTE_HORIZON_S = 5.0
"""An engine is overloaded if its unfinished tokens take longer than this."""
BALANCE_SLACK = 1.05
"""How far above the average of its group a decode engine may be filled."""
QUOTA_S = 0.3
"""Predicted attention time of one forward batch."""


def alpha_tokens(storage_Bps: float, bytes_per_token: float) -> float:
    """Tokens in a node's read queue up to which it is short."""
    return STORAGE_HORIZON_S * storage_Bps / bytes_per_token


def beta_tokens(tokens_per_s: float) -> float:
    """Unfinished tokens of an engine up to which it is not overloaded."""
    return COMPUTE_HORIZON_S * tokens_per_s


# --- prefill -------------------------------------------------------------------------------


class PrefillEngine(NamedTuple):
    """A prefill engine as its group's leader reports it.

    Attributes:
        node: Names the node whose storage link it uses.
        token_count: Tokens of its unfinished requests.
        request_count: How many those are.
    """

    node: str
    token_count: int = 0
    request_count: int = 0


class PrefillClass(enum.IntEnum):
    """In what order engines are considered."""

    OVERLOADED = 1
    """More unfinished tokens than beta: not at all."""
    SHORT_READ_QUEUE = 2
    """Up to alpha tokens wait for the node: first."""
    LONG_READ_QUEUE = 3
    """More do: only if there is no other."""


def classify(token_count: int, read_queue_tokens: float, alpha: float, beta: float) -> PrefillClass:
    """The class of a prefill engine; at the limits it is on the better side."""
    if token_count > beta:
        return PrefillClass.OVERLOADED
    if read_queue_tokens <= alpha:
        return PrefillClass.SHORT_READ_QUEUE
    return PrefillClass.LONG_READ_QUEUE


def choose_prefill(
    request_tokens: Sequence[int],
    engines: Sequence[PrefillEngine],
    read_queues_tokens: Mapping[str, float],
    alpha: float,
    beta: float,
) -> list[int]:
    """Give the requests at the head of the global queue to the engines of a group that asks.

    The least loaded engine with a short read queue gets the next, else the least loaded with
    a long one, until all are overloaded.

    Args:
        request_tokens: Lengths of the waiting requests, the oldest first.
        read_queues_tokens: Tokens that wait at storage for each node; none for those not named.

    Returns:
        The index of the engine for each request that got one: the first ones of the queue.
    """
    waiting: dict[PrefillClass, list[tuple[int, int, int]]] = {
        PrefillClass.SHORT_READ_QUEUE: [],
        PrefillClass.LONG_READ_QUEUE: [],
    }
    for index, engine in enumerate(engines):
        read_queue = read_queues_tokens.get(engine.node, 0)
        kind = classify(engine.token_count, read_queue, alpha, beta)
        if kind in waiting:
            waiting[kind].append((engine.token_count, engine.request_count, index))
    for heap in waiting.values():
        heapq.heapify(heap)
    chosen: list[int] = []
    for tokens in request_tokens:
        heap = waiting[PrefillClass.SHORT_READ_QUEUE] or waiting[PrefillClass.LONG_READ_QUEUE]
        if not heap:
            break
        token_count, request_count, index = heap[0]
        chosen.append(index)
        if token_count + tokens > beta:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (token_count + tokens, request_count + 1, index))
    return chosen


# --- decode --------------------------------------------------------------------------------


class DecodeEngine(NamedTuple):
    """A decode engine as its group's leader reports it.

    Attributes:
        token_count: Tokens of its unfinished requests.
        request_count: How many those are.
        free_tokens: Tokens for which it has memory.
    """

    token_count: int = 0
    request_count: int = 0
    free_tokens: int = 0


def choose_decode_group(
    request_tokens: Sequence[int], group_token_counts: Sequence[int]
) -> list[int]:
    """Phase one: give all waiting requests to groups, each to the one with the fewest tokens.

    Args:
        group_token_counts: Unfinished tokens of all engines of each group together.

    Returns:
        The index of the group for each request.
    """
    assert group_token_counts or not request_tokens, "there is a group"
    heap = [(token_count, index) for index, token_count in enumerate(group_token_counts)]
    heapq.heapify(heap)
    chosen: list[int] = []
    for tokens in request_tokens:
        token_count, index = heap[0]
        chosen.append(index)
        heapq.heapreplace(heap, (token_count + tokens, index))
    return chosen


def decode_ceiling(request_tokens: Sequence[int], engines: Sequence[DecodeEngine]) -> float:
    """Z: tokens up to which an engine is filled while another has fewer requests.

    Args:
        request_tokens: The private queue of the group; counted as far as it fits the free
            memory of all engines together.
    """
    free_tokens = sum(engine.free_tokens for engine in engines)
    fitting = 0
    for tokens in request_tokens:
        if fitting + tokens > free_tokens:
            break
        fitting += tokens
    unfinished = sum(engine.token_count for engine in engines)
    return BALANCE_SLACK * (fitting + unfinished) / len(engines)


def choose_decode(request_tokens: Sequence[int], engines: Sequence[DecodeEngine]) -> list[int]:
    """Phase two: give the head of a group's private queue to its engines.

    Among the engines that have the memory and stay below Z, the one with the fewest requests;
    if none stays below, the one with the fewest tokens; if none has the memory, all that
    follow wait, so that a long request is not passed by short ones for ever.

    Returns:
        The index of the engine for each request that got one: the first ones of the queue.
    """
    if not engines:
        return []
    ceiling = decode_ceiling(request_tokens, engines)
    loads = list(engines)
    chosen: list[int] = []
    for tokens in request_tokens:
        fitting = [index for index, load in enumerate(loads) if load.free_tokens >= tokens]
        if not fitting:
            break
        level = [index for index in fitting if loads[index].token_count + tokens <= ceiling]
        if level:
            index = min(level, key=lambda i: (loads[i].request_count, loads[i].token_count, i))
        else:
            index = min(fitting, key=lambda i: (loads[i].token_count, loads[i].request_count, i))
        chosen.append(index)
        load = loads[index]
        loads[index] = DecodeEngine(
            load.token_count + tokens, load.request_count + 1, load.free_tokens - tokens
        )
    return chosen


# --- path ----------------------------------------------------------------------------------


class ReadSide(enum.StrEnum):
    """Whose storage link loads a request."""

    PREFILL = "prefill"
    DECODE = "decode"


def choose_side(prefill_queue_tokens: float, decode_queue_tokens: float) -> ReadSide:
    """The side whose node has the shorter read queue; for equal ones prefill, a hop less."""
    return ReadSide.DECODE if decode_queue_tokens < prefill_queue_tokens else ReadSide.PREFILL


# --- forward batches of a prefill engine ---------------------------------------------------


class PrefillWork(NamedTuple):
    """What is left of a request for a prefill engine.

    Attributes:
        cached_tokens: KV of these is there, or will be.
        new_tokens: To be computed.
    """

    cached_tokens: int
    new_tokens: int


class Chunk(NamedTuple):
    """Part of a request in a forward batch: its next `new_tokens` tokens.

    Attributes:
        place: Of the request in the queue.
    """

    place: int
    new_tokens: int


class AttentionCost(NamedTuple):
    """A linear fit of profiled attention times.

    Attributes:
        fixed_s: Of a request whatever its size.
        pair_s: Of one query token that looks at one key token.
    """

    fixed_s: float
    pair_s: float

    def __call__(self, cached_tokens: int, new_tokens: int) -> float:
        """Seconds for `new_tokens` behind `cached_tokens`, each of which sees those before it."""
        pairs = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
        return self.fixed_s + self.pair_s * pairs


def fill_batch(
    queue: Sequence[PrefillWork],
    attention_s: Callable[[int, int], float],
    quota_s: float = QUOTA_S,
) -> list[Chunk]:
    """Take from the head of the queue what attention will do within the quota.

    So that data-parallel ranks, which wait for each other at every layer, finish it together.
    The first request that does not fit whole is cut to the most tokens that do.

    Args:
        attention_s: Predicted seconds for (cached tokens, new tokens); does not fall when
            there are more new tokens. `AttentionCost` is one.

    Returns:
        Chunks in the order of the queue. Not empty unless the queue is: where a single token
        takes more than the quota, it goes alone.
    """
    batch: list[Chunk] = []
    used_s = 0.0
    for place, work in enumerate(queue):
        needed_s = attention_s(work.cached_tokens, work.new_tokens)
        if used_s + needed_s <= quota_s:
            batch.append(Chunk(place, work.new_tokens))
            used_s += needed_s
            continue
        fitting, exceeding = 0, work.new_tokens
        while exceeding - fitting > 1:
            middle = (fitting + exceeding) // 2
            if used_s + attention_s(work.cached_tokens, middle) <= quota_s:
                fitting = middle
            else:
                exceeding = middle
        if fitting or not batch:
            batch.append(Chunk(place, max(1, fitting)))
        break
    return batch
