"""Plays conversations against daemons, as an engine would: look up, fetch, compute, put.

Each conversation is one task at a time: a request is sent when the one before it has ended, at
once; think times are left out. `concurrency` conversations run side by side. What an engine
would compute, the bytes of the missing blocks, is made from their keys, and what is fetched is
compared with what its keys say.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore_bench.content import BlockContent
from kvstore_bench.replay.plan import Conversation, Plan
from kvstore_bench.trace import Request, block_key
from kvstore_client import AsyncClient, FetchOutcome, Namespace, PutOutcome

# A longer prompt is fetched, and put, in several requests one after the other. Two such
# buffers a conversation must fit beside the daemon.
WINDOW_BYTES_MAX = 128 * 1024 * 1024
# From the lookup until the last of its hits has arrived.
LEASE_S = 60.0
POOL = "kvbench-replay"
# Work on less than this takes a fraction of a millisecond, about as long as the way to another
# thread and back.
ASIDE_BYTES_MIN = 1024 * 1024

ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class Played:
    """How one request went.

    Attributes:
        turn: Place in its conversation, from 0.
        blocks, tokens: Length of the prompt.
        block_tokens: Tokens a block.
        hits: Leading blocks that lookup promised.
        used: Leading blocks that arrived and were right: what an engine would go on from.
        wrong: Blocks that were said to be hits and held other bytes.
        read_bytes, written_bytes: Payload that travelled.
        lookup_s: Time of the lookup.
        fetch_s, put_s: Time until the outcome; None where nothing was fetched or put.
        fetched: Blocks by outcome.
        put: Blocks by outcome.
        unreachable: Whether a daemon did not answer the lookup.
        errors: What went wrong, as text.
    """

    turn: int
    blocks: int
    tokens: int
    block_tokens: int
    hits: int = 0
    used: int = 0
    wrong: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    lookup_s: float = 0.0
    fetch_s: float | None = None
    put_s: float | None = None
    fetched: Counter[FetchOutcome] = field(default_factory=Counter)
    put: Counter[PutOutcome] = field(default_factory=Counter)
    unreachable: bool = False
    errors: list[str] = field(default_factory=list)


class BusyTime:
    """Adds up the time in which at least one of several is at work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.total_s = 0.0
        self._clock = clock
        self._count = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._count == 0:
            self._since = self._clock()
        self._count += 1

    def __exit__(self, *error: object) -> None:
        self._count -= 1
        if self._count == 0:
            self.total_s += self._clock() - self._since


class Player:
    """Plays a plan.

    Args:
        client: Connected.
        plan: What to play.
        run_id: Blocks of another run id are not found.
        concurrency: Conversations side by side.
        deadline_s: Of each fetch and each put.
        verify: Whether to compare what was fetched.
        on_played: Told of each request when it has ended.

    Attributes:
        fetching: Time in which something was being fetched.
        putting: Time in which something was being put.
    """

    def __init__(
        self,
        client: AsyncClient,
        plan: Plan,
        *,
        run_id: str,
        concurrency: int,
        deadline_s: float,
        verify: bool,
        on_played: Callable[[Played], None],
    ) -> None:
        self._client = client
        self._plan = plan
        self._run_id = run_id
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self._verify = verify
        self._on_played = on_played
        self._namespaces: dict[int, Namespace] = {}
        self._contents: dict[int, BlockContent] = {}
        self._clock = asyncio.get_running_loop().time
        self.fetching = BusyTime(self._clock)
        self.putting = BusyTime(self._clock)

    async def play(self) -> None:
        """Play all of it.

        Raises:
            RefusedError: A daemon does not open the namespace.
        """
        for block_tokens in self._plan.block_sizes:
            layout = self._plan.layout(block_tokens, self._run_id)
            self._namespaces[block_tokens] = await self._client.open_namespace(POOL, layout)
            self._contents[block_tokens] = BlockContent(self._plan.block_bytes(block_tokens))
        waiting = iter(self._plan.conversations)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(self._plan.conversations))):
                group.create_task(self._work(waiting))

    async def _work(self, waiting: Iterator[Conversation]) -> None:
        largest = max(self._plan.block_bytes(tokens) for tokens in self._plan.block_sizes)
        size = max(largest, min(WINDOW_BYTES_MAX, self._plan.longest_bytes))
        # Written to, so that its pages are there before anything is timed.
        memory = np.full(size, 255, np.uint8)
        for conversation in waiting:
            for turn, request in enumerate(conversation.requests):
                self._on_played(await self._request(conversation, turn, request, memory))

    async def _request(
        self,
        conversation: Conversation,
        turn: int,
        request: Request,
        memory: npt.NDArray[np.uint8],
    ) -> Played:
        block_tokens = conversation.block_tokens
        played = Played(turn, len(request.hash_ids), request.input_tokens, block_tokens)
        if not request.hash_ids:
            return played
        keys = [block_key(conversation.scope, hash_id) for hash_id in request.hash_ids]
        started_at = self._clock()
        found = await self._client.lookup(
            self._namespaces[block_tokens], keys, lease_s=LEASE_S, deadline_s=self._deadline_s
        )
        played.lookup_s = self._clock() - started_at
        played.unreachable = bool(found.unreachable)
        played.hits = played.used = found.prefix
        if found.prefix:
            await self._fetch(keys[: found.prefix], memory, played)
        if found.leases:
            await self._client.release(found.leases)
        if played.used < len(keys):
            await self._put(keys, memory, played)
        return played

    def _windows(self, played: Played, first: int, last: int) -> Iterator[range]:
        """Runs of blocks that fit the memory."""
        step = max(1, WINDOW_BYTES_MAX // self._plan.block_bytes(played.block_tokens))
        for start in range(first, last, step):
            yield range(start, min(start + step, last))

    async def _fetch(
        self, keys: Sequence[bytes], memory: npt.NDArray[np.uint8], played: Played
    ) -> None:
        content = self._contents[played.block_tokens]
        namespace = self._namespaces[played.block_tokens]
        played.fetch_s = 0.0
        for window in self._windows(played, 0, len(keys)):
            into = memory[: len(window) * content.block_bytes].reshape(len(window), -1)
            if self._verify:
                # The turn before left the same blocks here: a hit that brought nothing
                # would look right.
                await _aside(into.nbytes, into.fill, 0xFF)
            with self.fetching:
                handle = self._client.fetch(
                    namespace,
                    keys[: window.stop],
                    into,
                    first=window.start,
                    deadline_s=self._deadline_s,
                )
                result = await handle
                await handle.quiesced()
            played.fetch_s += result.elapsed_s
            played.read_bytes += result.bytes
            played.fetched.update(result.outcomes)
            played.errors += map(str, result.errors)
            hit = np.array([outcome is FetchOutcome.HIT for outcome in result.outcomes])
            right = hit
            if self._verify:
                wanted = keys[window.start : window.stop]
                wrong = await _aside(into.nbytes, content.wrong, into, wanted)
                played.wrong += int(np.count_nonzero(hit & wrong))
                right = hit & ~wrong
            if not right.all():
                played.used = min(played.used, window.start + int(np.argmin(right)))

    async def _put(
        self, keys: Sequence[bytes], memory: npt.NDArray[np.uint8], played: Played
    ) -> None:
        content = self._contents[played.block_tokens]
        namespace = self._namespaces[played.block_tokens]
        played.put_s = 0.0
        for window in self._windows(played, played.used, len(keys)):
            blocks = memory[: len(window) * content.block_bytes].reshape(len(window), -1)
            await _aside(blocks.nbytes, content.fill, blocks, keys[window.start : window.stop])
            with self.putting:
                handle = self._client.put(
                    namespace,
                    keys[: window.stop],
                    blocks,
                    first=window.start,
                    deadline_s=self._deadline_s,
                )
                result = await handle
                await handle.quiesced()
            played.put_s += result.elapsed_s
            played.written_bytes += result.bytes
            played.put.update(result.outcomes)
            played.errors += map(str, result.errors)


async def _aside(size_bytes: int, work: Callable[..., ResultT], *arguments: object) -> ResultT:
    """Run what takes long on another thread, so that it does not hold up other requests."""
    if size_bytes < ASIDE_BYTES_MIN:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


__all__ = ["POOL", "BusyTime", "Played", "Player"]
