"""The engine `kv`: the client library against daemons, as an inference engine would use it.

An I/O is one fetch or one put of `batch` blocks that form a prefix. Reads are verified against the
checksums of the writer, by the client or, in memory that it shares, by who wrote into it; that is
part of `clat`. The memory of an I/O is reused as soon as its handle is quiet. With path=views a
read leases the blocks where they lie, and gives them back; with verify=1 it copies them out in
between. With layout=layer the memory of an I/O is `[layer, block, bytes]`, and a block as many
pieces of it. Bytes that come by another transport than the job asks for end it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Collection, Sequence

from kvstore.buffers import Region
from kvstore.errors import KVStoreError
from kvstore.layout import Layout
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_bench.engines.base import POOL, Completion, JobFailed, OnStep, SlotEngine, Task
from kvstore_bench.job import Job
from kvstore_bench.meter import Meter, Travelled, clock_ns
from kvstore_bench.models import MODELS
from kvstore_bench.relayed import POLICY, relay_all, relay_known
from kvstore_bench.workload import Contents, Keys, Operation, Words, Workload
from kvstore_client import AsyncClient, AsyncFetchHandle, AsyncPutHandle, Namespace, Run
from kvstore_client.selector import Policy

# The working set is stored with this many puts under way, whatever iodepth is.
PRELOAD_DEPTH_MAX = 4
# Deletes under way at once, so that a daemon that others use too is not held up.
DELETES_MAX = 8
# A server that the job has started listens, but the first connection to it may be too slow for the
# client's patience: an emulated processor that imports a library. What was given is there or not.
CONNECT_TIMEOUT_S = 20.0
CONNECT_INTERVAL_S = 0.1
# With these the client hands its memory to peers.
SHARING_TRANSPORTS = ("auto", "shm", "rdma")

_FETCH_WORDS = {outcome: outcome.name.lower() for outcome in FetchOutcome}
_PUT_WORDS = {outcome: outcome.name.lower() for outcome in PutOutcome}
# A miss or a full arena is an answer; after these a number would say nothing.
_FETCH_ERRORS = {FetchOutcome.CORRUPT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE}
_PUT_ERRORS = {PutOutcome.CORRUPT, PutOutcome.TIMEOUT, PutOutcome.UNAVAILABLE}


def layout(job: Job) -> Layout:
    """The layout of a job's blocks."""
    model = MODELS.get(job.model)
    return Layout(
        model_id=job.model or "kvbench",
        dtype=model.dtype if model else "uint8",
        block_tokens=job.page_tokens if model else 16,
        layer_bytes=(job.bs // job.layers,) * job.layers,
    )


class KvEngine(SlotEngine):
    """See the module."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        job = self.job
        self.server_pids = task.server_pids
        self._client = AsyncClient(
            list(task.endpoints),
            node_id=f"kvbench-{job.name}-{task.clone}"[:64],
            deadline_s=job.deadline,
            relays=task.relays,
            policy=POLICY if job.path == "relay" else Policy.BALANCED,
            transport=job.client_transport,
            verify=job.verify_checksums,
        )
        self._keys = Keys(task.run, job, task.clone)
        # How many pieces of a block lie apart in our memory.
        self._parts = job.layers if job.layout == "layer" else 1
        # Of the first group that comes, where there is more than one.
        grouped = job.order == "layer" and job.group_layers < job.layers
        self._first_layers = job.group_layers if grouped else 0
        self._contents = Contents(job.bs, job.batch, job.randseed, self._parts)
        self._slots: list[memoryview] = []
        self._pieces: list[list[list[memoryview]]] = []
        self._words: list[Words] = []
        self._handles: list[AsyncFetchHandle | AsyncPutHandle | None] = [None] * job.iodepth
        self._namespace: Namespace
        self._opened = False
        self._whole = [True] * job.batch
        self._hit = ["hit"] * job.batch
        self._stored = ["stored"] * job.batch

    async def open(self, workload: Workload, on_step: OnStep) -> None:
        """Touch the memory, connect, store the working set."""
        job, client = self.job, self._client
        size_bytes = job.iodepth * job.io_bytes
        shares = job.client_transport in SHARING_TRANSPORTS
        if not shares:
            region = Region(size_bytes, "kvbench")
            region.touch()
            self._lay_out(region.view)
        await client.start()
        self._opened = True
        try:
            await self._reach()
            if shares:
                self._lay_out((await client.allocate(size_bytes)).view)
            self._namespace = await client.open_namespace(POOL, layout(job))
        except KVStoreError as error:
            raise JobFailed(str(error)) from error
        await self._preload(workload, on_step)

    async def _reach(self) -> None:
        """Wait until all servers have answered; those that are not ours are asked once."""
        ends_at = time.monotonic() + (CONNECT_TIMEOUT_S if self.task.server_pids else 0.0)
        while missing := await self._missing():
            if time.monotonic() >= ends_at:
                raise JobFailed(missing)
            await asyncio.sleep(CONNECT_INTERVAL_S)

    async def _missing(self) -> str:
        """Which servers have not answered, and why; empty if all have."""
        found = await self._client.status()
        failed = [f"{uri}: {said}" for uri, said in found.items() if isinstance(said, Exception)]
        if self.task.relays and not failed:
            try:
                (relay_all if self.job.path == "relay" else relay_known)(self._client)
            except KVStoreError as error:
                failed.append(str(error))
        return "; ".join(failed)

    def _lay_out(self, memory: memoryview) -> None:
        io_bytes = self.job.io_bytes
        self._slots = [
            memory[at : at + io_bytes] for at in range(0, self.job.iodepth * io_bytes, io_bytes)
        ]
        if self._parts > 1:
            self._pieces = [self._scattered(slot) for slot in self._slots]
        self._words = [self._contents.words(slot) for slot in self._slots]
        for words in self._words:
            self._contents.fill(words)

    def _scattered(self, slot: memoryview) -> list[list[memoryview]]:
        """The layers of each block of an I/O, where its memory is `[layer, block, bytes]`."""
        batch, size = self.job.batch, self.job.bs // self._parts
        places = range(0, self._parts * batch * size, batch * size)
        return [
            [slot[at + block * size : at + (block + 1) * size] for at in places]
            for block in range(batch)
        ]

    def _memory(self, slot: int, blocks: int) -> object:
        """Memory of the first blocks of an I/O, as the client takes it."""
        if self._pieces:
            return self._pieces[slot][:blocks]
        return self._slots[slot][: blocks * self.job.bs]

    async def close(self) -> None:
        """Disconnect."""
        if self._opened:
            await self._client.close()

    def prepare(self, slot: int, operation: Operation) -> None:
        """A write gets the numbers of its blocks; a read needs nothing."""
        if not operation.is_read:
            if self.job.reads:  # reads leave other blocks in this memory
                self._contents.fill(self._words[slot])
            self._contents.stamp(self._words[slot], operation.number)

    def submit(self, slot: int, operation: Operation) -> Awaitable[Completion]:
        """Begin a fetch or a put."""
        # What is read and was never stored is asked for too: it must be a miss.
        blocks = self.job.batch if operation.is_read else operation.blocks
        keys = self._keys.of_io(operation.number, blocks)
        if operation.is_read and self.job.path == "views":
            self._handles[slot] = None
            return self._viewed(slot, keys)
        if operation.is_read:
            fetch = self._client.fetch(
                self._namespace,
                keys,
                self._memory(slot, blocks),
                order=self.job.order,
                group_layers=self.job.group_layers,
            )
            self._handles[slot] = fetch
            return self._fetched(fetch)
        memory = self._memory(slot, blocks)
        put = self._client.put(self._namespace, keys, memory, ack=self.job.ack)
        self._handles[slot] = put
        return self._put(put)

    async def release(self, slot: int) -> None:
        """Wait until no peer can touch the slot's memory."""
        handle = self._handles[slot]
        if handle is not None and not handle.quiet.done():
            await handle.quiesced()

    def check(self, slot: int, operation: Operation, good: Sequence[bool]) -> int:
        """Compare what was read with what was written."""
        return len(self._contents.wrong_blocks(self._words[slot], operation.number, good))

    async def settle(self, workload: Workload, meter: Meter, on_step: OnStep) -> None:
        """Read back what a job that only writes has stored; remove all that was stored."""
        if self.job.verify and not self.job.reads and not meter.error:
            await self._read_back(workload.last_written, meter, on_step)
        if not self.task.keep and not meter.error:
            await self._remove(workload.numbers_end, on_step)

    # --- the two kinds of I/O --------------------------------------------------------------

    async def _fetched(self, handle: AsyncFetchHandle) -> Completion:
        first_ns = 0
        if self._first_layers and await handle.layer(self._first_layers - 1):
            first_ns = clock_ns()
        result = await handle
        travelled, wrong = self._travelled(result.runs)
        if result.ok:
            return Completion(self._whole, self._hit, wrong, travelled, first_ns=first_ns)
        return Completion(
            [outcome == FetchOutcome.HIT for outcome in result.outcomes],
            [_FETCH_WORDS[outcome] for outcome in result.outcomes],
            _complaint("read", result.outcomes, _FETCH_ERRORS, result.errors) or wrong,
            travelled,
        )

    async def _put(self, handle: AsyncPutHandle) -> Completion:
        result = await handle
        travelled, wrong = self._travelled(result.runs)
        if result.outcomes.count(PutOutcome.STORED) == len(result.outcomes):
            return Completion(self._whole, self._stored, wrong, travelled)
        return Completion(
            [outcome == PutOutcome.STORED for outcome in result.outcomes],
            [_PUT_WORDS[outcome] for outcome in result.outcomes],
            _complaint("write", result.outcomes, _PUT_ERRORS, result.errors) or wrong,
            travelled,
        )

    async def _viewed(self, slot: int, keys: Sequence[bytes]) -> Completion:
        job = self.job
        views = await self._client.view(self._namespace, keys, verify=job.verify_checksums)
        if job.verify:
            for at, block in zip(range(0, job.io_bytes, job.bs), views.blocks, strict=True):
                if block is not None:
                    self._slots[slot][at : at + job.bs] = block
                del block
        outcomes = [_FETCH_WORDS[outcome] for outcome in views.outcomes]
        error = _complaint("view", views.outcomes, _FETCH_ERRORS, views.errors)
        # Blocks under a lease that was lost may have been anything.
        if not await views.release() and not error:
            outcomes = [word if word != "hit" else "lost" for word in outcomes]
        good = [word == "hit" for word in outcomes]
        travelled = [Travelled("views", "shm", sum(good) * job.bs)]
        return Completion(good, outcomes, error, travelled, views.verify_us)

    def _travelled(self, runs: Sequence[Run]) -> tuple[Sequence[Travelled], str]:
        """How the bytes of an I/O came or went, and what is wrong with that."""
        travelled = [Travelled(run.path, run.transport, run.bytes) for run in runs if run.bytes]
        return travelled, unasked(self.job, travelled)

    # --- before and after ------------------------------------------------------------------

    async def _preload(self, workload: Workload, on_step: OnStep) -> None:
        count = workload.preload_count
        numbers = iter(range(count))
        done = 0

        async def keep_putting(slot: int) -> None:
            nonlocal done
            for number in numbers:
                operation = Operation(False, number, workload.stored_blocks(number))
                done += 1
                if not operation.blocks:
                    continue
                self.prepare(slot, operation)
                completion = await self.submit(slot, operation)
                await self.release(slot)
                if completion.error and all(completion.good):
                    raise JobFailed(f"the working set: {completion.error}")
                if not all(completion.good):
                    raise JobFailed(
                        f"the working set cannot be stored: block {number * self.job.batch} and"
                        f" following are {', '.join(sorted(set(completion.outcomes)))}"
                        f" ({completion.error or 'size must fit into the daemon'})"
                    )
                on_step("store working set", done * self.job.io_bytes, count * self.job.io_bytes)

        slots = range(min(self.job.iodepth, PRELOAD_DEPTH_MAX))
        results = await asyncio.gather(*map(keep_putting, slots), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _read_back(self, numbers: Collection[int], meter: Meter, on_step: OnStep) -> None:
        for position, number in enumerate(numbers, 1):
            operation = Operation(True, number, self.job.batch)
            completion = await self.submit(0, operation)
            await self.release(0)
            meter.checked_blocks += sum(completion.good)
            meter.wrong_blocks += self.check(0, operation, completion.good)
            meter.error = meter.error or completion.error
            io_bytes = self.job.io_bytes
            on_step("read back", position * io_bytes, len(numbers) * io_bytes)
        if meter.wrong_blocks:
            meter.error = f"{meter.wrong_blocks} blocks read back hold wrong bytes"

    async def _remove(self, io_count: int, on_step: OnStep) -> None:
        # An I/O at a time: its keys lie where the first of them says.
        for first in range(0, io_count, DELETES_MAX):
            last = min(io_count, first + DELETES_MAX)
            deletes = [
                self._client.delete(self._namespace, self._keys.of_io(number))
                for number in range(first, last)
            ]
            await asyncio.gather(*deletes, return_exceptions=True)
            on_step("remove blocks", last * self.job.io_bytes, io_count * self.job.io_bytes)


def unasked(job: Job, travelled: Sequence[Travelled]) -> str:
    """Why bytes that came like that are not those of a job that asks for a transport; empty if
    they are."""
    option = "transport" if job.transport != "auto" else "require_transport"
    asked = {job.transport} if job.transport != "auto" else set(job.require_transport)
    others = sorted({run.transport for run in travelled} - asked) if asked else []
    if not others:
        return ""
    said = f"{option}={','.join(sorted(asked))}"
    return f"bytes travelled by {', '.join(others)}: {said} was asked for"


def _complaint(
    what: str,
    outcomes: Sequence[FetchOutcome] | Sequence[PutOutcome],
    errors: set[FetchOutcome] | set[PutOutcome],
    reasons: Sequence[Exception],
) -> str:
    """Why a job should not go on after these outcomes; empty if it may."""
    bad = [outcome for outcome in outcomes if outcome in errors]
    if not bad:
        return ""
    reason = "; ".join(map(str, reasons)) or "no reason was given"
    return f"{what}: {len(bad)} of {len(outcomes)} blocks {bad[0].name}: {reason}"
