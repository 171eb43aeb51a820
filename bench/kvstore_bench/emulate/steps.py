"""What the emulation tells the engine of a node, and what it hears: lines of JSON.

::

    parent ──▶ engine    Setup, then any number of Prefill and Decode, as turns come
    engine ──▶ parent    Ready; Prefilled and Decoded, each when it is over, in any order

    prefill engine ── Loaded ──▶ parent ── Decode ──▶ decode engine
    decode engine ── Received ──▶ parent ── Release ──▶ prefill engine

A turn is told to who decodes when its hits are loaded. Earlier his agent would ask that of the
prefill node for blocks that it is to relay, and then relays none of them.

All times are those of `time.monotonic`, which the processes of one host share.
"""

from __future__ import annotations

import msgspec


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Who the engine is.

    Attributes:
        agent: Endpoint of its node's agent.
        block_tokens, layer_bytes: Of all blocks.
        groups: Groups of layers that load and compute step by step; divides the layers.
        memory_bytes: What the turns under way on this node need at most.
        check: Compare all bytes of what a decode engine has received with what belongs there.
    """

    agent: str
    block_tokens: int
    layer_bytes: tuple[int, ...]
    groups: int
    memory_bytes: int
    check: bool = True


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has its agent and its memory; or why not."""

    error: str = ""


class Prefill(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Load the hits, compute the rest, and offer it to who decodes.

    Attributes:
        turn: Unique in a run.
        scope, blocks: The prompt: a chain of full blocks, by `trace.block_key`.
        hit_count: How many of the first blocks are stored.
        decode_node: Node id of who decodes.
        compute_s: Time that the GPU takes for each group of layers; one turn at a time.
        overlap: Compute a group as soon as its layers are loaded; else when all are.
        deadline_s: Of each request, from when it is made.
    """

    turn: str
    scope: str
    blocks: tuple[int, ...]
    hit_count: int
    decode_node: str
    compute_s: tuple[float, ...]
    overlap: bool
    deadline_s: float


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """No hit of a prefill is on its way any more: who decodes may be told. Not said of one that
    has failed before."""

    turn: str


class Prefilled(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A prefill is over.

    Attributes:
        began_at, loaded_at, ended_at: When it was told, when the last hit had come, and when the
            last group was computed and offered.
        first_group_at: When the first group of layers had come.
        served: Blocks that came, by `ServedBy` in lower case.
        missed_blocks: Hits that did not come, and blocks that could not be offered.
        error: Why.
    """

    turn: str
    began_at: float
    first_group_at: float
    loaded_at: float
    ended_at: float
    served: dict[str, int] = {}
    missed_blocks: int = 0
    error: str = ""


class Decode(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Get the whole prompt, decode, and store the new blocks.

    Attributes:
        turn, scope, blocks, hit_count, deadline_s: As of its `Prefill`.
        peer: Endpoint of the agent of who prefills.
        wait_s: How long that may let us wait for blocks that are not computed yet.
        first_token_s, decode_s: Time to the first token once all is there, and to the last one
            from then. Turns decode side by side.
    """

    turn: str
    scope: str
    blocks: tuple[int, ...]
    hit_count: int
    peer: str
    wait_s: float
    first_token_s: float
    decode_s: float
    deadline_s: float


class Received(msgspec.Struct, frozen=True, tag=True):
    """No block of a prompt is on its way any more: who prefilled may be told. Not said of one that
    has failed before."""

    turn: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """Who decodes has all: let go of what a prefill has loaded and offered. Without, it stays for a
    minute."""

    turn: str


class Decoded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A turn is over.

    Attributes:
        received_at, first_token_at: When all of the prompt was there; when the first token was.
        ended_at: When the last token was there and the new blocks were stored.
        served: As of `Prefilled`.
        missed_blocks: Blocks of the prompt that did not come.
        wrong_blocks: Those that came with other bytes than belong there.
        unstored_blocks: New ones that storage did not take.
        error: Why.
    """

    turn: str
    received_at: float
    first_token_at: float
    ended_at: float
    served: dict[str, int] = {}
    missed_blocks: int = 0
    wrong_blocks: int = 0
    unstored_blocks: int = 0
    error: str = ""


ToEngine = Setup | Prefill | Decode | Release
FromEngine = Ready | Loaded | Prefilled | Received | Decoded

__all__ = [
    "Decode",
    "Decoded",
    "FromEngine",
    "Loaded",
    "Prefill",
    "Prefilled",
    "Ready",
    "Received",
    "Release",
    "Setup",
    "ToEngine",
]
