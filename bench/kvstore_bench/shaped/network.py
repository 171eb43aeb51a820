"""A cluster's network on one machine: nodes with shaped links, each in a namespace of its own.

::

    node prefill0                    switch                       node storage0
    ┌───────────┐   tbf    ┌───────────────────────┐    tbf    ┌───────────┐
    │  storage ─┼─────────▶│◀─ port   bridge  port ▶│◀─────────┼─ storage  │  10.1.0.0/16
    │  compute ─┼─────────▶│◀─ port   bridge       │           └───────────┘
    └───────────┘          └───────────────────────┘              10.2.0.0/16

A link is a veth pair with a token bucket at both ends: what a node sends is paced by its own
end, what it receives by the switch's. Bridges have a namespace of their own, so that nothing
has a name in the host.

How links are shaped, each with what was measured on two cores (kernel 6.18, one TCP stream of
two seconds, by the link's own counters):

- Frames of 9,000 bytes, as storage networks have them, and segmentation left to nobody
  (`gso_max_segs 1`): a bucket sees the frames of a wire. With offload the kernel hands on 64 KiB
  at a time, which blocks a link of 100 Mbit/s for 5 ms. Without it, 1,500 bytes a frame cost
  1.3 cores at 400 Mbit/s, and 9,000 cost 0.17; 3,200 Mbit/s cost 1.3, an unshaped link carries
  10 Gbit/s.
- Buckets of 2 ms. Timers of the kernel are exact enough for much smaller ones (99.9 % of
  400 Mbit/s with two frames, 99.4 % of 3,200 with a quarter of a millisecond), but not on a
  machine that is busy.
- Queues of 10 ms behind a bucket, what is beyond is dropped: that bounds what a small message
  waits behind bulk data.
- CUBIC on every route, whatever the host prefers. Figures of different hosts would differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from kvstore.errors import ConfigError
from kvstore_bench.children import stop_all
from kvstore_bench.shaped.namespaces import (
    InterfaceCounters,
    NetworkNamespace,
    ShapingUnavailable,
    first_namespace,
)
from kvstore_bench.shaped.nodes import Node

# Bytes a second of 1 Mbit/s.
MBIT = 125_000
# Names of the two networks of a PD-split cluster.
STORAGE, COMPUTE = "storage", "compute"

MTU_BYTES = 9000
# What a frame has beside its payload, as queues and counters see it.
FRAME_HEADER_BYTES = 14
BUCKET_S = 0.002
QUEUE_S = 0.010
# A bucket must hold the largest frame, or that never passes; a queue must hold what TCP sends
# at least, or slow links stand still.
BUCKET_FRAMES_MIN = 2
QUEUE_FRAMES_MIN = 4
# One process, and one veth pair a network, for each: enough for a machine.
NODES_MAX = 250
NETWORKS_MAX = 8
# tbf counts in 32 bits: bytes of a bucket, and of a queue.
RATE_BPS_MAX = 12_500_000_000

_NODE_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
# An interface has the name of its network: at most 15 bytes.
_NETWORK_NAME = re.compile(r"[a-z][a-z0-9-]{0,14}")


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node.

    Attributes:
        name: Unique.
        rates_Bps: The networks it is on, and the rate of its link to each in bytes a second, in
            each direction; 0 for a link that is not shaped.
    """

    name: str
    rates_Bps: Mapping[str, float]


def cluster_plans(
    prefill: int,
    decode: int,
    storage: int,
    storage_nic_Bps: float,
    compute_nic_Bps: float,
    storage_host_Bps: float = 0.0,
) -> list[NodePlan]:
    """The nodes of a PD-split cluster: prefill0..., decode0..., storage0...

    Args:
        storage_nic_Bps: Link of each GPU node to the storage network.
        compute_nic_Bps: Link of each GPU node to the compute network.
        storage_host_Bps: Link of each storage host; 0: not shaped, because the paper's storage
            saturates every GPU node's link and is never the limit itself.
    """
    gpu = {STORAGE: storage_nic_Bps, COMPUTE: compute_nic_Bps}
    names = [f"prefill{n}" for n in range(prefill)] + [f"decode{n}" for n in range(decode)]
    plans = [NodePlan(name, gpu) for name in names]
    return plans + [NodePlan(f"storage{n}", {STORAGE: storage_host_Bps}) for n in range(storage)]


class Link:
    """The link of one node to one network.

    Attributes:
        network: Its name.
        address: The node's address there.
        rate_Bps: Of each direction; 0 when not shaped.
    """

    def __init__(
        self,
        network: str,
        address: str,
        port: str,
        node: NetworkNamespace,
        switch: NetworkNamespace,
        queue_s: float,
    ) -> None:
        self.network = network
        self.address = address
        self.rate_Bps = 0.0
        self._port = port
        self._node = node
        self._switch = switch
        self._queue_s = queue_s

    def counters(self) -> InterfaceCounters:
        """What the node has received and sent on it, headers and acknowledgements included."""
        return self._node.counters(self.network)

    def set_rate(self, rate_Bps: float) -> None:
        """Change its rate in both directions; 0: not shaped. What is queued stays."""
        check_rate(f"rate of {self.network}", rate_Bps)
        line = self.shape(rate_Bps, self._queue_s)
        for namespace, interface in ((self._node, self.network), (self._switch, self._port)):
            if line:
                verb = "change" if self.rate_Bps else "add"
                batch = [f"qdisc {verb} dev {interface} root handle 1: {line}"]
            else:
                batch = [f"qdisc del dev {interface} root"] if self.rate_Bps else []
            if batch:
                namespace.run("tc", ["-batch", "-"], batch)
        self.rate_Bps = rate_Bps

    def cut(self) -> None:
        """Pull the cable at the switch: frames vanish in both directions, nobody is told but
        the node's interface, whose addresses and routes stay."""
        self._switch.run("ip", ["link", "set", "dev", self._port, "down"])

    def restore(self) -> None:
        """Plug it in again."""
        self._switch.run("ip", ["link", "set", "dev", self._port, "up"])

    @staticmethod
    def shape(rate_Bps: float, queue_s: float) -> str:
        """The words of `tc` for a rate; none for 0."""
        if not rate_Bps:
            return ""
        frame_bytes = MTU_BYTES + FRAME_HEADER_BYTES
        bucket_bytes = max(round(rate_Bps * BUCKET_S), BUCKET_FRAMES_MIN * frame_bytes)
        queue_bytes = max(round(rate_Bps * queue_s), QUEUE_FRAMES_MIN * frame_bytes)
        # tbf's limit holds what waits for tokens; tc's unit "bps" is bytes a second.
        return f"tbf rate {round(rate_Bps)}bps burst {bucket_bytes} limit {queue_bytes}"


class ShapedNetwork:
    """Nodes in network namespaces with shaped links, for `with` or `async with`.

    They are gone when the block is left, and also when this process ends in whatever way;
    `async with` stops what runs in the nodes first, in order, and `with` kills it.

    Thread rule: the thread that enters it must live as long as it does.

    Args:
        plans: The nodes.
        queue_s: How much a link queues before it drops.
        congestion: TCP's congestion control on all links; "" for the host's own.

    Attributes:
        nodes: By name, once entered.

    Raises:
        ConfigError: A name or a rate is impossible.
        ShapingUnavailable: On entry: this machine or user cannot do it; says what is missing.
    """

    def __init__(
        self, plans: Sequence[NodePlan], queue_s: float = QUEUE_S, congestion: str = "cubic"
    ) -> None:
        _check_plans(plans)
        self.nodes: dict[str, Node] = {}
        self._plans = plans
        self._queue_s = queue_s
        self._congestion = congestion
        self._networks = list(dict.fromkeys(name for plan in plans for name in plan.rates_Bps))
        self._namespaces: list[NetworkNamespace] = []

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def __enter__(self) -> ShapedNetwork:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> ShapedNetwork:
        # Not in a thread of a pool: holders die with the thread that started them.
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await stop_all([child for node in self.nodes.values() for child in node.children])
        finally:
            self.close()

    def close(self) -> None:
        """Kill what runs in the nodes, and let the namespaces go. Harmless when called again."""
        for node in self.nodes.values():
            for child in node.children:
                if child.status is None:
                    child.kill()
        for namespace in self._namespaces:
            namespace.close()
        self._namespaces.clear()

    def _build(self) -> None:
        switch, user = first_namespace()
        self._namespaces.append(switch)
        of_nodes = [NetworkNamespace(user) for _ in self._plans]
        self._namespaces += of_nodes
        for namespace in of_nodes:
            namespace.wait_until_ready()
        # All devices in one batch: `ip` puts the node's end of each pair where it belongs.
        lines = []
        for place, name in enumerate(self._networks):
            lines += [
                f"link add {_bridge(place)} mtu {MTU_BYTES} type bridge mcast_snooping 0",
                f"link set dev {_bridge(place)} up",
            ]
            for number, (plan, node) in enumerate(zip(self._plans, of_nodes, strict=True)):
                if name in plan.rates_Bps:
                    port = _port(number, place)
                    lines += [
                        f"link add {port} mtu {MTU_BYTES} type veth"
                        f" peer name {name} mtu {MTU_BYTES} netns {node.holder_pid}",
                        f"link set dev {port} gso_max_segs 1 master {_bridge(place)} up",
                    ]
        switch.run("ip", ["-batch", "-"], lines)
        for number, (plan, node) in enumerate(zip(self._plans, of_nodes, strict=True)):
            self.nodes[plan.name] = Node(plan.name, node, self._connect(number, plan, node, switch))

    def _connect(
        self, number: int, plan: NodePlan, node: NetworkNamespace, switch: NetworkNamespace
    ) -> dict[str, Link]:
        """Give a node its addresses and its links their rates."""
        lines = ["link set dev lo up"]
        links = {}
        for place, name in enumerate(self._networks):
            if name in plan.rates_Bps:
                subnet, address = f"10.{place + 1}.0.0/16", f"10.{place + 1}.0.{number + 1}"
                control = f"congctl {self._congestion}" if self._congestion else ""
                lines += [
                    f"link set dev {name} gso_max_segs 1 up",
                    f"address add {address}/32 dev {name}",
                    f"route add {subnet} dev {name} src {address} {control}",
                ]
                port = _port(number, place)
                links[name] = Link(name, address, port, node, switch, self._queue_s)
        node.run("ip", ["-batch", "-"], lines)
        for name, link in links.items():
            link.set_rate(plan.rates_Bps[name])
        return links


def _bridge(place: int) -> str:
    return f"bridge{place}"


def _port(number: int, place: int) -> str:
    return f"port{number}-{place}"


def _check_plans(plans: Sequence[NodePlan]) -> None:
    if not 1 <= len(plans) <= NODES_MAX:
        raise ConfigError("nodes", len(plans), f"are 1 to {NODES_MAX}")
    seen = set()
    networks = set()
    for plan in plans:
        if not _NODE_NAME.fullmatch(plan.name) or plan.name in seen:
            raise ConfigError("node", plan.name, "is a unique name of a-z, 0-9 and -, up to 31")
        seen.add(plan.name)
        for name, rate_Bps in plan.rates_Bps.items():
            if not _NETWORK_NAME.fullmatch(name) or name == "lo":
                raise ConfigError("network", name, "is a name of a-z, 0-9 and -, up to 15")
            networks.add(name)
            check_rate(f"rate of {plan.name} on {name}", rate_Bps)
    if len(networks) > NETWORKS_MAX:
        raise ConfigError("networks", len(networks), f"are at most {NETWORKS_MAX}")


def check_rate(what: str, rate_Bps: float) -> None:
    """Refuse a rate that no link can have.

    Raises:
        ConfigError: Names `what`, the rate and what is allowed.
    """
    if rate_Bps and not 1000 <= rate_Bps <= RATE_BPS_MAX:
        raise ConfigError(
            what, rate_Bps, f"is 0 (not shaped) or 1,000 to {RATE_BPS_MAX:,} bytes a second"
        )


__all__ = [
    "COMPUTE",
    "MBIT",
    "STORAGE",
    "Link",
    "NodePlan",
    "ShapedNetwork",
    "ShapingUnavailable",
    "cluster_plans",
]
