"""A real agent between real daemons and those who ask it: relay, peer, own loads, and refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvstore.errors import PermissionDenied
from kvstore.messages import Fetch, FetchOutcome, FetchSource, Retain, ServedBy
from kvstore.wire import FrameType
from kvstore_client import Namespace
from kvstore_client.placement import extents_of
from tests.support.agents import AgentNode, run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    chain,
    check_hits,
    connected,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import content, layout
from tests.support.rawpeer import RawPeer

pytestmark = pytest.mark.asyncio

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS


def relay_request(namespace: bytes, keys: list[bytes], **fields: object) -> Fetch:
    values = {
        "layer_first": 0,
        "layer_last": len(LAYERS),
        "deadline_ms": 60_000,
        "source": FetchSource.RELAY,
        "extents": extents_of([keys[at - at % 64] for at in range(len(keys))], range(len(keys))),
        **fields,
    }
    return Fetch(namespace=namespace, keys=keys, **values)  # type: ignore[arg-type]


def ask(uri: str, keys: list[bytes], **fields: object) -> tuple[bytes, bytes]:
    """Fetch from an agent by hand; runs on a thread."""
    with RawPeer(uri) as peer:
        namespace = peer.open_namespace(layout(*LAYERS))
        peer.send(FrameType.FETCH, relay_request(namespace, keys, **fields))
        return peer.take_fetch()


async def test_a_block_comes_through_an_agent() -> None:
    async with serve(2) as nodes, run_agents(nodes) as (agent,):
        keys = chain(100)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        payload, outcomes = await asyncio.to_thread(ask, agent.uri, keys)
        assert outcomes == bytes(len(keys))
        assert payload == b"".join(content(name, BLOCK_BYTES) for name in keys)
        assert agent.counter("relay_bytes_out") == len(payload)
