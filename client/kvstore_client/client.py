"""The client of programs with threads: one loop in the background, calls from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from kvstore.errors import KVStoreError, LocalProtocolError
from kvstore.layout import Layout
from kvstore.loadreport import LoadReport
from kvstore.messages import AckLevel, PoolInfo, Status
from kvstore_client.aio import DEADLINE_S, RETAIN_S, VIEW_LEASE_S, AsyncClient
from kvstore_client.arguments import (
    check_ack,
    check_offer,
    fetch_job,
    fetch_route,
    put_job,
)
from kvstore_client.handles import Claimed, FetchHandle, Lease, LookupResult, PutHandle
from kvstore_client.jobs import PutJob
from kvstore_client.link import closed_error
from kvstore_client.memory import Region
from kvstore_client.namespaces import Namespace
from kvstore_client.selector import Policy
from kvstore_client.transports import AUTO
from kvstore_client.views import Views

ResultT = TypeVar("ResultT")


class Client:
    """Blocks of KV-cache at one or many daemons, for engines with threads.

    `fetch` and `put` only enqueue; of what they return only `result`, `wait_layer` and
    `wait_quiet` block. The other methods block until their answer is there.

    Thread rule: any thread but the client's own, at any time between `start` and `close`.

    Args, keys, buffers and errors are those of `AsyncClient`.

    ::

        with Client("tcp://127.0.0.1:7450") as client:
            namespace = client.open_namespace("llama3-70b", layout)
            hits = client.lookup(namespace, keys).prefix
            result = client.fetch(namespace, keys[:hits], buffers).result()
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        node_id: str = "",
        token: str = "",
        deadline_s: float = DEADLINE_S,
        connect_timeout_s: float = 1.0,
        copies: int = 1,
        relays: Sequence[str] = (),
        policy: str = Policy.BALANCED,
        transport: str = AUTO,
        verify: bool = True,
        seed: int | None = None,
    ) -> None:
        self._client = AsyncClient(
            endpoints,
            node_id=node_id,
            token=token,
            deadline_s=deadline_s,
            connect_timeout_s=connect_timeout_s,
            copies=copies,
            relays=relays,
            policy=policy,
            transport=transport,
            verify=verify,
            seed=seed,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Held while something is handed to the loop, so that nothing is after `close`.
        self._gate = threading.Lock()

    def start(self) -> None:
        """Start the background loop and connect."""
        if self._thread is not None:
            raise LocalProtocolError("this client was started before")
        self._loop = uvloop.new_event_loop()
        # A daemon thread: an engine that forgets to close can still exit.
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name="kvstore-client", daemon=True
        )
        self._thread.start()
        try:
            self._wait(self._client.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect; what is under way ends as UNAVAILABLE. Harmless when called again."""
        self._check_thread()
        with self._gate:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._client.close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def __enter__(self) -> Client:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def endpoints(self) -> list[str]:
        """Normal forms of the endpoints."""
        return self._client.endpoints

    def open_namespace(self, pool: str, layout: Layout) -> Namespace:
        """See `AsyncClient.open_namespace`."""
        return self._wait(self._client.open_namespace(pool, layout))

    def lookup(
        self,
        namespaces: Namespace | Sequence[Namespace],
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        lease_s: float = 0.0,
        deadline_s: float = 1.0,
    ) -> LookupResult:
        """See `AsyncClient.lookup`."""
        return self._wait(
            self._client.lookup(
                namespaces,
                keys,
                first=first,
                chain=chain,
                lease_s=lease_s,
                deadline_s=deadline_s,
            )
        )

    def fetch(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        into: object,
        *,
        first: int = 0,
        chain: bool = True,
        layers: range | None = None,
        order: str = "block",
        group_layers: int = 1,
        deadline_s: float | None = None,
        decode_node: str = "",
        retain_for: tuple[str, int] | None = None,
        retain_s: float = RETAIN_S,
        peer: str = "",
        wait_s: float = 0.0,
    ) -> FetchHandle:
        """See `AsyncClient.fetch`."""
        job = fetch_job(
            namespace,
            keys,
            into,
            first=first,
            chain=chain,
            layers=layers,
            order=order,
            group_layers=group_layers,
            deadline_s=self._client.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
            route=fetch_route(decode_node, retain_for, retain_s, peer, wait_s),
        )
        handle = job.handle = FetchHandle(
            job.deadline_s, lambda: self._soon(job.cancel), len(job.layers)
        )
        if not self._soon(lambda: self._client.cluster.begin_fetch(job)):
            job.give_up(closed_error())
        return handle

    def put(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        blocks: object,
        *,
        first: int = 0,
        chain: bool = True,
        ack: str = AckLevel.MEMORY,
        deadline_s: float | None = None,
    ) -> PutHandle:
        """See `AsyncClient.put`."""
        level = check_ack(ack)
        job = put_job(
            namespace,
            keys,
            blocks,
            first=first,
            chain=chain,
            deadline_s=self._client.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
        )
        return self._begin_put(job, level)

    def offer(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        blocks: object,
        *,
        layers: range | None = None,
        first: int = 0,
        chain: bool = True,
        offer_s: float = RETAIN_S,
        retain_for: tuple[str, int] | None = None,
        deadline_s: float | None = None,
    ) -> PutHandle:
        """See `AsyncClient.offer`."""
        job = put_job(
            namespace,
            keys,
            blocks,
            first=first,
            chain=chain,
            deadline_s=self._client.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
            offer=check_offer(namespace, layers, offer_s, retain_for),
        )
        return self._begin_put(job, AckLevel.MEMORY)

    def claim(self, request: str, attempt: int = 0, *, lease_s: float = RETAIN_S) -> Claimed:
        """See `AsyncClient.claim`."""
        return self._wait(self._client.claim(request, attempt, lease_s=lease_s))

    def estimate_s(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        layers: range | None = None,
        decode_node: str = "",
    ) -> float:
        """See `AsyncClient.estimate_s`."""

        async def estimate() -> float:
            return self._client.estimate_s(
                namespace,
                keys,
                first=first,
                chain=chain,
                layers=layers,
                decode_node=decode_node,
            )

        return self._wait(estimate())

    def view(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        lease_s: float = VIEW_LEASE_S,
        deadline_s: float | None = None,
        verify: bool = True,
    ) -> Views:
        """See `AsyncClient.view`; `release_views` gives them back."""
        return self._wait(
            self._client.view(
                namespace,
                keys,
                first=first,
                chain=chain,
                lease_s=lease_s,
                deadline_s=deadline_s,
                verify=verify,
            )
        )

    def release_views(self, views: Views) -> bool:
        """See `Views.release`: whether what was read counts."""
        return self._wait(views.release())

    def allocate(self, size_bytes: int) -> Region:
        """See `AsyncClient.allocate`."""
        return self._wait(self._client.allocate(size_bytes))

    def register(self, buffer: object) -> Region:
        """See `AsyncClient.register`."""
        return self._wait(self._client.register(buffer))

    def free(self, region: Region) -> None:
        """See `AsyncClient.free`."""
        self._wait(self._client.free(region))

    def release(self, leases: Sequence[Lease]) -> int:
        """See `AsyncClient.release`."""
        return self._wait(self._client.release(leases))

    def delete(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
    ) -> list[bool]:
        """See `AsyncClient.delete`."""
        return self._wait(self._client.delete(namespace, keys, first=first, chain=chain))

    def status(self) -> dict[str, Status | KVStoreError]:
        """See `AsyncClient.status`."""
        return self._wait(self._client.status())

    def pools(self, pool: str = "") -> dict[str, list[PoolInfo] | KVStoreError]:
        """See `AsyncClient.pools`."""
        return self._wait(self._client.pools(pool))

    def pin_pool(self, pool: str, generation: bytes) -> dict[str, list[PoolInfo] | KVStoreError]:
        """See `AsyncClient.pin_pool`."""
        return self._wait(self._client.pin_pool(pool, generation))

    def unpin_pool(self, pool: str) -> dict[str, list[PoolInfo] | KVStoreError]:
        """See `AsyncClient.unpin_pool`."""
        return self._wait(self._client.unpin_pool(pool))

    def retire_generation(
        self, pool: str, generation: bytes
    ) -> dict[str, list[PoolInfo] | KVStoreError]:
        """See `AsyncClient.retire_generation`."""
        return self._wait(self._client.retire_generation(pool, generation))

    def set_pool_capacity(
        self, pool: str, capacity_bytes: int
    ) -> dict[str, list[PoolInfo] | KVStoreError]:
        """See `AsyncClient.set_pool_capacity`."""
        return self._wait(self._client.set_pool_capacity(pool, capacity_bytes))

    def report(self, node_id: str) -> LoadReport | None:
        """See `AsyncClient.report`."""
        return self._client.report(node_id)

    def reports(self) -> dict[str, LoadReport | None]:
        """See `AsyncClient.reports`."""
        return self._client.reports()

    def counters(self) -> dict[str, int]:
        """See `AsyncClient.counters`."""
        return self._client.counters()

    def _begin_put(self, job: PutJob, level: AckLevel) -> PutHandle:
        handle = job.handle = PutHandle(job.deadline_s, lambda: self._soon(job.cancel))
        if not self._soon(lambda: self._client.cluster.begin_put(job, level)):
            job.give_up(closed_error())
        return handle

    def _running(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is None:
            raise LocalProtocolError("this client is not started, or was closed")
        self._check_thread()
        return loop

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise LocalProtocolError(
                "called on the client's own thread, which would wait for itself"
            )

    def _soon(self, call: Callable[[], None]) -> bool:
        """Run a call on the loop; False if the client was closed: everything has ended."""
        with self._gate:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)
                return True
        return False

    def _wait(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        try:
            with self._gate:
                waiter = asyncio.run_coroutine_threadsafe(coroutine, self._running())
        except LocalProtocolError:
            coroutine.close()
            raise
        try:
            return waiter.result()
        except BaseException:
            waiter.cancel()  # interrupted: nobody would have what comes of it, memory or leases
            raise

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            # Calls of other threads that the close has overtaken: all of them fail now.
            calls = asyncio.all_tasks(loop)
            if calls:
                loop.run_until_complete(asyncio.wait(calls))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
