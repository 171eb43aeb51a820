"""Processes that move payload by RDMA, on the same verbs as the test.

As a program it is an engine that is to be killed in the middle of a fetch or a put::

    python -m tests.support.rdmaprocesses URI fetch|put COUNT BLOCK_BYTES
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from kvstore.transport import verbs as verbs_module
from kvstore.transport.verbs import Verbs
from tests.support.cluster import chain, connected, contents, open_pool
from tests.support.fakeverbs import VARIABLE, FakeVerbs
from tests.support.processes import AgentProcess, Daemon, agent, daemon
from tests.support.verbsends import the_verbs

#: The address is that of the sockets; queue pairs find each other by gids.
LISTEN = "rdma://127.0.0.1:0"
# Python takes seconds to start where the processor is imitated.
_PATIENCE_S = 60.0


class _FakedDaemon(Daemon):
    """A `kvstored` on the imitation of verbs."""

    runner = ("tests.support.fakeverbs",)


class _FakedAgent(AgentProcess):
    """A `kvagent` on the imitation of verbs."""

    runner = ("tests.support.fakeverbs",)


def environment_of(verbs: Verbs) -> dict[str, str]:
    """What a process needs to find these verbs, and all that this one can import."""
    found = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}
    if isinstance(verbs, FakeVerbs):
        found[VARIABLE] = str(verbs.directory)
    return found


@contextmanager
def rdma_daemon(verbs: Verbs, *options: str, listen: str = LISTEN) -> Iterator[Daemon]:
    """Run `kvstored` on these verbs."""
    kind = _FakedDaemon if isinstance(verbs, FakeVerbs) else Daemon
    environment = environment_of(verbs)
    with daemon("--listen", listen, *options, environment=environment, kind=kind) as process:
        yield process


@contextmanager
def rdma_agent(verbs: Verbs, *options: str) -> Iterator[AgentProcess]:
    """Run `kvagent` on these verbs."""
    kind = _FakedAgent if isinstance(verbs, FakeVerbs) else AgentProcess
    environment = environment_of(verbs)
    with agent("--listen", LISTEN, *options, environment=environment, kind=kind) as process:
        yield process


@asynccontextmanager
async def doomed(
    verbs: Verbs, uri: str, kind: str, count: int, block_bytes: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """An engine in a process of its own, when it has moved all blocks once; it goes on until it
    is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.rdmaprocesses",
        *(uri, kind, str(count), str(block_bytes)),
        env={**os.environ, **environment_of(verbs)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            assert await process.stdout.readline() == b"moved\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _move(uri: str, kind: str, count: int, block_bytes: int) -> None:
    """Move blocks, again and again."""
    async with connected(uri, transport="rdma", node_id="doomed") as client:
        namespace = await open_pool(client, block_bytes)
        region = await client.allocate(count * block_bytes)
        keys = chain(count)
        if kind == "put":
            region.view[:] = b"".join(contents(keys, block_bytes))
        while True:
            begin = client.put if kind == "put" else client.fetch
            handle = begin(namespace, keys, region.view, deadline_s=600)
            result = await handle
            assert result.ok, (result.outcomes, result.errors)
            await handle.quiesced()
            os.write(1, b"moved\n")
            if kind == "put":
                await client.delete(namespace, keys)


if __name__ == "__main__":
    found = the_verbs()
    verbs_module.system_verbs = lambda: found  # type: ignore[assignment]
    asyncio.run(_move(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
