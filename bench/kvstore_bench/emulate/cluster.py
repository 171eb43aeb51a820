"""The cluster of an emulation: nodes with shaped links, and what runs in them for one policy.

::

    storage0     kvstored                            on the storage network
    prefill0     kvagent ◀── unix socket ── engine   on both; loads by both paths
    decode0      kvagent ◀── unix socket ── engine   on both; relays, pulls from prefill nodes

The network stays from policy to policy; daemons, agents and engines are started anew, so that none
finds anything in memory that another one has loaded.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from kvstore.errors import KVStoreError
from kvstore_bench.children import stop_all
from kvstore_bench.emulate.session import EngineSession
from kvstore_bench.emulate.shape import Needs
from kvstore_bench.emulate.steps import Setup
from kvstore_bench.emulate.work import Work
from kvstore_bench.shaped.network import COMPUTE, STORAGE
from kvstore_bench.shaped.nodes import AGENT_PORT, Node, NodeFailed
from kvstore_client import AsyncClient
from kvstore_client.selector import Policy

MIB = 1024 * 1024
# Of a daemon: index, and blocks of two puts of one key.
DAEMON_SLACK_BYTES = 64 * MIB
# Half of an agent's memory may be leased to requests under way, and fills need room beside.
AGENT_FACTOR = 3
AGENT_BYTES_MIN = 96 * MIB
# Counters of an agent, by which it tells how long the choice of paths took.
_PLANS = re.compile(r"storage_plans_(?:within_(\d+)us|later)")


class Running:
    """Daemons, agents and engines of one policy.

    Attributes:
        prefill, decode: Engines by the name of their node.
        peers: Where the agent of a node is found by others.
        locals: Where it is found here, by its socket.
    """

    def __init__(self) -> None:
        self.prefill: dict[str, EngineSession] = {}
        self.decode: dict[str, EngineSession] = {}
        self.peers: dict[str, str] = {}
        self.locals: dict[str, str] = {}

    async def plans(self) -> dict[float, int]:
        """How many choices of paths took how long in all agents; see `Played.plans`.

        Raises:
            KVStoreError: An agent does not answer.
        """
        found: Counter[float] = Counter()
        for uri in self.locals.values():
            async with AsyncClient(uri) as client:
                (status,) = (await client.status()).values()
            if isinstance(status, KVStoreError):
                raise status
            for name, count in status.counters.items():
                match = _PLANS.fullmatch(name)
                if match is not None:
                    found[float(match[1] or "inf")] += count
        return dict(found)


@asynccontextmanager
async def running(
    nodes: Mapping[str, Node], policy: str, work: Work, needs: Needs
) -> AsyncIterator[Running]:
    """Start everything for one policy; end it when the block is left.

    Raises:
        NodeFailed: A process ended, or is late; says why.
    """
    of_kind = {
        kind: [node for name, node in nodes.items() if name.startswith(kind)]
        for kind in ("prefill", "decode", "storage")
    }
    gpu = of_kind["prefill"] + of_kind["decode"]
    per_node = -(-needs.turns_at_once // min(len(of_kind["prefill"]), len(of_kind["decode"])))
    memory_bytes = (per_node + 1) * work.longest_bytes
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_stop_all, list(nodes.values()))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbench-")))
        await _all(
            node.daemon(STORAGE, str(_daemon_bytes(work, len(of_kind["storage"]))))
            for node in of_kind["storage"]
        )
        storage = [node.uri(STORAGE) for node in of_kind["storage"]]
        found = Running()
        found.locals = {node.name: f"unix://{home / node.name}.sock" for node in gpu}
        found.peers = {node.name: node.uri(COMPUTE, AGENT_PORT) for node in gpu}
        relays = [found.peers[node.name] for node in of_kind["decode"]]
        agent_bytes = max(AGENT_BYTES_MIN, AGENT_FACTOR * memory_bytes)
        await _all(
            _start_agent(node, policy, storage, relays, agent_bytes, home / f"{node.name}.sock")
            for node in gpu
        )
        for kind, engines in (("prefill", found.prefill), ("decode", found.decode)):
            for node in of_kind[kind]:
                setup = Setup(
                    agent=found.locals[node.name],
                    block_tokens=work.block_tokens,
                    layer_bytes=work.layer_bytes,
                    groups=needs.groups,
                    memory_bytes=memory_bytes,
                    check=needs.check,
                )
                engines[node.name] = await EngineSession.start(node, setup)
        yield found


async def _start_agent(
    node: Node,
    policy: str,
    storage: Sequence[str],
    relays: Sequence[str],
    memory_bytes: int,
    local: Path,
) -> None:
    own = node.uri(COMPUTE, AGENT_PORT)
    rate_Bps = node.links[COMPUTE].rate_Bps
    # What a turn hits comes from storage, as in the paper, whose nodes have no cache before it.
    words = ["--listen", own, "--insecure", "--local", f"unix://{local}", "--drop-idle"]
    words += ["--node-id", node.name, "--memory", str(memory_bytes), "--policy", policy]
    for uri in storage:
        words += ["--storage", uri]
    # A decode node loads nothing for its own engine that another one might relay.
    if own not in relays and policy != Policy.DIRECT:
        for uri in relays:
            words += ["--relay", uri]
    if rate_Bps:
        words += ["--link-rate", f"{round(rate_Bps * 8)}bit/s", "--interface", COMPUTE]
    await node.serve("kvstore_client.agent", words)


def _daemon_bytes(work: Work, daemons: int) -> int:
    # Extents fall where their keys say: up to twice the average.
    share = work.new_bytes if daemons == 1 else 2 * work.new_bytes // daemons
    pages = 4096 / min(work.block_bytes, 4096)  # a block takes whole pages
    return int(share * pages) + share // 10 + DAEMON_SLACK_BYTES


async def _all(starting: Iterable[Coroutine[Any, Any, Any]]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for one in starting:
                group.create_task(one)
    except* NodeFailed as errors:
        raise errors.exceptions[0] from None


async def _stop_all(nodes: Sequence[Node]) -> None:
    """Of each node the last that was started first: engines before agents."""
    for node in reversed(nodes):
        await stop_all(node.children)
        node.children.clear()


__all__ = ["Running", "running"]
