"""Handles on a loop: who gives up waiting leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle
from tests.support.loops import turns

pytestmark = pytest.mark.asyncio


async def result_of(handle: AsyncFetchHandle) -> Any:
    """Await a handle."""
    return await handle


WAYS: dict[str, Callable[[AsyncFetchHandle], Coroutine[Any, Any, Any]]] = {
    "result": result_of,
    "quiesced": AsyncFetchHandle.quiesced,
    "layer": lambda handle: handle.layer(1),
}


@pytest.mark.parametrize("way", WAYS)
async def test_who_gives_up_waiting_leaves_nothing_behind(way: str) -> None:
    handle = AsyncFetchHandle(60.0, lambda: None, 4)
    wait = WAYS[way]
    staying = asyncio.ensure_future(wait(handle))
    await turns(1)
    for _ in range(8):
        task = asyncio.ensure_future(wait(handle))
        await turns(1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for future in (handle.outcome, handle.quiet):
        assert len(vars(future)["_done_callbacks"]) <= 1
    waiting = [len(end._waiters) for end in handle._ends]
    assert sum(waiting) + len(handle._layer_waiters) == 1  # who stays
    assert not staying.done()
    handle._publish_layers(4, False)
    handle._publish_outcome("the result")  # type: ignore[arg-type]
    handle.quiet.set_result(None)
    assert await staying == {"result": "the result", "quiesced": None, "layer": True}[way]
    assert await wait(handle) == await staying
    assert [len(end._waiters) for end in handle._ends] == [0, 0]
    assert not handle._layer_waiters


async def test_a_layer_is_awaited_until_it_is_there() -> None:
    handle = AsyncFetchHandle(60.0, lambda: None, 4)
    first, last = (asyncio.ensure_future(handle.layer(layer)) for layer in (0, 3))
    await turns(1)
    handle._publish_layers(2, False)
    await turns()
    assert first.done()
    assert not last.done()
    handle._publish_outcome("the result")  # type: ignore[arg-type]
    assert await first is True
    assert await last is False


async def test_a_put_is_awaited_by_several() -> None:
    handle = AsyncPutHandle(60.0, lambda: None)
    waiting = [asyncio.ensure_future(handle.quiesced()) for _ in range(3)]
    await turns(1)
    handle.quiet.set_result(None)
    await asyncio.gather(*waiting)
