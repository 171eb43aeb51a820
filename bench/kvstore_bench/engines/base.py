"""The seam of the engines, and the loop that keeps `iodepth` I/Os in flight."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from kvstore.errors import KVStoreError
from kvstore_bench.job import Job
from kvstore_bench.meter import Meter, Travelled, clock_ns
from kvstore_bench.pacing import Pacer
from kvstore_bench.workload import Operation, Workload

#: Where jobs keep their blocks.
POOL = "kvbench"

#: Told (what is done now, how much of it, of how much) while a job is set up.
OnStep = Callable[[str, int, int], None]


class JobFailed(KVStoreError):
    """Raised when a job cannot begin or go on; says why."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one clone of a job is told.

    Attributes:
        clone: Its number, from 0.
        run: Unique to this run, so that its keys are fresh.
        endpoints: Daemons, or the agent of our node; empty where the engine needs none.
        relays: Agents of other nodes, by which all that is read is to come.
        server_pids: Processes of all of them, if they are ours.
        keep: Whether what was stored may stay, because the daemons end anyway.
    """

    job: Job
    clone: int = 0
    run: str = ""
    endpoints: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    server_pids: tuple[int, ...] = ()
    keep: bool = True


class Completion(msgspec.Struct, frozen=True):
    """How one I/O ended.

    Attributes:
        good: For each block, whether it was read and is right, or was stored.
        outcomes: The outcome of each block, as a word.
        error: Why the job should not go on; empty otherwise.
        travelled: How its bytes came or went.
        verify_us: What a server's comparison with the checksums took, of views.
        first_ns: When the first group of layers was there; 0 if there are no groups, or if not
            all of it came.
    """

    good: Sequence[bool]
    outcomes: Sequence[str]
    error: str = ""
    travelled: Sequence[Travelled] = ()
    verify_us: int = 0
    first_ns: int = 0


class Engine(ABC):
    """Does the I/O of one clone. Lives on one loop; every I/O in flight has a slot.

    Memory of block size is allocated in `open` and reused; no I/O allocates any.

    Attributes:
        server_pids: Processes whose time is the servers'; known after `open`.
    """

    server_pids: Sequence[int] = ()

    @abstractmethod
    async def open(self, workload: Workload, on_step: OnStep) -> None:
        """Required. Make everything ready: memory, connections, the working set.

        Raises:
            JobFailed: It cannot be made ready; says why.
        """

    @abstractmethod
    async def run(self, workload: Workload, meter: Meter) -> None:
        """Required. Do I/Os until the workload or the meter says that it is over."""

    async def settle(self, workload: Workload, meter: Meter, on_step: OnStep) -> None:
        """Not required. After the run: check what was written, remove what was stored."""
        return None

    async def close(self) -> None:
        """Not required. Give everything back, whatever happened before."""
        return None


class SlotEngine(Engine):
    """An engine whose I/Os are independent of each other: `iodepth` slots, one I/O each.

    Args:
        task: What to do.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.job: Job = task.job

    @abstractmethod
    def prepare(self, slot: int, operation: Operation) -> None:
        """Required. Before an I/O, outside of its time: the memory of a write."""

    @abstractmethod
    def submit(self, slot: int, operation: Operation) -> Awaitable[Completion]:
        """Required. Begin an I/O; the time that this call takes is `slat`."""

    async def release(self, slot: int) -> None:
        """Not required. After an I/O, outside of its time: wait until its memory is free."""

    def check(self, slot: int, operation: Operation, good: Sequence[bool]) -> int:
        """Not required. Blocks of a read that are not what was written."""
        return 0

    async def run(self, workload: Workload, meter: Meter) -> None:
        """Keep all slots busy until it is over; with a rate, as busy as that asks for."""
        start_ns, end_ns = meter.start()
        pacer = None
        if self.job.io_interval_s:
            pacer = Pacer(self.job, self.task.clone, start_ns, end_ns)
        try:
            async with asyncio.TaskGroup() as group:
                for slot in range(self.job.iodepth):
                    group.create_task(self._keep_busy(slot, workload, meter, pacer))
        finally:
            if pacer is not None:
                pacer.close()
        meter.finish()

    async def _keep_busy(
        self, slot: int, workload: Workload, meter: Meter, pacer: Pacer | None
    ) -> None:
        """One I/O after the other, each in its turn, until it is over."""
        while not meter.over(now := clock_ns()):
            waited_ns = 0
            if pacer is not None:
                due_ns = await pacer.turn()
                if due_ns is None:
                    return
                if meter.over(now := clock_ns()):
                    break
                waited_ns = now - due_ns
            counts = meter.counts(now)
            operation = workload.next(counts)
            if operation is not None:
                await self._do(slot, operation, meter, counts, waited_ns)
            if pacer is not None and (operation is None or meter.error):
                pacer.close()
            if operation is None:
                return
        if pacer is not None:
            meter.behind_ns = max(meter.behind_ns, pacer.behind_ns)

    async def _do(
        self, slot: int, operation: Operation, meter: Meter, counts: bool, waited_ns: int
    ) -> None:
        bs, is_read = self.job.bs, operation.is_read
        self.prepare(slot, operation)
        began = clock_ns()
        pending = self.submit(slot, operation)
        submitted = clock_ns()
        done = await pending
        ended = clock_ns()
        await self.release(slot)
        good_count = sum(done.good)
        if counts:
            times = (began, submitted, ended)
            short = good_count < operation.blocks
            meter.completed(is_read, times, good_count * bs, short, waited_ns)
            meter.outcomes.update(done.outcomes)
            if done.first_ns:
                meter.first_came(waited_ns + done.first_ns - began)
            meter.travelled(is_read, done.travelled)
            meter.verify_us += done.verify_us
        meter.seen(is_read, good_count * bs, ended)
        if is_read and self.job.verify:
            meter.checked_blocks += good_count
            wrong = self.check(slot, operation, done.good)
            meter.wrong_blocks += wrong
            if wrong:
                meter.error = f"{wrong} blocks of I/O {operation.number} hold wrong bytes"
        if is_read and good_count > operation.blocks:
            meter.error = meter.error or f"I/O {operation.number}: a block that was never stored"
        meter.error = meter.error or done.error
