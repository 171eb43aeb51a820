"""Measures what a plan costs in steady state: 64 relays, 512 blocks, reports that keep coming.

::

    $ python -m kvstore_bench.selector_cost

Needs no network. Time as the selector sees it is made up; what is measured is the time of
`plan` alone, on one thread.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence

from kvstore.loadreport import PUSH_GAP_S, LoadReport, NodeState, ReportTable, RequesterLoad
from kvstore_client.placement import EXTENT_BLOCKS
from kvstore_client.selector import (
    DRAWS,
    Inflight,
    PathMeter,
    Plan,
    Policy,
    Request,
    Selector,
    Span,
)

DAEMONS = 4
RELAYS = 64
BLOCKS = 512
BLOCK_BYTES = 32 * 1024
# A request of 16 MiB every 5 ms: three times what the node's own link carries, so that there
# is something to balance, and every fourth plan comes after new reports.
LINK_BPS = 1e9
PLAN_GAP_S = 0.005
PLANS_MAX = 10_000_000
TARGET_US = 100.0


class _Cluster:
    """Makes up the reports of daemons and relays."""

    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)
        self.reports = ReportTable()
        self.relays = [f"decode{number}" for number in range(RELAYS)]
        self.inflight = Inflight("prefill0", [f"s{n}" for n in range(DAEMONS)], self.relays)
        self._seq = itertools.count(1)
        self._boot_id = bytes(8)
        self._free_at: dict[str, float] = {}
        self._under_way: list[tuple[float, str, int]] = []
        for relay in self.relays:
            self._report(0.0, relay)
        self.push(0.0)

    def push(self, now: float) -> None:
        """New reports of all daemons, and of some relays."""
        for daemon in self.inflight.daemons:
            self._report(now, daemon.node_id)
        for relay in self.draws.sample(self.relays, RELAYS // 10):
            self._report(now, relay)

    def _report(self, now: float, node_id: str) -> None:
        loads = tuple(
            RequesterLoad(node_id=relay, queued_bytes=self.draws.randrange(1 << 24))
            for relay in (self.relays if node_id.startswith("s") else ())
        )
        report = LoadReport(
            node_id=node_id,
            boot_id=self._boot_id,
            seq=next(self._seq),
            interval_ms=200,
            state=NodeState.READY,
            requesters=loads,
            relay_queued_bytes=self.draws.randrange(1 << 24),
            willing=True,
        )
        self.reports.accept(now, report)

    def request(self) -> Request:
        """A prefix of 512 blocks over all daemons, for a decode node by chance."""
        spans = [
            Span(first, first + EXTENT_BLOCKS, first // EXTENT_BLOCKS % DAEMONS)
            for first in range(0, BLOCKS, EXTENT_BLOCKS)
        ]
        return Request(spans, BLOCK_BYTES, self.draws.choice(self.relays))

    def send(self, now: float, plan: Plan) -> None:
        """Every run of a plan goes behind what its path has already."""
        for run in plan.runs:
            size_bytes = (run.last - run.first) * BLOCK_BYTES
            end_at = max(now, self._free_at.get(run.relay, 0.0)) + size_bytes / LINK_BPS
            self._free_at[run.relay] = end_at
            heapq.heappush(self._under_way, (end_at, run.relay, size_bytes))
            self._meter(run.relay).sent(now, size_bytes)

    def receive(self, now: float) -> None:
        """Tell the meters of all that has arrived by now."""
        while self._under_way and self._under_way[0][0] <= now:
            end_at, relay, size_bytes = heapq.heappop(self._under_way)
            self._meter(relay).arrived(end_at, size_bytes)

    def _meter(self, relay: str) -> PathMeter:
        return self.inflight.relays[relay] if relay else self.inflight.direct


def measure(policy: Policy, plans: int, seed: int = 1) -> tuple[list[float], float]:
    """Microseconds of each plan, shortest first, and the share of blocks that relays got."""
    cluster = _Cluster(seed)
    selector = Selector(policy)
    taken_us = []
    relayed = 0
    push_at = 0.0
    for number in range(plans):
        now = number * PLAN_GAP_S
        cluster.receive(now)
        if now >= push_at:
            cluster.push(now)
            push_at = now + PUSH_GAP_S
        request = cluster.request()
        draws = [cluster.draws.random() for _ in range(DRAWS)]
        began_at = time.perf_counter()
        plan = selector.plan(request, cluster.reports, cluster.inflight, now, draws)
        taken_us.append((time.perf_counter() - began_at) * 1e6)
        relayed += plan.relayed_blocks()
        cluster.send(now, plan)
    return sorted(taken_us), relayed / (plans * BLOCKS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: measured, whether or not the target is met. 2: a wrong option.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_bench.selector_cost",
        description=f"Measure the time of a plan with {RELAYS} relays and {BLOCKS} blocks.",
        allow_abbrev=False,
    )
    parser.add_argument("--plans", type=int, default=20_000, metavar="N", help="of each policy")
    args = parser.parse_args(arguments)
    if not 1 <= args.plans <= PLANS_MAX:
        parser.error(f"--plans {args.plans}: is 1 to {PLANS_MAX:,}")
    print(
        f"{RELAYS} relays, {BLOCKS} blocks, {DAEMONS} daemons, {args.plans:,} plans each;"
        f" Python {platform.python_version()}\n"
    )
    print(f"{'us a plan':16}{'median':>8}{'mean':>8}{'p99':>8}{'relayed':>9}  target")
    for policy in Policy:
        taken_us, relayed = measure(policy, args.plans)
        median = statistics.median(taken_us)
        mean = statistics.fmean(taken_us)
        p99 = taken_us[int(0.99 * (len(taken_us) - 1))]
        verdict = ""
        if policy is Policy.BALANCED:
            verdict = f"<= {TARGET_US:.0f} {'met' if mean <= TARGET_US else 'missed'}"
        line = f"{policy:16}{median:8.1f}{mean:8.1f}{p99:8.1f}{relayed:9.1%}  {verdict}"
        print(line.rstrip())
    return 0


__all__ = ["main", "measure"]

if __name__ == "__main__":
    sys.exit(main())
