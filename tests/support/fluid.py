"""A client, its paths and nothing else: bytes flow at rates that the test gives, no clock runs.

Each path serves its blocks one after the other, as one long stream does.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvstore.loadreport import LoadReport, NodeState, ReportTable
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

MIB = 1024 * 1024

# Rates of all paths, given those that have something to send ("" is direct).
Rates = Callable[[set[str]], Mapping[str, float]]

# A node's report, given its id, a number that grows, and what it has waiting.
Report = Callable[[str, int, int], LoadReport | None]


class Finished(NamedTuple):
    """A request that has ended."""

    plan: Plan
    began_at: float
    ended_at: float

    @property
    def elapsed_s(self) -> float:
        return self.ended_at - self.began_at


class Fluid:
    """A closed loop of requests over one daemon and some relays.

    Args:
        rates: Bytes a second of each path.
        relays: Node ids; the first is the decode node of all requests.
    """

    def __init__(
        self,
        policy: Policy,
        rates: Rates,
        relays: tuple[str, ...] = ("d0",),
        block_bytes: int = MIB // 8,
        seed: int = 1,
    ) -> None:
        self.block_bytes = block_bytes
        self.now = 0.0
        self.inflight = Inflight("p0", ["s0"], relays)
        self.selector = Selector(policy)
        self.reports = ReportTable()
        self.finished: list[Finished] = []
        #: Bytes that each path has carried.
        self.carried: dict[str, float] = {"": 0, **dict.fromkeys(relays, 0)}
        #: Makes the reports of a relay; tests put liars here.
        self.report: Report = honest
        self._rates = rates
        self._draws = random.Random(seed)
        self._seq = 0
        self._queues: dict[str, deque[tuple[int, int]]] = {name: deque() for name in self.carried}
        self._left: dict[str, float] = {}
        self._open: dict[int, tuple[Plan, float, int]] = {}
        self._number = 0

    def meter(self, name: str) -> PathMeter:
        return self.inflight.relays[name] if name else self.inflight.direct

    def begin(self, size_bytes: int) -> Plan:
        """Ask for something."""
        block_bytes = self.block_bytes
        count = size_bytes // block_bytes
        spans = [Span(first, min(first + 64, count), 0) for first in range(0, count, 64)]
        self._tell()
        request = Request(spans, block_bytes, next(iter(self.inflight.relays), ""))
        draws = [self._draws.random() for _ in range(DRAWS)]
        plan = self.selector.plan(request, self.reports, self.inflight, self.now, draws)
        self._number += 1
        self._open[self._number] = (plan, self.now, count)
        for run in plan.runs:
            blocks = run.last - run.first
            self.meter(run.relay).sent(self.now, blocks * block_bytes)
            self._queues[run.relay].extend([(self._number, block_bytes)] * blocks)
        return plan

    def run(self, until: Callable[[], bool], size_bytes: int, depth: int = 1) -> None:
        """Keep `depth` requests under way until something is so."""
        while not until():
            while len(self._open) < depth:
                self.begin(size_bytes)
            self._step()

    def drain(self) -> None:
        """Let everything arrive."""
        while self._open:
            self._step()

    def _step(self) -> None:
        """Until the next block of any path has arrived."""
        active = {name for name, queue in self._queues.items() if queue}
        rates = self._rates(active)
        for name in active:
            self._left.setdefault(name, self._queues[name][0][1])
        name = min(active, key=lambda path: self._left[path] / rates[path])
        elapsed_s = self._left[name] / rates[name]
        self.now += elapsed_s
        for other in active:
            self._left[other] -= rates[other] * elapsed_s
        del self._left[name]
        number, block_bytes = self._queues[name].popleft()
        self.meter(name).arrived(self.now, block_bytes)
        self.carried[name] += block_bytes
        plan, began_at, count = self._open[number]
        if count == 1:
            del self._open[number]
            self.finished.append(Finished(plan, began_at, self.now))
        else:
            self._open[number] = (plan, began_at, count - 1)

    def _tell(self) -> None:
        self._seq += 1
        for node_id in ("s0", *self.inflight.relays):
            queued_bytes = self.meter(node_id).inflight_bytes if node_id != "s0" else 0
            report = self.report(node_id, self._seq, queued_bytes)
            if report is not None:
                self.reports.accept(self.now, report)


def honest(node_id: str, seq: int, queued_bytes: int = 0) -> LoadReport | None:
    """What a relay says that tells the truth."""
    return LoadReport(
        node_id=node_id,
        boot_id=bytes(8),
        seq=seq,
        interval_ms=200,
        state=NodeState.READY,
        relay_queued_bytes=queued_bytes,
        willing=True,
    )
