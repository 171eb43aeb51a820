"""The selector: keeps what one decision must know of the last, and makes plans."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.loadreport import ReportTable
from kvstore_client.selector import policies
from kvstore_client.selector.estimates import ReadQueues, direct_belief
from kvstore_client.selector.inflight import Inflight
from kvstore_client.selector.plans import Plan, Policy, Request, lay_out
from kvstore_client.selector.policies import SAMPLE_SIZE, Decision, Scene
from kvstore_client.selector.waterfill import Shares

# Random numbers that a plan takes: one for each relay that is drawn, and one to explore.
DRAWS = SAMPLE_SIZE + 1
# In one plan of so many, reported queues are not believed: a path that a wrong report makes
# look full gets something to do, and what it then does is seen.
EXPLORE_EVERY = 64


class Selector:
    """Makes plans for one client. One thread; deterministic for given draws.

    Args:
        policy: How requests are spread.
    """

    __slots__ = ("_queues", "_shares", "_turn", "policy")

    def __init__(self, policy: Policy = Policy.BALANCED) -> None:
        self.policy = policy
        self._queues = ReadQueues()
        self._shares = Shares()
        self._turn = 0

    def plan(
        self,
        request: Request,
        reports: ReportTable,
        inflight: Inflight,
        now: float,
        draws: Sequence[float],
    ) -> Plan:
        """Decide which blocks go which way.

        The caller tells the meters of `inflight` of each run that it sends (`sent`) before it
        asks for the next plan.

        Args:
            draws: `DRAWS` random numbers from [0, 1).
        """
        explore = draws[SAMPLE_SIZE] * EXPLORE_EVERY < 1.0
        up, scene = self._look(request, reports, inflight, now, draws, explore, committed=True)
        if not scene.block_count:
            return Plan([], [], 0.0, "nothing was asked for")
        decision = self._decide(scene)
        self._turn += 1
        runs, unreachable = lay_out(request.spans, up, decision.direct_blocks, decision.quotas)
        return Plan(runs, unreachable, decision.estimate_s, f"{self.policy}: {decision.reason}")

    def estimate_s(
        self,
        request: Request,
        reports: ReportTable,
        inflight: Inflight,
        now: float,
        draws: Sequence[float],
    ) -> float:
        """How long a fetch would take if it began now, without beginning one.

        For the choice between loading and computing. It knows links and queues; what a daemon
        must first read from a disk comes on top. Infinite if nothing can be reached.
        """
        _, scene = self._look(request, reports, inflight, now, draws, False, committed=False)
        return self._decide(scene).estimate_s if scene.block_count else 0.0

    def forget_relay(self, node_id: str) -> None:
        """An agent is used as a relay no more."""
        self._shares.forget(node_id)

    def _look(
        self,
        request: Request,
        reports: ReportTable,
        inflight: Inflight,
        now: float,
        draws: Sequence[float],
        explore: bool,
        committed: bool,
    ) -> tuple[list[bool], Scene]:
        up = [daemon.up for daemon in inflight.daemons]
        block_count = direct_blocks = 0
        for first, last, daemon in request.spans:
            block_count += last - first
            if up[daemon]:
                direct_blocks += last - first
        queues = None if explore else self._queues.update(now, reports, inflight.daemons)
        return up, Scene(
            request=request,
            block_count=block_count,
            direct_blocks=direct_blocks,
            direct=direct_belief(now, inflight, queues),
            reports=reports,
            inflight=inflight,
            queues=queues,
            shares=self._shares,
            now=now,
            draws=draws,
            committed=committed,
        )

    def _decide(self, scene: Scene) -> Decision:
        if self.policy is Policy.DIRECT:
            return policies.only_direct(scene)
        if self.policy is Policy.ROUND_ROBIN:
            return policies.round_robin(scene, self._turn)
        if self.policy is Policy.SHORTEST_QUEUE:
            return policies.shortest_queue(scene)
        return policies.balanced(scene)
