"""The half of a turn that decodes: gets the whole prompt, answers, stores what is new."""

from __future__ import annotations

import asyncio
import contextlib
import time

from kvstore.errors import KVStoreError
from kvstore_bench.emulate.gpu import sleep_until
from kvstore_bench.emulate.memory import PromptMemory
from kvstore_bench.emulate.steps import Decode, Decoded, Received
from kvstore_bench.emulate.turns import ATTEMPT, CLAIM_LEASE_S, Engine, TurnHalf

# How often a claim that has found nothing is made again.
CLAIM_INTERVAL_S = 1.0


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
            self.handles.append(handle)
            return self.count(await handle)
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
        self.handles.append(handle)
        refused = self.refused(await handle, self.hit_count)
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


__all__ = ["DecodeHalf"]
