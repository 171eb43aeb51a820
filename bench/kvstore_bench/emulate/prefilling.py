"""The half of a turn that prefills: loads the hits, computes the rest, offers it layer by layer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future

from kvstore_bench.emulate.memory import PromptMemory
from kvstore_bench.emulate.steps import Loaded, Prefill, Prefilled
from kvstore_bench.emulate.turns import ATTEMPT, Engine, TurnHalf
from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle, FetchResult

# What is retained or offered goes when it is released, in any case after the longest time that
# agents grant.
RETAIN_S = 60.0


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
            self._missed |= self.refused(await handle, self.hit_count)
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
        self.handles.append(handle)
        handle.outcome.add_done_callback(self._loaded)
        return handle

    def _loaded(self, done: Future[FetchResult]) -> None:
        came = self.count(done.result())
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
            offer_s=RETAIN_S,
            retain_for=(self.turn, ATTEMPT),
            deadline_s=self.deadline_s,
        )
        self.handles.append(handle)
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


__all__ = ["PrefillHalf"]
