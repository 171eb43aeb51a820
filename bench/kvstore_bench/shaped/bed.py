"""One prefill node, one decode node that relays and one storage host, ready to measure loads.

The storage host is filled from within, so that its link is idle and nothing waits for it. The
decode node's agent is there if somebody shall use it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore_bench.shaped.network import COMPUTE, STORAGE, NodePlan, ShapedNetwork, cluster_plans
from kvstore_bench.shaped.nodes import AGENT_PORT, Node, NodeFailed
from kvstore_bench.shaped.session import WorkerSession
from kvstore_bench.shaped.worker import Done, Fill, Load, Setup

MIB = 1024 * 1024
# Blocks as of 16 tokens of a model of some ten billion parameters.
LAYER_BYTES = (64 * 1024,) * 16
BLOCK_BYTES = sum(LAYER_BYTES)
# An agent that had room for all prefixes would relay from its memory. One request more than are
# under way leaves it room to work. Of all that is fetched in turn, sixteen times as much, a policy
# that relays a quarter of it, and every third fetch only, still finds nothing there.
_AGENT_REQUESTS_MORE = 1
_PREFIXES_PER_AGENT_REQUEST = 16


@dataclass(frozen=True, slots=True)
class BedPlan:
    """What is measured on.

    Attributes:
        request_bytes: Of one fetch; whole blocks.
        depth: Fetches under way at once.
        relay: Whether the decode node's agent runs.
        storage_nic_Bps, compute_nic_Bps: Links of GPU nodes; both 0: all nodes are one, so
            that everything goes over its loopback interface.
        queue_s: Of each link.
        prefix_count: Requests that are stored; 0 for as many as any policy needs to find nothing
            in the agent's memory.
    """

    request_bytes: int
    depth: int
    relay: bool
    storage_nic_Bps: float
    compute_nic_Bps: float
    queue_s: float
    prefix_count: int = 0

    @property
    def agent_bytes(self) -> int:
        """Memory of the agent."""
        return (self.depth + _AGENT_REQUESTS_MORE) * self.request_bytes

    @property
    def prefixes(self) -> int:
        """Requests that are stored, and fetched in turn."""
        count = (self.depth + _AGENT_REQUESTS_MORE) * _PREFIXES_PER_AGENT_REQUEST
        return self.prefix_count or count

    @property
    def daemon_bytes(self) -> int:
        """Memory of the daemon: all prefixes, and as much again for its own overhead."""
        return self.prefixes * self.request_bytes + 64 * MIB


@dataclass(frozen=True, slots=True)
class Sample:
    """One load, and what links have carried meanwhile, headers included; all of its time.

    Attributes:
        prefill_bytes: From storage to the prefill node.
        decode_bytes: From storage to the decode node.
        compute_bytes: From the decode node to the prefill node.
    """

    done: Done
    prefill_bytes: int
    decode_bytes: int
    compute_bytes: int

    @property
    def rate_Bps(self) -> float:
        """Payload bytes a second."""
        return self.done.bytes / self.done.seconds if self.done.seconds else 0.0

    @property
    def relay_share(self) -> float:
        """Of the payload, what did not come directly."""
        total = sum(self.done.path_bytes.values())
        return 1 - self.done.path_bytes.get("direct", 0) / total if total else 0.0


class Bed:
    """The nodes, the daemon, perhaps the agent, and a worker on the prefill node."""

    def __init__(
        self, plan: BedPlan, prefill: Node, decode: Node, storage: Node, worker: WorkerSession
    ) -> None:
        self.plan = plan
        self.prefill = prefill
        self.decode = decode
        self.storage = storage
        self.worker = worker

    async def load(
        self,
        policy: str,
        *,
        count: int = 0,
        warm_s: float = 0.0,
        seconds: float = 0.0,
        check: bool = False,
    ) -> Sample:
        """One `Load` at the depth of the plan.

        Raises:
            NodeFailed: As `WorkerSession.do`.
        """
        step = Load(
            policy=policy,
            prefixes=self.plan.prefixes,
            depth=self.plan.depth,
            count=count,
            warm_s=warm_s,
            seconds=seconds,
            check=check,
        )
        before = self.carried()
        done = await self.worker.do(step, warm_s + seconds)
        if not done.elapsed_s:
            raise NodeFailed(f"no fetch has ended within {seconds:g} s: measure for longer")
        carried = (after - at for after, at in zip(self.carried(), before, strict=True))
        return Sample(done, *carried)

    def carried(self) -> tuple[int, int, int]:
        """What links have carried so far, in the order of the fields of `Sample`."""
        prefill, decode = self.prefill.links, self.decode.links
        return (
            prefill[STORAGE].counters().received_bytes,
            decode[STORAGE].counters().received_bytes,
            prefill[COMPUTE].counters().received_bytes,
        )


@asynccontextmanager
async def bed(plan: BedPlan) -> AsyncIterator[Bed]:
    """Build it, fill it, and take it down again.

    Raises:
        ShapingUnavailable: This machine or user cannot shape links; says what is missing.
        NodeFailed: A process has failed; says why.
    """
    if plan.storage_nic_Bps or plan.compute_nic_Bps:
        plans = cluster_plans(1, 1, 1, plan.storage_nic_Bps, plan.compute_nic_Bps)
    else:
        plans = [NodePlan("host", {STORAGE: 0, COMPUTE: 0})]
    async with ShapedNetwork(plans, plan.queue_s) as network:
        nodes = list(network.nodes.values())
        prefill, decode, storage = nodes if len(nodes) == 3 else nodes * 3
        await storage.daemon(STORAGE, str(plan.daemon_bytes))
        relays = await _start_agent(plan, decode, storage) if plan.relay else ()
        await fill(storage, plan)
        setup = worker_setup(plan, prefill.name, storage, relays, decode.name)
        yield Bed(plan, prefill, decode, storage, await WorkerSession.start(prefill, setup))


async def _start_agent(plan: BedPlan, decode: Node, storage: Node) -> tuple[str, ...]:
    uri = decode.uri(COMPUTE, AGENT_PORT)
    await decode.serve(
        "kvstore_client.agent",
        [
            *("--storage", storage.uri(STORAGE), "--listen", uri, "--insecure"),
            *("--memory", str(plan.agent_bytes), "--node-id", decode.name),
        ],
    )
    return (uri,)


def worker_setup(
    plan: BedPlan, node_id: str, storage: Node, relays: Sequence[str] = (), decode_node: str = ""
) -> Setup:
    """The setup of a worker that loads from the storage host."""
    return Setup(
        endpoints=(storage.uri(STORAGE),),
        node_id=node_id,
        layer_bytes=LAYER_BYTES,
        request_blocks=plan.request_bytes // BLOCK_BYTES,
        depth=plan.depth,
        relays=tuple(relays),
        decode_node=decode_node if relays else "",
    )


async def fill(storage: Node, plan: BedPlan) -> None:
    """Store all prefixes, by a worker on the storage host itself."""
    filler = await WorkerSession.start(storage, worker_setup(plan, "filler", storage))
    await filler.do(Fill(plan.prefixes))
    await filler.stop()


__all__ = ["BLOCK_BYTES", "MIB", "Bed", "BedPlan", "Sample", "bed", "fill", "worker_setup"]
