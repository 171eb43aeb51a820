"""What a replay will do, and what that needs: sessions, block sizes, memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvstore.errors import ConfigError
from kvstore.layout import BLOCK_BYTES_MAX, Layout
from kvstore_bench.content import WORD_BYTES
from kvstore_bench.trace import Request, Trace

# The daemon's arena hands out whole pages.
PAGE_BYTES = 4096
# Room beyond the distinct blocks: puts of the same block by two sessions hold it twice for a
# moment. A twentieth is far more than that takes, and a floor for tiny replays.
SLACK_DIVISOR = 20
SLACK_BYTES_MIN = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Scale:
    """How much smaller than life a replay is.

    Attributes:
        bytes_per_token: KV of one token, all layers.
        layers: Layers that it is split into.
        sessions: The first ones of the traces; None for all.
        turns: The first requests of each session; None for all.
    """

    bytes_per_token: int
    layers: int = 1
    sessions: int | None = None
    turns: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A session as it will be replayed.

    Attributes:
        scope: See `trace.Session`.
        block_tokens: Tokens a block.
        requests: In order.
    """

    scope: str
    block_tokens: int
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Plan:
    """What will be replayed.

    Attributes:
        traces: Names of the traces, in order.
        scale: How it was cut down.
        conversations: What is left of the sessions, in order.
        session_count: Sessions in the traces, before the cut.
        request_count: Requests in the traces, before the cut.
    """

    traces: tuple[str, ...]
    scale: Scale
    conversations: tuple[Conversation, ...]
    session_count: int
    request_count: int

    def block_bytes(self, block_tokens: int) -> int:
        """Bytes of a block."""
        return block_tokens * self.scale.bytes_per_token

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens a block that occur, in ascending order."""
        return tuple(sorted({talk.block_tokens for talk in self.conversations}))

    @cached_property
    def requests(self) -> int:
        """Requests to be made."""
        return sum(len(talk.requests) for talk in self.conversations)

    @cached_property
    def blocks(self) -> int:
        """Blocks in all prompts; one that occurs in ten prompts counts ten times."""
        return sum(len(request.hash_ids) for request in self._all_requests())

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens in all prompts."""
        return sum(request.input_tokens for request in self._all_requests())

    @cached_property
    def distinct_blocks(self) -> dict[int, int]:
        """Blocks that differ, by their tokens."""
        seen: dict[tuple[str, int], set[int]] = {}
        for talk in self.conversations:
            known = seen.setdefault((talk.scope, talk.block_tokens), set())
            for request in talk.requests:
                known.update(request.hash_ids)
        counts = dict.fromkeys(self.block_sizes, 0)
        for (_, block_tokens), known in seen.items():
            counts[block_tokens] += len(known)
        return counts

    @cached_property
    def hit_rate_max(self) -> float:
        """Share of blocks that a cache which forgets nothing has: all but the first of each."""
        distinct = sum(self.distinct_blocks.values())
        return (self.blocks - distinct) / self.blocks if self.blocks else 0.0

    @cached_property
    def arena_bytes(self) -> int:
        """Memory that holds every distinct block, with some slack."""
        net = sum(
            count * (-(-self.block_bytes(block_tokens) // PAGE_BYTES) * PAGE_BYTES)
            for block_tokens, count in self.distinct_blocks.items()
        )
        size = net + max(SLACK_BYTES_MIN, net // SLACK_DIVISOR)
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    @cached_property
    def longest_bytes(self) -> int:
        """Bytes of the longest prompt."""
        return max(
            (
                len(request.hash_ids) * self.block_bytes(talk.block_tokens)
                for talk in self.conversations
                for request in talk.requests
            ),
            default=0,
        )

    def layout(self, block_tokens: int, run_id: str) -> Layout:
        """The layout of blocks of that size; another run id is another namespace."""
        layer_bytes = self.block_bytes(block_tokens) // self.scale.layers
        return Layout(
            model_id="kvbench-replay",
            dtype="uint8",
            block_tokens=block_tokens,
            layer_bytes=(layer_bytes,) * self.scale.layers,
            extras=(("run", run_id),),
        )

    def _all_requests(self) -> Iterable[Request]:
        return (request for talk in self.conversations for request in talk.requests)


def make_plan(traces: Sequence[Trace], scale: Scale) -> Plan:
    """Cut traces down to scale.

    Raises:
        ConfigError: Names the option that does not fit, and what would.
    """
    for option, value in (
        ("--bytes-per-token", scale.bytes_per_token),
        ("--layers", scale.layers),
        ("--sessions", scale.sessions),
        ("--turns", scale.turns),
    ):
        if value is not None and value < 1:
            raise ConfigError(option, value, "must be at least 1")
    sessions = [(trace, session) for trace in traces for session in trace.sessions]
    plan = Plan(
        traces=tuple(trace.name for trace in traces),
        scale=scale,
        conversations=tuple(
            Conversation(session.scope, trace.block_tokens, session.requests[: scale.turns])
            for trace, session in sessions[: scale.sessions]
        ),
        session_count=len(sessions),
        request_count=sum(len(session.requests) for _, session in sessions),
    )
    for block_tokens in plan.block_sizes:
        _check_block(plan.block_bytes(block_tokens), block_tokens, scale)
    return plan


def _check_block(block_bytes: int, block_tokens: int, scale: Scale) -> None:
    made = f"makes blocks of {block_bytes} bytes ({block_tokens} tokens)"
    if block_bytes > BLOCK_BYTES_MAX:
        raise ConfigError(
            "--bytes-per-token", scale.bytes_per_token, f"{made}, the limit is {BLOCK_BYTES_MAX}"
        )
    if block_bytes % WORD_BYTES:
        raise ConfigError(
            "--bytes-per-token",
            scale.bytes_per_token,
            f"{made}, they must be a multiple of {WORD_BYTES}",
        )
    if block_bytes % scale.layers:
        raise ConfigError(
            "--layers", scale.layers, f"must divide the {block_bytes} bytes of a block"
        )
