"""An engine that is to be killed: moves blocks between a daemon and memory that it has shared.

::

    python -m tests.support.doomedmemory URI fetch|put COUNT
"""

from __future__ import annotations

import asyncio
import sys

from tests.support.cluster import BLOCK_BYTES, chain, connected, contents, open_pool


async def move(uri: str, kind: str, count: int) -> None:
    """Begin, with more time than the test takes."""
    async with connected(uri, transport="shm", node_id="doomed") as client:
        namespace = await open_pool(client)
        region = await client.allocate(count * BLOCK_BYTES)
        keys = chain(count)
        if kind == "put":
            region.view[:] = b"".join(contents(keys))
            await client.put(namespace, keys, region.view, deadline_s=600)
        else:
            await client.fetch(namespace, keys, region.view, deadline_s=600)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    uri, kind, count = sys.argv[1:]
    asyncio.run(move(uri, kind, int(count)))
