"""The agents that may relay for this node, what is under way on each path, and the selector.

The shell around `kvstore_client.selector`: it knows the links, and keeps the meters true.
"""

from __future__ import annotations

import logging
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.loadreport import ReportTable
from kvstore_client.jobs import Route
from kvstore_client.link import PeerLink
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
from kvstore_client.selector.estimates import storage_limit_Bps, usable

logger = logging.getLogger(__name__)

# How long what is known of the links may be old: a relay that goes down in between is found
# out by the first request, and its blocks go another way.
REFRESH_S = 0.02


def check_policy(policy: str) -> Policy:
    """The policy of this name.

    Raises:
        ConfigError: There is none.
    """
    if policy not in list(Policy):
        raise ConfigError("policy", policy, f"must be one of {', '.join(Policy)}")
    return Policy(policy)


def check_relays(relays: Sequence[str]) -> list[str]:
    """Normal forms of the endpoints of agents.

    Raises:
        ConfigError: One is no endpoint, or is listed twice.
    """
    if isinstance(relays, str):
        raise ConfigError("relays", relays, "must be a list of endpoints")
    endpoints = [str(parse_endpoint(text, "relays")) for text in relays]
    for index, endpoint in enumerate(endpoints):
        if endpoint in endpoints[:index]:
            raise ConfigError("relays", endpoint, "must be listed once")
    return endpoints


#: Plans are counted by these times; what took longer is `plans_later`.
PLAN_BOUNDS_US = (16, 32, 64, 128, 256, 512, 1024)
_PLAN_COUNTERS = (*(f"plans_within_{bound}us" for bound in PLAN_BOUNDS_US), "plans_later")


def _within(seconds: float) -> str:
    """The counter of a plan that took so long."""
    return _PLAN_COUNTERS[bisect_left(PLAN_BOUNDS_US, seconds * 1e6)]


class Relays:
    """Paths to choose from, on the loop's thread.

    Args:
        node_id: This node, as its requests name it.
        daemons: Links to all daemons.
        links: Links to the agents that may relay.
        reports: Newest load report of each node.
        draws: Chance.
        counters: Of the client: plans by how long they took, each in the first that it kept to.

    Attributes:
        inflight: The meters of all paths.
    """

    def __init__(
        self,
        node_id: str,
        policy: Policy,
        daemons: Sequence[PeerLink],
        links: Sequence[PeerLink],
        reports: ReportTable,
        draws: random.Random,
        counters: Counter[str],
    ) -> None:
        self.links = links
        self.inflight = Inflight(node_id, [link.peer for link in daemons])
        self._counters = counters
        self._selector = Selector(policy)
        self._policy = policy
        self._daemons = daemons
        self._reports = reports
        self._draws = draws
        self._by_node: dict[str, PeerLink] = {}
        # What was made of each link: its node id, and whether it is an agent with that name.
        self._judged: dict[PeerLink, tuple[str, bool]] = {}
        self._refreshed_at = -REFRESH_S
        # As of then: relays like any other, and all that can be used where nothing else is left.
        self._spares: tuple[list[PathMeter], list[PathMeter]] | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self.links)

    def link(self, node_id: str) -> PeerLink:
        """The way to a relay that a plan names."""
        return self._by_node[node_id]

    def node_id(self, name: str) -> str:
        """The node id of a relay that is named by its id or by its endpoint; "" if it is none
        of ours, or has never answered."""
        self._name()
        if name in self._by_node:
            return name
        for link in self.links:
            if str(link.endpoint) == name and link.peer in self._by_node:
                return link.peer
        return ""

    def judge(self) -> None:
        """Say now which of those that have answered cannot relay, and not at the first fetch."""
        self._name()

    def plan(self, spans: Sequence[Span], block_bytes: int, route: Route, now: float) -> Plan:
        """Which blocks go which way."""
        begun_at = time.perf_counter()
        self._refresh(now)
        request = Request(spans, block_bytes, route.decode_node)
        plan = self._selector.plan(request, self._reports, self.inflight, now, self._draw())
        self._counters[_within(time.perf_counter() - begun_at)] += 1
        return plan

    def estimate_s(
        self, spans: Sequence[Span], block_bytes: int, route: Route, now: float
    ) -> float:
        """How long a fetch would take, see `Selector.estimate_s`."""
        self._refresh(now)
        request = Request(spans, block_bytes, route.decode_node)
        return self._selector.estimate_s(request, self._reports, self.inflight, now, self._draw())

    def spare(self, route: Route, now: float) -> PathMeter | None:
        """A relay for blocks that another path has failed to bring, or is slow with; the
        decode node if it can be used."""
        if route.direct_only or self._policy is Policy.DIRECT or not self.links:
            return None
        self._refresh(now)
        if self._spares is None:  # not for each of thousands of blocks that fail together
            self._spares = self._find_spares(now)
        found, last = self._spares
        if not found and last and not all(link.usable for link in self._daemons):
            # What lies on daemons that are down comes by a relay or not at all.
            found = last
        preferred = self.inflight.relays.get(route.decode_node)
        if preferred is not None and preferred in found:
            return preferred
        return found[int(self._draws.random() * len(found))] if found else None

    def _find_spares(self, now: float) -> tuple[list[PathMeter], list[PathMeter]]:
        ring = self.inflight.ring
        ranks = [usable(now, meter, self._reports) for meter in ring]
        return (
            [meter for meter, rank in zip(ring, ranks, strict=True) if rank == 2],
            [meter for meter, rank in zip(ring, ranks, strict=True) if rank],
        )

    def _draw(self) -> list[float]:
        return [self._draws.random() for _ in range(DRAWS)]

    def _refresh(self, now: float) -> None:
        if now - self._refreshed_at < REFRESH_S:
            return
        self._refreshed_at = now
        self._spares = None
        for daemon, link in zip(self.inflight.daemons, self._daemons, strict=True):
            daemon.node_id = link.peer
            daemon.up = link.usable
        self._name()
        for node_id, link in self._by_node.items():
            meter = self.inflight.relays[node_id]
            meter.share = link.share(now)
            meter.limit_Bps = storage_limit_Bps(self._reports.report(node_id))

    def _name(self) -> None:
        """Learn the node ids of relays that have answered for the first time, or have come back
        under another."""
        daemons = {link.peer for link in self._daemons if link.welcome is not None}
        for link in self.links:
            taken = link.peer in daemons
            known, told = self._judged.get(link), (link.peer, link.is_agent and not taken)
            if link.welcome is None or known == told:
                continue
            if known is not None and self._by_node.get(known[0]) is link:
                self._forget(known[0])
            self._judged[link] = told
            if not link.is_agent:
                logger.error("%s is no agent: it cannot relay", link.endpoint)
                continue
            if taken:
                logger.error("%s is %r, as a daemon is: no relay", link.endpoint, link.peer)
                continue
            if link.peer == self.inflight.node_id:
                logger.error("%s is this node itself: it cannot relay", link.endpoint)
                continue
            if link.peer in self._by_node:
                logger.error(
                    "%s and %s are both %r: only the first is used as a relay",
                    self._by_node[link.peer].endpoint,
                    link.endpoint,
                    link.peer,
                )
                continue
            self._by_node[link.peer] = link
            self.inflight.add_relay(link.peer)

    def _forget(self, node_id: str) -> None:
        """Nobody has this name any more; what is under way ends by its meter."""
        del self._by_node[node_id]
        self.inflight.remove_relay(node_id)
        self._selector.forget_relay(node_id)
        self._spares = None
