"""What the engine of a node does for a turn: the half that prefills, or the one that decodes.

::

    prefill    fetch ─▶ layers of a group are there ─▶ GPU, fill ─▶ offer    for each group
    decode     claim, fetch from the peer ─▶ first token ─▶ last token ─▶ put
                                          └▶ compare all bytes

What goes wrong in a turn is said in its answer: blocks are missing, wrong, or not stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future

from kvstore.errors import KVStoreError
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_bench.emulate.gpu import Gpu, sleep_until
from kvstore_bench.emulate.memory import Memory, PromptMemory
from kvstore_bench.emulate.steps import (
    Decode,
    Decoded,
    FromEngine,
    Loaded,
    Prefill,
    Prefilled,
    Received,
    Setup,
)
from kvstore_bench.trace import block_key
from kvstore_client import AsyncClient, Namespace
from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle, FetchResult, PutResult

# Of all turns: none is tried twice.
ATTEMPT = 0
# What is retained goes when it is released, in any case after the longest time that agents grant.
RETAIN_S = 60.0
# Offered layers go by time alone. Who decodes waits for them when they come; half of the agent's
# memory must hold what is computed in that time.
OFFER_S = 30.0
# A claim holds that long, and is renewed, or tried again, this often.
CLAIM_LEASE_S = 60.0
CLAIM_INTERVAL_S = 1.0

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


class TurnHalf:
    """What both halves of a turn have in common."""

    def __init__(self, engine: Engine, step: Prefill | Decode) -> None:
        self.engine = engine
        self.turn = step.turn
        self.keys = [block_key(step.scope, block) for block in step.blocks]
        self.hit_count = step.hit_count
        self.deadline_s = step.deadline_s
        self.served: Counter[str] = Counter()
        self.errors: dict[str, None] = {}
        self._handles: list[AsyncFetchHandle | AsyncPutHandle] = []

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
                for handle in self._handles:
                    if not handle.poll():
                        handle.cancel()
                    await handle.quiesced()

    def _count(self, result: FetchResult) -> list[bool]:
        """Note how blocks came; which of them did."""
        hits = [outcome is FetchOutcome.HIT for outcome in result.outcomes]
        ways = zip(result.served_by, hits, strict=True)
        self.served.update(way.name.lower() for way, hit in ways if hit)
        self.note(*result.errors)
        return hits

    def _refused(self, result: PutResult, first: int) -> set[int]:
        """Which blocks were not taken."""
        self.note(*result.errors)
        refused = {outcome.name for outcome in result.outcomes if outcome not in _GOOD}
        if refused:
            self.errors[f"blocks were refused: {', '.join(sorted(refused))}"] = None
        outcomes = enumerate(result.outcomes, first)
        return {index for index, outcome in outcomes if outcome not in _GOOD}


class PrefillHalf(TurnHalf):
    """Loads the hits, computes the rest, and offers it.

    Args:
        step: What is to be done.
    """

    def __init__(self, engine: Engine, step: Prefill) -> None:
        super().__init__(engine, step)
        self._step = step
        self._began_at = time.monotonic()
        self._first_group_at = self._loaded_at = self._ended_at = 0.0
        self._missed: set[int] = set(range(len(self.keys)))

    async def _run(self, room: PromptMemory) -> None:
        loading = self._load(room)
        offers: list[AsyncPutHandle] = []
        done_at = 0.0
        for group, seconds in enumerate(self._step.compute_s):
            ready_at = await self._ready(loading, group, done_at)
            if not group:
                self._first_group_at = ready_at
            # The one takes as long as the model says; the other what our processor needs.
            done_at, _ = await asyncio.gather(
                self.engine.gpu.compute(ready_at, seconds), self._fill(room, group)
            )
            if self.new_count:
                offers.append(self._offer(room, group))
        for handle in offers:
            self._missed |= self._refused(await handle, self.hit_count)
        self._ended_at = max(done_at, time.monotonic() if offers else 0.0)

    def _load(self, room: PromptMemory) -> AsyncFetchHandle | None:
        """Begin to fetch the hits, if there are any."""
        self._missed = set()
        if not self.hit_count:
            self._all_loaded()
            return None
        engine, step = self.engine, self._step
        handle = engine.client.fetch(
            engine.namespace,
            self.keys[: self.hit_count],
            room.blocks(0, self.hit_count),
            order="layer" if step.overlap else "block",
            group_layers=engine.group_layers,
            deadline_s=self.deadline_s,
            decode_node=step.decode_node,
            retain_for=(self.turn, ATTEMPT),
            retain_s=RETAIN_S,
        )
        self._handles.append(handle)
        handle.outcome.add_done_callback(self._loaded)
        return handle

    def _loaded(self, done: Future[FetchResult]) -> None:
        came = self._count(done.result())
        self._missed |= {index for index, hit in enumerate(came) if not hit}
        self._all_loaded()

    def _all_loaded(self) -> None:
        self._loaded_at = time.monotonic()
        self.engine.say(Loaded(self.turn))

    async def _ready(self, loading: AsyncFetchHandle | None, group: int, done_at: float) -> float:
        """Wait until a group of layers may be computed; since when that is so.

        Args:
            done_at: When the group before was computed.
        """
        if loading is not None and self._step.overlap:
            layer = (group + 1) * self.engine.group_layers - 1
            if loading.layers_ready <= layer and not loading.poll():
                await loading.layer(layer)
                return time.monotonic()
        elif loading is not None and not group:
            await loading
        return done_at if group else time.monotonic()

    async def _fill(self, room: PromptMemory, group: int) -> None:
        """Make the bytes of a group of layers of the new blocks."""
        if self.new_count:
            begin, end = self._span(group)
            await asyncio.to_thread(
                self.engine.memory.fill, room, self.keys, self.hit_count, begin, end
            )

    def _offer(self, room: PromptMemory, group: int) -> AsyncPutHandle:
        """Begin to offer a group of layers of the new blocks."""
        engine, layers = self.engine, self.engine.group_layers
        handle = engine.client.offer(
            engine.namespace,
            self.keys,
            room.blocks(self.hit_count, len(self.keys), *self._span(group)),
            layers=range(group * layers, (group + 1) * layers),
            first=self.hit_count,
            offer_s=OFFER_S,
            retain_for=(self.turn, ATTEMPT),
            deadline_s=self.deadline_s,
        )
        self._handles.append(handle)
        return handle

    def _span(self, group: int) -> tuple[int, int]:
        """Which bytes of a block a group of layers is."""
        offsets, layers = self.engine.namespace.geometry.offsets, self.engine.group_layers
        return offsets[group * layers], offsets[(group + 1) * layers]

    def answer(self) -> Prefilled:
        now = time.monotonic()
        return Prefilled(
            turn=self.turn,
            began_at=self._began_at,
            first_group_at=self._first_group_at or now,
            loaded_at=self._loaded_at or now,
            ended_at=self._ended_at or now,
            served=dict(self.served),
            missed_blocks=len(self._missed),
            error=self.error,
        )


class DecodeHalf(TurnHalf):
    """Gets the whole prompt, decodes, and stores what is new.

    Args:
        step: What is to be done.
    """

    def __init__(self, engine: Engine, step: Decode) -> None:
        super().__init__(engine, step)
        self._step = step
        self._received_at = self._first_token_at = self._ended_at = 0.0
        self._missed_count, self._wrong_count = len(self.keys), 0
        self._unstored_count = self.new_count

    async def _run(self, room: PromptMemory) -> None:
        step = self._step
        came = await self._receive(room)
        self._missed_count = came.count(False)
        self._received_at = time.monotonic()
        checking = asyncio.ensure_future(self._check(room, came))
        try:
            self.engine.say(Received(self.turn))
            await self._let_go()
            await sleep_until(self._received_at + step.first_token_s)
            self._first_token_at = time.monotonic()
            await sleep_until(self._received_at + step.first_token_s + step.decode_s)
            await self._store(room, came)
            self._ended_at = time.monotonic()
        finally:
            # The thread that reads the memory cannot be cancelled.
            await asyncio.wait([checking])
        self._wrong_count = checking.result()

    async def _receive(self, room: PromptMemory) -> list[bool]:
        """Fetch the prompt; which blocks of it came."""
        if not self.keys:
            return []
        engine, step = self.engine, self._step
        claiming = asyncio.create_task(self._keep_claim()) if self.hit_count else None
        try:
            # What the prefill engine offers of a block goes on at once in this order too.
            handle = engine.client.fetch(
                engine.namespace,
                self.keys,
                room.blocks(0, len(self.keys)),
                deadline_s=self.deadline_s,
                peer=step.peer,
                wait_s=step.wait_s,
            )
            self._handles.append(handle)
            return self._count(await handle)
        finally:
            if claiming is not None:
                claiming.cancel()
                await asyncio.wait([claiming])

    async def _keep_claim(self) -> None:
        """Claim what is retained for the turn, as soon as anything is, until cancelled.

        A claim that is not found, or whose agent does not answer, is made again: blocks that
        were retained without it would go a minute later, and come once more by another way.
        """
        renew_at = 0.0
        while True:
            if time.monotonic() >= renew_at:
                with contextlib.suppress(KVStoreError):
                    claimed = await self.engine.client.claim(
                        self.turn, ATTEMPT, lease_s=CLAIM_LEASE_S
                    )
                    if claimed.found:
                        renew_at = time.monotonic() + CLAIM_LEASE_S / 3
            await asyncio.sleep(CLAIM_INTERVAL_S)

    async def _let_go(self) -> None:
        """All is here: the agent need keep nothing for us."""
        if self.hit_count:
            try:
                await self.engine.release(self.turn)
            except KVStoreError as error:
                self.note(error)

    async def _check(self, room: PromptMemory, came: list[bool]) -> int:
        """How many of the blocks that came are wrong."""
        if not self.engine.check or not self.keys:
            return 0
        wrong = await asyncio.to_thread(self.engine.memory.wrong, room, self.keys)
        return sum(bad and hit for bad, hit in zip(wrong, came, strict=True))

    async def _store(self, room: PromptMemory, came: list[bool]) -> None:
        """Put the new blocks, up to the first that did not come."""
        end = came.index(False, self.hit_count) if False in came[self.hit_count :] else len(came)
        if end == self.hit_count:
            return
        engine = self.engine
        handle = engine.client.put(
            engine.namespace,
            self.keys[:end],
            room.blocks(self.hit_count, end),
            first=self.hit_count,
            ack="memory",
            deadline_s=self.deadline_s,
        )
        self._handles.append(handle)
        refused = self._refused(await handle, self.hit_count)
        self._unstored_count = len(self.keys) - end + len(refused)

    def answer(self) -> Decoded:
        now = time.monotonic()
        return Decoded(
            turn=self.turn,
            received_at=self._received_at or now,
            first_token_at=self._first_token_at or now,
            ended_at=self._ended_at or now,
            served=dict(self.served),
            missed_blocks=self._missed_count,
            wrong_blocks=self._wrong_count,
            unstored_blocks=self._unstored_count,
            error=self.error,
        )


__all__ = ["ATTEMPT", "DecodeHalf", "Engine", "PrefillHalf", "TurnHalf"]
