"""What both halves of a turn have in common at the engine of a node.

::

    prefill    fetch ─▶ layers of a group are there ─▶ GPU, fill ─▶ offer    for each group
    decode     claim, fetch from the peer ─▶ first token ─▶ last token ─▶ put
                                          └▶ compare all bytes

What goes wrong in a turn is said in its answer: blocks are missing, wrong, or not stored.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable

from kvstore.errors import KVStoreError
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_bench.emulate.gpu import Gpu
from kvstore_bench.emulate.memory import Memory, PromptMemory
from kvstore_bench.emulate.steps import Decode, FromEngine, Prefill, Setup
from kvstore_bench.trace import block_key
from kvstore_client import AsyncClient, Namespace
from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle, FetchResult, PutResult

# Of all turns: none is tried twice.
ATTEMPT = 0
# A claim holds that long.
CLAIM_LEASE_S = 60.0

_GOOD = (PutOutcome.STORED, PutOutcome.EXISTS)

logger = logging.getLogger(__name__)


class Engine:
    """What all turns of a node share.

    Args:
        say: Tells the parent something.
    """

    def __init__(
        self,
        setup: Setup,
        client: AsyncClient,
        namespace: Namespace,
        memory: Memory,
        say: Callable[[FromEngine], None],
    ) -> None:
        self.client = client
        self.namespace = namespace
        self.memory = memory
        self.say = say
        self.gpu = Gpu()
        self.check = setup.check
        self.group_layers = len(setup.layer_bytes) // setup.groups

    async def release(self, turn: str) -> None:
        """Let go of what is retained for a turn, or claimed by this engine.

        Raises:
            KVStoreError: The agent does not answer; it will let go by itself.
        """
        claimed = await self.client.claim(turn, ATTEMPT, lease_s=CLAIM_LEASE_S)
        if claimed.found:
            await self.client.release([claimed.lease])


class TurnHalf(ABC):
    """One half of a turn.

    Attributes:
        keys: Of the blocks of the prompt.
        hit_count: How many of the first ones are stored.
        served: Blocks that came, by `ServedBy` in lower case.
        errors: What went wrong, once each.
        handles: Requests that use its memory.
    """

    def __init__(self, engine: Engine, step: Prefill | Decode) -> None:
        self.engine = engine
        self.turn = step.turn
        self.keys = [block_key(step.scope, block) for block in step.blocks]
        self.hit_count = step.hit_count
        self.deadline_s = step.deadline_s
        self.served: Counter[str] = Counter()
        self.errors: dict[str, None] = {}
        self.handles: list[AsyncFetchHandle | AsyncPutHandle] = []

    @property
    def new_count(self) -> int:
        """Blocks that are computed."""
        return len(self.keys) - self.hit_count

    async def do(self) -> None:
        """Do it, say so, and say how it went."""
        try:
            async with self._room() as room:
                await self._run(room)
        except KVStoreError as error:
            self.note(error)
        except Exception as error:
            logger.exception("turn %s", self.turn)
            self.note(error)
        self.engine.say(self.answer())

    @abstractmethod
    async def _run(self, room: PromptMemory) -> None:
        """Do it in memory for all blocks of the prompt."""

    @abstractmethod
    def answer(self) -> FromEngine:
        """How it went."""

    def note(self, *errors: Exception) -> None:
        """Remember what went wrong, once each."""
        for error in errors:
            self.errors[f"{type(error).__name__}: {error}"] = None

    @property
    def error(self) -> str:
        """What went wrong."""
        return "; ".join(self.errors)

    @contextlib.asynccontextmanager
    async def _room(self) -> AsyncIterator[PromptMemory]:
        """Memory for the prompt, until no request uses it any more."""
        async with self.engine.memory.lend(len(self.keys)) as room:
            try:
                yield room
            finally:
                for handle in self.handles:
                    if not handle.poll():
                        handle.cancel()
                    await handle.quiesced()

    def count(self, result: FetchResult) -> list[bool]:
        """Note how blocks came; which of them did."""
        hits = [outcome is FetchOutcome.HIT for outcome in result.outcomes]
        ways = zip(result.served_by, hits, strict=True)
        self.served.update(way.name.lower() for way, hit in ways if hit)
        self.note(*result.errors)
        return hits

    def refused(self, result: PutResult, first: int) -> set[int]:
        """Which blocks were not taken."""
        self.note(*result.errors)
        refused = {outcome.name for outcome in result.outcomes if outcome not in _GOOD}
        if refused:
            self.errors[f"blocks were refused: {', '.join(sorted(refused))}"] = None
        outcomes = enumerate(result.outcomes, first)
        return {index for index, outcome in outcomes if outcome not in _GOOD}


__all__ = ["ATTEMPT", "CLAIM_LEASE_S", "Engine", "TurnHalf"]
