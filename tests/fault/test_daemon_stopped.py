"""A daemon on this host that is killed or stopped while it has a client's memory to itself.

A daemon that was stopped goes on where it was when it is continued: until then the memory is not
its owner's, however long that takes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from kvstore.errors import TransportTimeout
from kvstore.messages import FetchOutcome
from kvstore_client import AsyncClient, AsyncFetchHandle, Client, Namespace, Region
from tests.support.cluster import MIB, chain, connected, open_pool, until
from tests.support.engine import content, layout
from tests.support.links import link_of
from tests.support.memorypeer import descriptors, mappings
from tests.support.processes import Daemon, daemon
from tests.support.regions import NAME, STAIN, stain, stained
from tests.support.tree import ROOT

HIT, TIMEOUT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE
COUNT = 96
KEYS = chain(COUNT)
SIZE = COUNT * MIB
PATH = ":".join(map(str, (ROOT, ROOT / "client", ROOT / "daemon")))

pytestmark = pytest.mark.slow


@contextmanager
def kvstored(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with room for large blocks."""
    with daemon("--listen", f"unix://{tmp_path}/s", "--memory", "128MiB") as process:
        try:
            yield process
        finally:
            if process.running:
                process.signal(signal.SIGCONT)


@asynccontextmanager
async def filled(process: Daemon) -> AsyncIterator[tuple[AsyncClient, Namespace, Region]]:
    """A client, blocks that take the daemon tens of milliseconds, and memory for them."""
    async with connected(process.uri, transport="shm", deadline_s=60) as client:
        namespace = await open_pool(client, MIB)
        region = await client.allocate(SIZE)
        for index, name in enumerate(KEYS):
            region.view[index * MIB : (index + 1) * MIB] = content(name, MIB)
        handle = client.put(namespace, KEYS, region.view)
        assert (await handle).ok
        await handle.quiesced()
        yield client, namespace, region


async def stopped_halfway(
    process: Daemon,
    client: AsyncClient,
    namespace: Namespace,
    region: Region,
    deadline_s: float = 60,
) -> AsyncFetchHandle:
    """A fetch in whose middle the daemon was stopped."""
    for _ in range(10):
        stain(region)
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=deadline_s)
        await until(lambda: region.view[0] != STAIN, "the first block comes")
        process.signal(signal.SIGSTOP)
        await until(lambda: state(process) == "T", "it has stopped")
        if region.view[-1] == STAIN:
            return handle
        process.signal(signal.SIGCONT)  # it was too fast
        await handle.quiesced()
    raise AssertionError("never in the middle")


def state(process: Daemon) -> str:
    """What the kernel says of it: "T" when it is stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


async def fetch_again(client: AsyncClient, namespace: Namespace) -> None:
    """The same blocks, to other memory."""
    other = await client.allocate(SIZE)
    handle = client.fetch(namespace, KEYS, other.view)
    result = await handle
    await handle.quiesced()
    assert result.ok, result.errors
    assert bytes(other.view[-MIB:]) == content(KEYS[-1], MIB)
    del handle
    await client.free(other)


@pytest.mark.asyncio
async def test_killed_daemon_writes_nothing_any_more(tmp_path: Path) -> None:
    with kvstored(tmp_path) as process:
        async with filled(process) as (client, namespace, region):
            handle = await stopped_halfway(process, client, namespace, region)
            process.signal(signal.SIGKILL)
            result = await handle
            await handle.quiesced()
            assert UNAVAILABLE in result.outcomes
            assert set(result.outcomes) <= {HIT, UNAVAILABLE}
            for index, outcome in enumerate(result.outcomes):
                if outcome is HIT:
                    block = region.view[index * MIB : (index + 1) * MIB]
                    assert bytes(block) == content(KEYS[index], MIB)
            process.wait()
            stain(region)
            assert region.users == 0
            await client.free(region)


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel"])
@pytest.mark.parametrize("then", ["continued", "killed"])
async def test_memory_is_not_free_before_a_stopped_daemon_is_continued_or_killed(
    tmp_path: Path, then: str, end: str
) -> None:
    with kvstored(tmp_path) as process:
        async with filled(process) as (client, namespace, region):
            # Long enough for the middle to be found, short enough for a test.
            deadline_s = 1.0 if end == "deadline" else 60.0
            handle = await stopped_halfway(process, client, namespace, region, deadline_s)
            if end == "cancel":
                handle.cancel()
            result = await handle
            last = TIMEOUT if end == "deadline" else UNAVAILABLE
            assert set(result.outcomes) <= {HIT, last}
            assert last in result.outcomes
            link = link_of(client)
            await until(lambda: not link.up, "the link is given up")
            assert not handle.quiet.done()
            assert region.users == 1
            with pytest.raises(TransportTimeout, match="still in use"):
                handle.wait_quiet(0)
            if then == "killed":
                process.signal(signal.SIGKILL)
                await handle.quiesced()
                assert region.users == 0
                process.wait()
                return
            process.signal(signal.SIGCONT)
            await handle.quiesced()
            stain(region)
            await until(lambda: link.up)
            await fetch_again(client, namespace)
            assert stained(region)


@pytest.mark.asyncio
@pytest.mark.parametrize("which", ["under way", "begun when it is down"])
async def test_puts_to_a_stopped_daemon_fail_when_its_link_is_down(
    tmp_path: Path, which: str
) -> None:
    """It may yet read their memory, which is no reason to wait for the outcome, nor to keep
    those that come after from being told."""
    count, size = 20, 4096
    with kvstored(tmp_path) as process:
        async with connected(process.uri, transport="shm", deadline_s=600) as client:
            namespace = await open_pool(client, size)
            region = await client.allocate(count * size)
            link = link_of(client)
            assert (await client.put(namespace, KEYS[:1], region.view[:size])).ok
            process.signal(signal.SIGSTOP)
            views = [region.view[at * size : (at + 1) * size] for at in range(count)]
            handles = [
                client.put(namespace, chain(1, start=100 + number), [view])
                for number, view in enumerate(views[:17])
            ]
            await until(lambda: region.users >= 16, "they are under way")
            handles[0].cancel()
            await until(lambda: not link.up, "the link is given up")
            if which == "under way":
                await until(handles[1].poll, "the outcome of one that was under way")
            else:
                late = client.put(namespace, chain(1, start=200), views[17:18])
                await until(late.poll, "the outcome of one that nobody was asked for")
            process.signal(signal.SIGCONT)
            del views


@pytest.mark.asyncio
async def test_client_of_a_stopped_daemon_can_be_closed(tmp_path: Path) -> None:
    before = descriptors("self").count("socket")
    with kvstored(tmp_path) as process:
        async with filled(process) as (client, namespace, region):
            view = region.view[:]
            handle = await stopped_halfway(process, client, namespace, region)
            await client.close()
            assert handle.poll()
            assert view[-1] == STAIN  # it is there, since somebody may write into it yet
            process.signal(signal.SIGCONT)
        async with connected(process.uri, transport="shm", deadline_s=60) as other:
            await fetch_again(other, await open_pool(other, MIB))
        # Nobody could say when, so it never is; and nothing waits for that.
        assert not handle.quiet.done()
        assert descriptors("self").count("socket") == before
        del view


def test_client_with_threads_can_be_closed_too(tmp_path: Path) -> None:
    with kvstored(tmp_path) as process:
        client = Client(process.uri, transport="shm", deadline_s=60)
        client.start()
        namespace = client.open_namespace("pool", layout(MIB))
        region = client.allocate(MIB)
        assert client.put(namespace, KEYS[:1], region.view).result().ok
        process.signal(signal.SIGSTOP)
        handle = client.fetch(namespace, KEYS[:1], region.view)
        client.close()
        assert handle.result().outcomes == [UNAVAILABLE]
        assert not handle.quiet.done()


@pytest.mark.asyncio
async def test_others_go_on_while_a_client_is_stopped(tmp_path: Path) -> None:
    """A client that has stopped reads no news; its daemon serves everybody else."""
    with kvstored(tmp_path) as process:
        async with filled(process) as (client, namespace, _):
            command = ["-m", "tests.support.doomedmemory", process.uri, "put", "8"]
            doomed = await asyncio.create_subprocess_exec(
                sys.executable, *command, env={**os.environ, "PYTHONPATH": PATH}
            )
            try:
                await until(lambda: mappings(process.pid, NAME)[1:], "both share")
                doomed.send_signal(signal.SIGSTOP)
                await fetch_again(client, namespace)
            finally:
                doomed.kill()
                await doomed.wait()
            await until(lambda: len(mappings(process.pid, NAME)) == 1, "its memory is unmapped")
            await fetch_again(client, namespace)
