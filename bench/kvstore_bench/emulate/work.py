"""What an emulated cluster has to do: turns of sessions, what each loads, computes and stores.
Pure.

Scaling, so that hours of a large cluster become a minute on one machine:

bytes     `bytes_per_token` is what it is told to be; rates of links are scaled with it
tokens    one block stands for `token_scale` blocks of the trace: of each such group the last
          hash remains, which covers all before it, so that prompts share what they shared
sessions  the first ones, and of each the first turns

Sessions share nothing with each other: what a turn hits was stored by turns before it in its own
session, so that hits do not depend on who was faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvstore.errors import ConfigError
from kvstore.layout import BLOCK_BYTES_MAX
from kvstore_bench.trace import Session, Trace


@dataclass(frozen=True, slots=True)
class Scale:
    """How much smaller than life it is.

    Attributes:
        bytes_per_token: KV of one token, all layers.
        token_scale: Blocks of the trace in one of ours.
        sessions, turns: At most, 0 for all.
        layers: Layers of a block.
    """

    bytes_per_token: int
    token_scale: int = 1
    sessions: int = 0
    turns: int = 0
    layers: int = 8


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a session.

    Attributes:
        session, number: Which.
        scope: Of the hashes of its blocks.
        blocks: The prompt, a chain of full blocks.
        hit_count: How many of the first ones earlier turns have stored.
        context_tokens: Of the prompt.
        appended_tokens: Of the blocks that are computed.
        output_tokens: That are generated.
    """

    session: int
    number: int
    scope: str
    blocks: tuple[int, ...]
    hit_count: int
    context_tokens: int
    appended_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        """Unique in a run."""
        return f"{self.session}.{self.number}"


@dataclass(frozen=True)
class Work:
    """All turns.

    Attributes:
        sessions: The turns of each session, in order; none is empty.
        block_tokens: Scaled.
        scale: What it was made with.
        sources: Names of the traces.
        session_count, turn_count: In the traces, before the cut.
    """

    sessions: tuple[tuple[Turn, ...], ...]
    block_tokens: int
    scale: Scale
    sources: tuple[str, ...]
    session_count: int
    turn_count: int

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Of one block."""
        layers = self.scale.layers
        return (self.block_tokens * self.scale.bytes_per_token // layers,) * layers

    @cached_property
    def block_bytes(self) -> int:
        """Of all layers."""
        return sum(self.layer_bytes)

    @property
    def turns(self) -> Iterator[Turn]:
        """All of them."""
        return (turn for session in self.sessions for turn in session)

    @cached_property
    def hit_bytes(self) -> int:
        """What is loaded in all turns."""
        return sum(turn.hit_count for turn in self.turns) * self.block_bytes

    @cached_property
    def new_bytes(self) -> int:
        """What is computed and stored in all turns."""
        new = sum(len(turn.blocks) - turn.hit_count for turn in self.turns)
        return new * self.block_bytes

    @cached_property
    def appended_tokens(self) -> int:
        """What is computed in all turns."""
        return sum(turn.appended_tokens for turn in self.turns)

    @cached_property
    def output_tokens(self) -> int:
        """What is generated in all turns."""
        return sum(turn.output_tokens for turn in self.turns)

    @cached_property
    def longest_bytes(self) -> int:
        """Of the longest prompt."""
        return max(len(turn.blocks) for turn in self.turns) * self.block_bytes


def make_work(traces: Sequence[Trace], scale: Scale) -> Work:
    """The turns that traces and a scale give.

    Raises:
        ConfigError: Nothing is left, traces differ in the tokens of a block, or a block would
            have no bytes in a layer, or too many.
    """
    sessions = [session for trace in traces for session in trace.sessions]
    sizes = sorted({trace.block_tokens for trace in traces})
    if len(sizes) > 1:
        raise ConfigError("TRACE", ", ".join(map(str, sizes)), "have different tokens a block")
    made: list[tuple[Turn, ...]] = []
    for session in sessions:
        if scale.sessions and len(made) == scale.sessions:
            break
        turns = tuple(_turns(session, len(made), sizes[0], scale))
        if turns:
            made.append(turns)
    if not made:
        raise ConfigError("--token-scale", scale.token_scale, "leaves no full block of any prompt")
    work = Work(
        sessions=tuple(made),
        block_tokens=sizes[0],
        scale=scale,
        sources=tuple(trace.name for trace in traces),
        session_count=len(sessions),
        turn_count=sum(len(session.requests) for session in sessions),
    )
    if not work.layer_bytes[0] or work.block_bytes > BLOCK_BYTES_MAX:
        raise ConfigError(
            "--bytes-per-token",
            scale.bytes_per_token,
            f"makes blocks of {work.block_tokens * scale.bytes_per_token} bytes: at least one for"
            f" each of {scale.layers} layers, and {BLOCK_BYTES_MAX} at most",
        )
    return work


def _turns(session: Session, place: int, block_tokens: int, scale: Scale) -> Iterator[Turn]:
    stored: set[int] = set()
    number = 0
    for request in session.requests:
        if scale.turns and number == scale.turns:
            return
        blocks = request.hash_ids[scale.token_scale - 1 :: scale.token_scale]
        if not blocks:
            continue
        hit_count = next(
            (at for at, block in enumerate(blocks) if block not in stored), len(blocks)
        )
        stored.update(blocks)
        yield Turn(
            session=place,
            number=number,
            scope=session.name,
            blocks=tuple(blocks),
            hit_count=hit_count,
            context_tokens=len(blocks) * block_tokens,
            appended_tokens=(len(blocks) - hit_count) * block_tokens,
            output_tokens=-(-request.output_tokens // scale.token_scale),
        )
        number += 1


# --- what GPUs do --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compute:
    """How long GPUs take: a model with three rates, which are all that it knows of GPUs.

    A prefill takes `token_s` for each appended token, and `attention_s` for each pair of one
    and a token of its context; layers take the same, and a node computes one group of layers
    of one turn at a time. Turns decode side by side, each at `decode_s` a token.

    Attributes:
        overlap: Whether a group of layers is computed while later ones are loaded.
    """

    token_s: float = 0.0
    attention_s: float = 0.0
    decode_s: float = 0.0
    overlap: bool = True

    def prefill_s(self, turn: Turn) -> float:
        """Time to compute what is appended."""
        pairs = turn.appended_tokens * turn.context_tokens
        return turn.appended_tokens * self.token_s + pairs * self.attention_s

    def answer_s(self, turn: Turn) -> tuple[float, float]:
        """Time to the first token, and from then to the last."""
        return self.decode_s, max(0, turn.output_tokens - 1) * self.decode_s


def shared_compute(
    work: Work, load_s: float, prefill_share: float, decode_share: float, overlap: bool
) -> Compute:
    """The model whose times for all work together are shares of a time.

    Args:
        load_s: Such as what all loads take directly.
    """
    return Compute(
        token_s=prefill_share * load_s / work.appended_tokens if work.appended_tokens else 0.0,
        decode_s=decode_share * load_s / work.output_tokens if work.output_tokens else 0.0,
        overlap=overlap,
    )


__all__ = ["Compute", "Scale", "Turn", "Work", "make_work", "shared_compute"]
