"""What a job of `kv` talks to: a daemon, and the agent on its path, unless they are there.

::

    path=direct    we ──────────────▶ daemon
    path=relay     we ──▶ agent ────▶ daemon      (puts go to the daemon)
    path=auto      both of these, as the client's selector decides
    path=agent     we ──▶ agent ────▶ daemon
    path=views     we ──────────────▶ daemon      (whose arena we map)

All hops of a job go the same way: by TCP, by a unix socket in a folder that ends with the job and
shared memory over it, or by RDMA.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from kvstore_bench.daemons import LOOPBACK, Command, Daemons, Servers
from kvstore_bench.engines.base import POOL
from kvstore_bench.job import Job

# What a daemon of our own has beyond the working set: puts under way, and the unfilled ends
# of an arena that blocks of another size went through.
ARENA_SPARE_BYTES = 64 * 1024 * 1024
# An agent takes no less.
AGENT_BYTES_MIN = 1024 * 1024
PAGE_BYTES = 4096
# The end of a process is known here within so long of the end of its connections.
NEWS_S, NEWS_INTERVAL_S = 1.0, 0.02


class JobServers(NamedTuple):
    """Servers of a job.

    Attributes:
        endpoints: What its clients are given.
        relays: Agents of other nodes.
        pids: Processes of all of them; empty if some are not ours.
        keep: Whether what was stored may stay, because the daemon ends with the job.
        started: Those that are ours.
    """

    endpoints: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    keep: bool = True
    started: Sequence[Servers] = ()

    def failures(self) -> str:
        """How those ended that should still run; empty if all run."""
        return "; ".join(failure for servers in self.started for failure in servers.failures())

    async def failures_soon(self) -> str:
        """The same, for a job that has failed: its end of a connection may have heard earlier of
        the end of a process than we."""
        waits = round(NEWS_S / NEWS_INTERVAL_S)
        while not (found := self.failures()) and waits:
            waits -= 1
            await asyncio.sleep(NEWS_INTERVAL_S)
        return found


def arena_bytes(job: Job) -> int:
    """Memory of the daemon that a job gets if it names none.

    It holds the working set and, where the job reads and writes, as much again for what is
    written; older writes are evicted.
    """
    round_bytes = job.io_count * _io_bytes(job)
    kinds = job.reads + job.writes
    # A job that only writes needs no spare: that it evicts is the point.
    spare = ARENA_SPARE_BYTES + 2 * job.iodepth * _io_bytes(job) if job.reads else 0
    return job.numjobs * (kinds * round_bytes + spare)


def agent_bytes(job: Job) -> int:
    """Memory of the agent: the I/Os that are under way and one more, so that it must ask the
    daemon for nearly all that it is asked for; with `held`, as much as a daemon has."""
    if job.held:
        return max(AGENT_BYTES_MIN, arena_bytes(job))
    return max(AGENT_BYTES_MIN, (job.numjobs * job.iodepth + 1) * _io_bytes(job))


@asynccontextmanager
async def servers_of(job: Job) -> AsyncIterator[JobServers]:
    """Start what a job needs; all of it ends with the block.

    Raises:
        DaemonFailed: On entry; says which of them, why, and the last lines of its log.
    """
    async with AsyncExitStack() as stack:
        folder = ""
        if _by_unix(job) or job.path == "agent":
            # Short, since the path of a socket is, and for this user alone.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbench-"))
        started: list[Servers] = []
        endpoints = job.endpoint
        if not endpoints:
            listen = listen_uri(job, folder, "kvstored")
            # Its memory may be seen by who may read all that it holds.
            options = ("--pool", POOL) if job.path == "views" else ()
            daemons = Daemons(1, arena_bytes(job), options, listen)
            started.append(await stack.enter_async_context(daemons))
            endpoints = tuple(started[0].endpoints)
        relays: tuple[str, ...] = ()
        if job.relay:
            relays = job.relay
        elif job.path in ("relay", "auto", "agent"):
            agents = Servers([_agent(job, endpoints, folder)])
            started.append(await stack.enter_async_context(agents))
            if job.path != "agent":
                relays = tuple(agents.endpoints)
            else:
                endpoints = tuple(agents.endpoints)
        pids = () if job.endpoint else tuple(pid for servers in started for pid in servers.pids)
        yield JobServers(endpoints, relays, pids, not job.endpoint, started)


def _agent(job: Job, storage: Sequence[str], folder: str) -> Command:
    words = [word for uri in storage for word in ("--storage", uri)]
    words += ["--node-id", f"kvbench-{job.path}"]
    # Daemons that were given to a job need not be reachable as our agent is.
    given = job.endpoint and job.path == "agent"
    words += ["--transport", "auto" if given else job.client_transport]
    if job.path != "agent":
        words += ["--listen", listen_uri(job, folder, "")]
    else:
        words += ["--listen", "none", "--local", f"unix://{Path(folder, 'kvagent')}"]
    return Command("kvagent", "kvstore_client.agent", words, agent_bytes(job))


def listen_uri(job: Job, folder: str, name: str) -> str:
    """Where a server of a job listens.

    Args:
        folder: For its socket, if it has one.
        name: Of that.
    """
    if _by_unix(job):
        return f"unix://{Path(folder, name)}"
    return LOOPBACK.replace("tcp", "rdma") if job.transport == "rdma" else LOOPBACK


def _by_unix(job: Job) -> bool:
    return job.transport in ("unix", "shm") or job.path == "views"


def _io_bytes(job: Job) -> int:
    """Memory that the blocks of an I/O take in an arena: whole pages each."""
    return job.batch * -(-job.bs // PAGE_BYTES) * PAGE_BYTES


__all__ = ["JobServers", "agent_bytes", "arena_bytes", "listen_uri", "servers_of"]
