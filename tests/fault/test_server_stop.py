"""A server ends whole, whatever goes wrong while it does; and begins with nothing it cannot do."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.serving import Server, ServerOptions
from kvstore_daemon.source import ArenaSource
from tests.support.cluster import (
    BLOCK_BYTES,
    MIB,
    chain,
    connected,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.loops import turns


def test_rdma_without_memory_is_refused() -> None:
    endpoint = parse_endpoint("rdma://127.0.0.1:0")
    source = ArenaSource(memoryview(bytearray(MIB)))
    with pytest.raises(ConfigError, match="no memory for it"):
        Server(source, [endpoint], ServerOptions(node_id="bare"))


@pytest.mark.asyncio
@pytest.mark.parametrize("part", ["reporter", "listener", "nodes"])
async def test_one_part_that_fails_keeps_no_other_open(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail() -> None:
        raise RuntimeError("it does not end")

    async with serve(1) as (node,), connected([node]) as client:
        await open_pool(client)
        server = node.server
        assert server.connections
        parts = {
            "reporter": server.reporter,
            "listener": server._listeners[0],
            "nodes": server._nodes,
        }
        with monkeypatch.context() as patch:
            patch.setattr(parts[part], "close", fail)
            with pytest.raises(RuntimeError, match="it does not end"):
                await server.stop(0)
        assert not server.connections
        assert server._sweep is not None
        assert server._sweep.cancelled()
        timer = server.reporter._timer
        assert part == "reporter" or timer is None or timer.cancelled()


@pytest.mark.asyncio
async def test_stop_that_is_cancelled_while_it_waits_ends_at_once() -> None:
    async with serve(1) as (node,), connected([node], deadline_s=600) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, chain(2))
        node.gate.chunks_left = 0
        into = bytearray(2 * BLOCK_BYTES)
        handle = client.fetch(namespace, chain(2), into, deadline_s=600)
        await until(lambda: node.server.busy, "a request is under way")
        stopping = asyncio.ensure_future(node.server.stop(600))
        await turns()
        stopping.cancel()
        await asyncio.wait([stopping])
        assert stopping.cancelled()
        assert not node.server.connections
        node.gate.open()
        handle.cancel()
        await handle
