"""The parent's side of a worker in a node: one step at a time, each with its answer."""

from __future__ import annotations

import asyncio

import msgspec

from kvstore_bench.children import Child
from kvstore_bench.shaped.nodes import Node, NodeFailed
from kvstore_bench.shaped.worker import Done, Fill, Load, Reports, Setup

# Beside the time that a step takes by itself.
STEP_TIMEOUT_S = 120.0


class WorkerSession:
    """A worker that was started in a node."""

    def __init__(self) -> None:
        self._child: Child
        self._answers: asyncio.Queue[str] = asyncio.Queue()

    @classmethod
    async def start(cls, node: Node, setup: Setup) -> WorkerSession:
        """Start a worker and tell it who it is.

        Raises:
            NodeFailed: As for `do`.
        """
        session = cls()
        session._child = await node.start(
            "kvstore_bench.shaped.worker", on_line=session._answers.put_nowait
        )
        await session.do(setup)
        return session

    async def stop(self) -> None:
        """End the worker."""
        await self._child.stop()

    async def do(self, step: Setup | Fill | Load | Reports, timeout_s: float = 0.0) -> Done:
        """Have a step done.

        Args:
            timeout_s: How long it takes by itself.

        Raises:
            NodeFailed: It could not be done, blocks failed, or the worker has ended or is late.
        """
        self._child.say(msgspec.json.encode(step).decode())
        answer = asyncio.create_task(self._answers.get())
        end = asyncio.create_task(self._child.ended())
        try:
            await asyncio.wait(
                (answer, end),
                timeout=timeout_s + STEP_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if answer.done():
                done = msgspec.json.decode(answer.result(), type=Done)
                if done.error or done.failed_blocks:
                    log = "".join(f"\n    {line}" for line in self._child.log)
                    raise NodeFailed(
                        f"{self._child.name}: {done.failed_blocks} blocks failed: {done.error}{log}"
                    )
                return done
            if end.done():
                raise NodeFailed(self._child.story())
            raise NodeFailed(f"{self._child.name} does not answer {type(step).__name__}")
        finally:
            answer.cancel()
            end.cancel()


__all__ = ["WorkerSession"]
