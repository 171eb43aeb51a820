"""The engine `null`: I/Os that do nothing, so that what is left is the cost of this tool.

Every I/O gives the loop one turn, as any real one does, and is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from kvstore_bench.engines.base import Completion, OnStep, SlotEngine, Task
from kvstore_bench.workload import Operation, Workload


class NullEngine(SlotEngine):
    """See the module."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        batch = self.job.batch
        # By the number of blocks that a store would have.
        self._reads = [
            Completion(
                [at < hits for at in range(batch)], ["hit"] * hits + ["miss"] * (batch - hits)
            )
            for hits in range(batch + 1)
        ]
        self._write = Completion([True] * batch, ["stored"] * batch)

    async def open(self, workload: Workload, on_step: OnStep) -> None:
        """Nothing to make ready."""

    def prepare(self, slot: int, operation: Operation) -> None:
        """Nothing to write."""

    def submit(self, slot: int, operation: Operation) -> Awaitable[Completion]:
        """An I/O that is done when the loop has turned once."""
        return self._turn(self._reads[operation.blocks] if operation.is_read else self._write)

    async def _turn(self, completion: Completion) -> Completion:
        await asyncio.sleep(0)
        return completion
