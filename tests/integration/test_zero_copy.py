"""No copy in Python between the arena and the socket, nor between the socket and the caller's
memory; and no system call per block. Counted on a real server and a real client, both in this
process, so that one trace sees both ends.

What is counted. tracemalloc sees every allocation that goes through Python's allocators: `bytes`,
`bytearray`, slices of them, what numpy and Cython modules allocate. A copy of a block has to go
somewhere, and for the time of the copy the traced memory is a block higher than before. So the
*peak* of traced memory, from just before a request until after its end, bounds the largest
object that ever lived in between: if it stays under half a block, nobody has copied one. Arena
and caller's memory were allocated before, and the kernel's copies are no memory of ours.

What `test_a_copy_would_be_seen` does with a copy on purpose, any copy would do to these tests.
"""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from kvstore.buffers import Region
from kvstore.endpoint import parse_endpoint
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.serving import Server, ServerOptions
from kvstore.transport import sockets
from kvstore.transport.base import Buffer
from kvstore.transport.sockets import SocketStream
from kvstore_client import AsyncClient, Namespace
from kvstore_daemon.source import ArenaSource
from tests.support.engine import content, key, layout
from tests.support.loops import LOOPS, run_on

MIB = 1024 * 1024
KIB = 1024
# Half a block, so that not even a copy in two parts would pass. About 350 KiB are usual: of
# those, 256 KiB are what msgpack takes for a moment to pack any message.
PEAK_BYTES_MAX = MIB // 2

LISTEN = {"tcp": "tcp://127.0.0.1:0", "unix": "unix://{directory}/store"}


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """Name of the event loop."""
    return str(request.param)


class Calls:
    """System calls of all streams, and the bytes that they moved."""

    def __init__(self) -> None:
        self.sends = self.receives = 0
        self.sent_bytes = self.received_bytes = 0

    def reset(self) -> None:
        """Count from zero."""
        self.__init__()  # type: ignore[misc]

    @property
    def total(self) -> int:
        """Calls of both kinds, those in vain included."""
        return self.sends + self.receives


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the system calls of every stream that is made from now on."""
    counted = Calls()

    class CountingStream(SocketStream):
        """A stream that counts what it asks of the kernel: each method is one call."""

        def send(self, buffers: Sequence[Buffer]) -> int:
            counted.sends += 1
            count = super().send(buffers)
            counted.sent_bytes += count
            return count

        def receive_into(self, buffers: Sequence[memoryview]) -> int:
            counted.receives += 1
            count = super().receive_into(buffers)
            counted.received_bytes += count
            return count

    monkeypatch.setattr(sockets, "SocketStream", CountingStream)
    return counted


@contextlib.asynccontextmanager
async def store(
    listen: str, arena_bytes: int, *layer_bytes: int
) -> AsyncIterator[tuple[AsyncClient, Namespace]]:
    """A server in front of an arena, and a client that has opened a namespace there."""
    region = Region(arena_bytes)
    region.touch()
    source = ArenaSource(region.view)
    server = Server(source, [parse_endpoint(listen)], ServerOptions(node_id="store"))
    await server.start()
    try:
        async with AsyncClient([str(server.endpoints[0])], node_id="engine", seed=1) as client:
            yield client, await client.open_namespace("pool", layout(*layer_bytes))
    finally:
        await server.stop(0)
        del source, server
        region.close()


@contextlib.contextmanager
def traced() -> Iterator[list[int]]:
    """Trace allocations; the list gets the peak above what there was before."""
    found: list[int] = []
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start(1)
    try:
        gc.collect()
        gc.disable()  # what is freed in between could hide what is allocated
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        yield found
        _, peak = tracemalloc.get_traced_memory()
        found.append(peak - before)
    finally:
        gc.enable()
        if not was_tracing:
            tracemalloc.stop()


async def put(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes], blocks: object
) -> None:
    """Put blocks; all must be stored."""
    handle = client.put(namespace, keys, blocks, deadline_s=60)
    result = await handle
    await handle.quiesced()
    assert result.outcomes == [PutOutcome.STORED] * len(keys), result.errors


async def fetch(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes], into: object, order: str
) -> None:
    """Fetch blocks; all must be hits."""
    handle = client.fetch(namespace, keys, into, order=order, deadline_s=60)
    result = await handle
    await handle.quiesced()
    assert result.outcomes == [FetchOutcome.HIT] * len(keys), result.errors


def memory(count: int, layer_bytes: Sequence[int], scattered: bool) -> list[object]:
    """Memory for blocks, whole or a buffer a layer."""
    if scattered:
        return [[bytearray(size) for size in layer_bytes] for _ in range(count)]
    return [bytearray(sum(layer_bytes)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "unix"])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
def test_no_object_of_block_size_is_made(
    loop: str, transport: str, scattered: bool, tmp_path: object
) -> None:
    """16 blocks of 1 MiB, put and fetched in both orders."""
    count, layer_bytes = 16, (MIB // 4,) * 4
    # A batch goes before: connections, tables and code are there when it counts.
    warm, keys = [key(1000 + n) for n in range(4)], [key(n) for n in range(count)]
    blocks = memory(count, layer_bytes, scattered)
    for name, block in zip(keys, blocks, strict=True):
        _fill(block, content(name, MIB))
    into = memory(count, layer_bytes, scattered)
    peaks = {}

    async def main() -> None:
        listen = LISTEN[transport].format(directory=tmp_path)
        async with store(listen, 32 * MIB, *layer_bytes) as (client, namespace):
            await put(client, namespace, warm, blocks[:4])
            await fetch(client, namespace, warm, into[:4], "block")
            with traced() as found:
                await put(client, namespace, keys, blocks)
            peaks["put"] = found[0]
            for order in ("block", "layer"):
                _clear(into)
                with traced() as found:
                    await fetch(client, namespace, keys, into, order)
                peaks[f"fetch by {order}"] = found[0]
                assert into == blocks

    run_on(loop, main())
    assert all(0 < peak < PEAK_BYTES_MAX for peak in peaks.values()), peaks


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sender", "receiver"])
def test_a_copy_would_be_seen(loop: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that joins its buffers before it sends, as asyncio's `writelines` does in
    CPython 3.11, or one that receives into memory of its own."""

    class JoiningStream(SocketStream):
        """Copies what it sends."""

        def send(self, buffers: Sequence[Buffer]) -> int:
            return super().send([b"".join(buffers)])

    class CopyingStream(SocketStream):
        """Copies what it receives."""

        def receive_into(self, buffers: Sequence[memoryview]) -> int:
            own = memoryview(bytearray(sum(map(len, buffers))))
            count = super().receive_into([own])
            rest = own[:count]
            for buffer in buffers:
                part = rest[: len(buffer)]
                buffer[: len(part)] = part
                rest = rest[len(part) :]
            return count

    stream = JoiningStream if where == "sender" else CopyingStream
    monkeypatch.setattr(sockets, "SocketStream", stream)
    keys = [key(number) for number in range(4)]
    blocks, into = memory(4, (MIB,), False), memory(4, (MIB,), False)

    async def main() -> list[int]:
        async with store(LISTEN["tcp"], 16 * MIB, MIB) as (client, namespace):
            with traced() as put_peak:
                await put(client, namespace, keys, blocks)
            with traced() as fetch_peak:
                await fetch(client, namespace, keys, into, "block")
            return put_peak + fetch_peak

    assert min(run_on(loop, main())) > PEAK_BYTES_MAX


@pytest.mark.parametrize("order", ["block", "layer"])
def test_small_blocks_cost_a_few_system_calls_a_batch(
    loop: str, calls: Calls, order: str, tmp_path: object
) -> None:
    """64 blocks of 4 KiB, both ends together. The bytes of a batch fit into the buffers of the
    kernel, so that the number of calls is one of requests and replies."""
    count, layer_bytes = 64, (KIB,) * 4
    keys = [key(number) for number in range(10 * count)]
    into = memory(count, layer_bytes, True)
    costs: dict[str, int] = {}

    async def main() -> None:
        listen = LISTEN["unix"].format(directory=tmp_path)
        async with store(listen, 16 * MIB, *layer_bytes) as (client, namespace):
            # The least of some rounds: load reports are pushed now and then.
            for at in range(0, len(keys), count):
                part = keys[at : at + count]
                calls.reset()
                await put(client, namespace, part, into)
                costs["put"] = min(calls.total, costs.get("put", 1 << 30))
                assert calls.sent_bytes >= count * 4 * KIB
                calls.reset()
                await fetch(client, namespace, part, into, order)
                costs["fetch"] = min(calls.total, costs.get("fetch", 1 << 30))
                assert calls.received_bytes >= count * 4 * KIB

    run_on(loop, main())
    # Sends of request and reply, their receives, and a receive in vain after some of them.
    assert max(costs.values()) <= 24, costs


@pytest.mark.slow
def test_system_calls_grow_with_bytes_and_not_with_blocks(loop: str, calls: Calls) -> None:
    """The same 4 MiB as 4, 64 and 1,024 blocks."""
    costs = {}

    async def main(count: int) -> None:
        block_bytes = 4 * MIB // count
        keys = [key(number) for number in range(count)]
        into = memory(count, (block_bytes,), False)
        async with store(LISTEN["tcp"], 16 * MIB, block_bytes) as (client, namespace):
            await put(client, namespace, keys, into)
            least = 1 << 30
            for _ in range(5):
                calls.reset()
                await fetch(client, namespace, keys, into, "block")
                least = min(least, calls.total)
            costs[count] = least

    for count in (4, 64, 1024):
        run_on(loop, main(count))
    # How the kernel cuts 4 MiB varies; a call a block would be 1,024 more.
    assert costs[1024] < costs[4] + 256, costs
    assert costs[64] < costs[4] + 64, costs


def _fill(block: object, data: bytes) -> None:
    buffers = block if isinstance(block, list) else [block]
    at = 0
    for buffer in buffers:
        buffer[:] = data[at : at + len(buffer)]
        at += len(buffer)


def _clear(blocks: Sequence[object]) -> None:
    for block in blocks:
        for buffer in block if isinstance(block, list) else [block]:
            buffer[:] = bytes(len(buffer))
