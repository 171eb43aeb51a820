"""A client in a node of a shaped network: told what to load on its input, says how it went.

::

    parent ──▶ worker    Setup, then any number of Fill, Load and Reports, one line of JSON each
    worker ──▶ parent    Done, one line of JSON, for each of them

Rule: standard output belongs to these lines alone. The worker ends when its input does, and in
any case when its parent does.

One `AsyncClient` for each policy is kept from step to step, so that what a policy has learnt of
the links is there when its next turn comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import sys
import time
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import uvloop

from kvstore.buffers import Region
from kvstore.errors import KVStoreError
from kvstore.layout import Layout
from kvstore.loadreport import LoadReport, ReportTable
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_bench.content import BlockContent
from kvstore_bench.shaped.clients import DIRECT, start_client
from kvstore_client import AsyncClient, Namespace

POOL = "shaped"
KEY_BYTES = 16


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Who the client is, and what its requests look like.

    Attributes:
        endpoints, relays: Of daemons, and of agents that may relay.
        decode_node: The relay that is preferred; node id.
        request_blocks: Blocks of one fetch, a prefix of its own.
        depth: Fetches under way at once, at most.
    """

    endpoints: tuple[str, ...]
    node_id: str
    layer_bytes: tuple[int, ...]
    request_blocks: int
    depth: int = 1
    relays: tuple[str, ...] = ()
    decode_node: str = ""
    deadline_s: float = 60.0


class Fill(msgspec.Struct, frozen=True, tag=True):
    """Store prefixes 0 to `prefixes`."""

    prefixes: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """Fetch in a closed loop, `depth` fetches at once, each the next of the prefixes in turn.

    Attributes:
        policy: Of the selector; "relay" sends everything by the relay.
        prefixes: How many were stored.
        count: Fetches; 0 for as many as fit into the time.
        warm_s: Time before that which counts.
        seconds: Time that counts.
        check: Compare the bytes of each fetch with what was stored; in a closed loop that
            takes the processor from the others.
    """

    policy: str
    prefixes: int
    depth: int = 1
    count: int = 0
    warm_s: float = 0.0
    seconds: float = 0.0
    check: bool = False


class Reports(msgspec.Struct, frozen=True, tag=True):
    """Say which load reports have come, and forget them."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How a step went.

    Attributes:
        elapsed_s: Of each fetch that counts: all whose time lies in part within that of the
            step.
        ended_at: When each of them ended, by the clock of the host.
        bytes, seconds: What has arrived within the time of the step, and that time.
        path_bytes: Of all fetches that count, by path, from their beginning to their end.
        failed_blocks: Blocks that are no hits or have wrong bytes.
        error: Why, or why the step could not be done.
        estimates_s, plans: What the selector said of each fetch that counts.
        arrivals: Of load reports: node id, boot id in hexadecimal, seq, and when it came, by
            the clock of the host.
    """

    elapsed_s: list[float] = []
    ended_at: list[float] = []
    bytes: int = 0
    seconds: float = 0.0
    path_bytes: dict[str, int] = {}
    failed_blocks: int = 0
    error: str = ""
    estimates_s: list[float] = []
    plans: list[str] = []
    arrivals: list[tuple[str, str, int, float]] = []


Step = Setup | Fill | Load | Reports


def prefix_keys(prefix: int, count: int) -> list[bytes]:
    """The keys of a prefix; no two share a block."""
    names = (f"{prefix}/{index}".encode() for index in range(count))
    return [hashlib.blake2b(name, digest_size=KEY_BYTES).digest() for name in names]


class _Arrivals(ReportTable):
    """Notes when each report came, also of those that are older than what is known."""

    __slots__ = ("noted",)

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, str, int, float]] = []

    def accept(self, now: float, report: LoadReport) -> bool:
        at = time.monotonic()
        self.noted.append((report.node_id, report.boot_id.hex(), report.seq, at))
        return super().accept(now, report)


class _Fetched(msgspec.Struct):
    """One fetch that is over."""

    ended_at: float
    elapsed_s: float
    size_bytes: int
    path_bytes: dict[str, int]
    estimate_s: float
    plan: str

    def share(self, first_at: float, last_at: float) -> float:
        """Which part of its time lay within these times.

        Its bytes are taken to have come evenly. What ends within a time would be another
        measure, and a wrong one: fetches that run side by side end together, so that those of
        one turn more or less than there were turns would be counted.
        """
        began_at = self.ended_at - self.elapsed_s
        within_s = min(self.ended_at, last_at) - max(began_at, first_at)
        return max(0.0, within_s) / self.elapsed_s if self.elapsed_s else 0.0


class Worker:
    """The client, its memory and what it knows.

    Args:
        setup: See `Setup`.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._block_bytes = sum(setup.layer_bytes)
        self._request_bytes = setup.request_blocks * self._block_bytes
        self._region = Region(setup.depth * self._request_bytes, "shaped")
        self._region.touch()
        self._content = BlockContent(self._block_bytes)
        self._clients: dict[str, tuple[AsyncClient, Namespace]] = {}
        self._arrivals: list[_Arrivals] = []
        self._numbers = itertools.count()

    async def close(self) -> None:
        """Disconnect."""
        for client, _ in self._clients.values():
            await client.close()

    async def do(self, step: Step) -> Done:
        """Do one step."""
        match step:
            case Fill():
                return await self._fill(step)
            case Load():
                return await self._load(step)
            case Reports():
                noted = [one for table in self._arrivals for one in table.noted]
                for table in self._arrivals:
                    table.noted.clear()
                return Done(arrivals=noted)
        return Done()

    async def _client(self, policy: str) -> tuple[AsyncClient, Namespace]:
        if policy not in self._clients:
            setup = self._setup
            arrivals = None
            if policy == DIRECT:
                # Policies that choose relays read their table; here nobody does.
                arrivals = _Arrivals()
                self._arrivals.append(arrivals)
            client = await start_client(
                policy, setup.endpoints, setup.relays, setup.node_id, arrivals
            )
            layout = Layout(
                model_id="shaped", dtype="uint8", block_tokens=16, layer_bytes=setup.layer_bytes
            )
            # Closed with all others, should the namespace be refused.
            self._clients[policy] = client, Namespace(POOL, layout)
            await client.open_namespace(POOL, layout)
        return self._clients[policy]

    def _slot(self, place: int) -> memoryview:
        return self._region.view[place * self._request_bytes : (place + 1) * self._request_bytes]

    def _blocks(self, place: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self._slot(place), np.uint8).reshape(-1, self._block_bytes)

    async def _fill(self, step: Fill) -> Done:
        client, namespace = await self._client(DIRECT)
        for prefix in range(step.prefixes):
            keys = prefix_keys(prefix, self._setup.request_blocks)
            self._content.fill(self._blocks(0), keys)
            handle = client.put(
                namespace, keys, self._slot(0), ack="memory", deadline_s=self._setup.deadline_s
            )
            result = await handle
            await handle.quiesced()
            failed = len(keys) - result.outcomes.count(PutOutcome.STORED)
            if failed:
                return Done(failed_blocks=failed, error=f"not stored: {result.errors}")
        return Done(bytes=step.prefixes * self._request_bytes)

    async def _load(self, step: Load) -> Done:
        client, namespace = await self._client(step.policy)
        began_at = time.monotonic()
        counts_from = began_at + step.warm_s
        stop_at = counts_from + step.seconds if not step.count else float("inf")
        left = iter(range(step.count) if step.count else itertools.count())
        fetched: list[_Fetched] = []
        under_way: dict[int, float] = {}
        problems: Counter[str] = Counter()

        def goes_on() -> bool:
            # Until all that began in time has ended: what is last must not have the links for
            # itself.
            now = time.monotonic()
            return now < stop_at or any(began < stop_at for began in under_way.values())

        async def keep_fetching(place: int) -> None:
            while goes_on() and next(left, None) is not None:
                under_way[place] = time.monotonic()
                keys = prefix_keys(next(self._numbers) % step.prefixes, self._setup.request_blocks)
                one = await self._fetch(client, namespace, keys, place, step, problems)
                del under_way[place]
                fetched.append(one)

        async with asyncio.TaskGroup() as group:
            for place in range(step.depth):
                group.create_task(keep_fetching(place))
        if step.count:
            stop_at = max((one.ended_at for one in fetched), default=began_at)
        counted = [one for one in fetched if one.share(counts_from, stop_at)]
        path_bytes: Counter[str] = Counter()
        for one in counted:
            path_bytes.update(one.path_bytes)
        return Done(
            elapsed_s=[one.elapsed_s for one in counted],
            ended_at=[one.ended_at for one in counted],
            bytes=round(sum(one.size_bytes * one.share(counts_from, stop_at) for one in counted)),
            seconds=stop_at - counts_from,
            path_bytes=dict(path_bytes),
            failed_blocks=problems.total(),
            error="; ".join(problems),
            estimates_s=[one.estimate_s for one in counted],
            plans=[one.plan for one in counted],
        )

    async def _fetch(
        self,
        client: AsyncClient,
        namespace: Namespace,
        keys: list[bytes],
        place: int,
        step: Load,
        problems: Counter[str],
    ) -> _Fetched:
        relayed: dict[str, Any] = {}
        if step.policy != DIRECT:
            relayed["decode_node"] = self._setup.decode_node
        began_at = time.monotonic()
        handle = client.fetch(
            namespace, keys, self._slot(place), deadline_s=self._setup.deadline_s, **relayed
        )
        result = await handle
        ended_at = time.monotonic()
        await handle.quiesced()
        failed = len(keys) - result.outcomes.count(FetchOutcome.HIT)
        if failed:
            problems[", ".join(map(str, result.errors)) or "blocks are missing"] += failed
        elif step.check:
            wrong = int(self._content.wrong(self._blocks(place), keys).sum())
            if wrong:
                problems["wrong bytes"] += wrong
        path_bytes: Counter[str] = Counter()
        for run in result.runs:
            path_bytes[run.path] += run.bytes
        return _Fetched(
            ended_at,
            ended_at - began_at,
            result.bytes,
            dict(path_bytes),
            result.estimate_s,
            result.plan,
        )


async def work() -> None:
    """Do what comes on standard input until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb"))
    worker: Worker | None = None
    try:
        while line := await reader.readline():
            step = msgspec.json.decode(line, type=Step)
            try:
                if isinstance(step, Setup):
                    worker, done = Worker(step), Done()
                else:
                    assert worker is not None, "the first line is a Setup"
                    done = await worker.do(step)
            except* (KVStoreError, OSError) as errors:
                done = Done(error="; ".join(str(error) for error in errors.exceptions))
            sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
            sys.stdout.flush()
    finally:
        if worker is not None:
            await worker.close()


def main() -> int:
    """Run the worker until its input ends."""
    logging.basicConfig(format="worker: %(message)s", level=logging.WARNING)
    # uvloop and no debug mode, as in `kvstore_bench.worker`.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        runner.run(work())
    return 0


if __name__ == "__main__":
    sys.exit(main())
