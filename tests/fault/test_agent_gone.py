"""An engine whose own agent is killed: nothing hangs, and it is back when the agent is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvstore.messages import FetchOutcome, PutOutcome
from tests.support.cluster import (
    chain,
    check_hits,
    connected,
    contents,
    open_pool,
    room,
    store_blocks,
    until,
)
from tests.support.processes import agent, daemon

pytestmark = pytest.mark.slow


@pytest.mark.asyncio
async def test_an_engine_without_its_agent_computes_until_that_is_back(tmp_path: Path) -> None:
    keys = chain(8)
    with daemon() as storage:
        words = ["--storage", storage.uri, "--node-id", "n", f"--local=unix://{tmp_path}/a.sock"]
        with agent(*words, listeners=2) as first:
            async with connected(first.uris[1]) as engine:
                namespace = await open_pool(engine)
                await store_blocks(engine, namespace, keys)
                os.kill(first.pid, signal.SIGKILL)
                await until(lambda: not engine.cluster._links[0].up)
                result = await engine.fetch(namespace, keys, room(8))
                assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 8
                assert "a.sock" in str(result.errors[0])
                put = await engine.put(namespace, keys, contents(keys))
                assert put.outcomes == [PutOutcome.UNAVAILABLE] * 8
                found = await engine.lookup(namespace, keys)
                assert (found.prefix, len(found.unreachable)) == (0, 1)
                with agent(*words, listeners=2):
                    await until(lambda: engine.cluster._links[0].up)
                    into = room(8)
                    handle = engine.fetch(namespace, keys, into)
                    result = await handle
                    await handle.quiesced()
                    check_hits(result, keys, into)
                    assert result.ok, result.errors
                    assert engine.counters()["reconnects"] == 1
