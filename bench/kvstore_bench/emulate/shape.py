"""How large an emulated cluster is, and what its processes need. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore_bench.shaped.network import STORAGE, NodePlan, cluster_plans


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the cluster is; rates in bytes a second.

    Attributes:
        prefill, decode, storage: Nodes of each kind.
        storage_nic_Bps, compute_nic_Bps: Of each GPU node.
        rates_Bps: Others than these, by the name of a node and of a network.
    """

    prefill: int
    decode: int
    storage: int
    storage_nic_Bps: float
    compute_nic_Bps: float
    rates_Bps: Mapping[tuple[str, str], float]

    def plans(self) -> list[NodePlan]:
        """Its nodes."""
        plans = cluster_plans(
            self.prefill, self.decode, self.storage, self.storage_nic_Bps, self.compute_nic_Bps
        )
        return [
            NodePlan(
                plan.name,
                {
                    network: self.rates_Bps.get((plan.name, network), rate_Bps)
                    for network, rate_Bps in plan.rates_Bps.items()
                },
            )
            for plan in plans
        ]

    def storage_Bps(self, *kinds: str) -> float:
        """What the storage links of all nodes of some kinds carry together."""
        return sum(plan.rates_Bps[STORAGE] for plan in self.plans() if plan.name.startswith(kinds))


@dataclass(frozen=True, slots=True)
class Needs:
    """What processes must have room for.

    Attributes:
        turns_at_once: Turns under way in the whole cluster at most.
        groups: Groups of layers that a turn loads and computes step by step.
        check: Compare all bytes that decode nodes receive.
    """

    turns_at_once: int
    groups: int
    check: bool


__all__ = ["Needs", "Shape"]
