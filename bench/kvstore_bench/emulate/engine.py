"""The engine of an emulated GPU node, beside the node's agent: many turns under way at once.

Told on its input what to do, says on its output how it went: see `kvstore_bench.emulate.steps`.

Rule: standard output belongs to these lines alone. The engine ends when its input does, and in
any case when its parent does. What goes wrong in a turn is said in its answer; the engine ends
with another status than 0 if it has no agent, or is told what it does not understand.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

import msgspec
import uvloop

from kvstore.errors import KVStoreError
from kvstore.layout import Layout
from kvstore_bench.content import WORD_BYTES
from kvstore_bench.emulate.decoding import DecodeHalf
from kvstore_bench.emulate.memory import Memory
from kvstore_bench.emulate.prefilling import PrefillHalf
from kvstore_bench.emulate.steps import (
    Decode,
    FromEngine,
    Prefill,
    Ready,
    Release,
    Setup,
    ToEngine,
)
from kvstore_bench.emulate.turns import Engine
from kvstore_client import AsyncClient

POOL = "emulate"
# A prompt of a million blocks, twenty digits each.
LINE_BYTES_MAX = 32 * 1024 * 1024
# Exit statuses, beside 0.
NO_AGENT, NOT_UNDERSTOOD = 1, 2

logger = logging.getLogger(__name__)


def layout(setup: Setup) -> Layout:
    """Of all blocks."""
    return Layout(
        model_id="emulated",
        dtype="uint8",
        block_tokens=setup.block_tokens,
        layer_bytes=setup.layer_bytes,
    )


def say(report: FromEngine) -> None:
    """One line to the parent."""
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.stdout.flush()


async def open_engine(setup: Setup, client: AsyncClient) -> Engine:
    """The engine, when its agent has answered and its memory is there.

    Raises:
        KVStoreError: The agent does not answer, or the setup is impossible.
        OSError: There is no memory.
    """
    if len(setup.layer_bytes) % setup.groups or any(
        size % WORD_BYTES for size in setup.layer_bytes
    ):
        raise KVStoreError(
            f"{len(setup.layer_bytes)} layers in {setup.groups} groups: the one must be a multiple"
            f" of the other, and the bytes of each layer of {WORD_BYTES}"
        )
    await client.start()
    for endpoint, status in (await client.status()).items():
        if isinstance(status, Exception):
            raise KVStoreError(f"{endpoint}: {status}")
    namespace = await client.open_namespace(POOL, layout(setup))
    region = await client.allocate(setup.memory_bytes)
    memory = Memory(region.view, namespace.geometry.block_bytes)
    return Engine(setup, client, namespace, memory, say)


class _Turns:
    """What is under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()
        self._releases: set[asyncio.Task[None]] = set()

    def begin(self, step: Prefill | Decode | Release) -> None:
        """Do a step beside all others."""
        work: Coroutine[Any, Any, None]
        match step:
            case Prefill():
                work = self._prefill(step)
            case Decode():
                work = DecodeHalf(self._engine, step).do()
            case Release():
                work = self._release(step.turn)
        task = asyncio.create_task(work)
        kept = self._releases if isinstance(step, Release) else self._tasks
        kept.add(task)
        task.add_done_callback(kept.discard)

    async def _prefill(self, step: Prefill) -> None:
        # The last turn of its session may have been here: what that leaves in the agent's memory
        # is gone before, or its hits would not come from storage.
        if self._releases:
            await asyncio.wait(set(self._releases))
        await PrefillHalf(self._engine, step).do()

    async def _release(self, turn: str) -> None:
        try:
            await self._engine.release(turn)
        except KVStoreError as error:
            logger.warning("turn %s was not released: %s", turn, error)

    async def stop(self) -> None:
        """End all that is under way."""
        tasks = self._tasks | self._releases
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def work() -> int:
    """Do what comes on standard input until it ends; the exit status."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb"))
    try:
        if not (line := await reader.readline()):
            return 0
        setup = msgspec.json.decode(line, type=Setup)
        client = AsyncClient(setup.agent, deadline_s=60.0)
        try:
            turns = _Turns(await open_engine(setup, client))
            say(Ready())
            try:
                while line := await reader.readline():
                    step = msgspec.json.decode(line, type=Prefill | Decode | Release)
                    turns.begin(step)
            finally:
                await turns.stop()
        finally:
            await client.close()
    except (KVStoreError, OSError) as error:
        say(Ready(error=str(error)))
        return NO_AGENT
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: a line without end
        logger.error("not understood: %s", error)
        say(Ready(error=f"not understood: {error}"))
        return NOT_UNDERSTOOD
    return 0


def main() -> int:
    """Run the engine until its input ends."""
    logging.basicConfig(format="engine: %(message)s", level=logging.WARNING)
    # uvloop and no debug mode, as in `kvstore_bench.worker`.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        return runner.run(work())


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["LINE_BYTES_MAX", "NOT_UNDERSTOOD", "NO_AGENT", "POOL", "ToEngine", "layout"]
