"""A link that comes up again is another session, which what the old one keeps costs nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import TransportError
from kvstore_client import link as link_module
from kvstore_client.linkmemory import SharedMemory
from tests.support.cluster import (
    BLOCK_BYTES,
    chain,
    open_pool,
    store_blocks,
    until,
)
from tests.support.fakeverbs import FakeVerbs
from tests.support.links import cut, link_of, on_one_host, reconnected
from tests.support.loops import turns
from tests.support.rdmaserved import served

COUNT = 8
KEYS = chain(COUNT)


@pytest.mark.asyncio
async def test_link_that_comes_up_again_is_another_session(tmp_path: Path) -> None:
    async with on_one_host(tmp_path, "auto") as (node, client):
        (before,) = node.server.sessions
        cut(client)
        await reconnected(client)
        await until(lambda: len(node.server.sessions) == 1, "the old one is gone")
        (after,) = node.server.sessions
        assert after != before
        assert len(node.server.sessions[after].connections) == 3


@pytest.mark.asyncio
async def test_old_connections_that_the_server_still_has(system: FakeVerbs) -> None:
    """Their end got lost in the network."""
    async with served((BLOCK_BYTES,), transport="auto") as (_, client, _):
        link = link_of(client)
        await until(lambda: link.memory is not None, "rdma")
        assert link._channels is not None
        kept = [os.dup(one.stream.fileno()) for one in link._channels]  # so no FIN is sent
        try:
            cut(client)
            await until(lambda: link.up, "the link is up again")
            assert link.memory is not None, "the stream is used"
            assert link.memory.transport == "rdma"
        finally:
            for fd in kept:
                os.close(fd)


@pytest.mark.asyncio
async def test_way_whose_carriers_were_lost_before_it_was_made_is_settled(tmp_path: Path) -> None:
    """The peer closes a connection between its WELCOME and the agreement."""
    async with on_one_host(tmp_path) as (_, client):
        link = link_of(client)
        await until(lambda: link.up, "the link")
        channels = link._channels
        assert channels is not None
        cut(client)

        async def ask(*request: object) -> None:
            raise TransportError("lost")

        memory = SharedMemory(
            asyncio.get_running_loop(),
            client.cluster.regions,
            channels.control,
            (channels.fetch, channels.put),
            ask,  # type: ignore[arg-type]
            False,
        )
        memory.close()
        await turns()
        assert memory.settled.done(), "it never will be"
        await until(lambda: link.up, "again")


@pytest.mark.asyncio
async def test_memory_that_an_old_link_keeps_costs_no_new_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer of then hangs, and another daemon has its place: what was given up then was never
    asked of the new one."""
    loop, grace_s = asyncio.get_running_loop(), 3600
    real, over = loop.call_later, list[Callable[[], None]]()

    def call_later(delay_s: float, call: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        if delay_s == grace_s:
            over.append(partial(call, *args))
        return real(delay_s, call, *args)

    monkeypatch.setattr(link_module, "CANCEL_GRACE_S", grace_s)
    monkeypatch.setattr(loop, "call_later", call_later)
    async with on_one_host(tmp_path) as (node, client):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        region = await client.allocate(COUNT * BLOCK_BYTES)
        node.gate.chunks_left = 0
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: region.users == 1, "it is under way")
        link = link_of(client)
        old = link.memory
        assert isinstance(old, SharedMemory)
        monkeypatch.setattr(old, "_ended", lambda: None)
        handle.cancel()
        await until(lambda: over, "it waits for the last word")
        cut(client)
        await until(lambda: link.up, "the link is up again")
        channels = link._channels
        assert region.users == 1
        for check in over:
            check()
        assert link._channels is channels, link.last_error
        old.settled.set_result(None)
        await handle.quiesced()
        node.gate.open()
