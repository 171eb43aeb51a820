"""Whose load reports count for a node: a name is what a peer claims to be, and two may claim
the same one. On the loop's thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from kvstore.loadreport import NODES_MAX, LoadReport, ReportTable
from kvstore_client.link import PeerLink

logger = logging.getLogger(__name__)


class Voices:
    """For each node the link whose reports are believed.

    ::

        who claims one name                 who is believed
        a daemon, and somebody else         the daemon, be it up or down
        else: a process with two links      both
        two daemons, or two agents          the first, as long as it is up

    Args:
        reports: Where reports go to.
        counters: Where to count.
        daemons: Links to daemons.
    """

    def __init__(
        self, reports: ReportTable, counters: Counter[str], daemons: Iterable[PeerLink]
    ) -> None:
        self._daemons = frozenset(daemons)
        self._reports = reports
        self._counters = counters
        self._links: dict[str, PeerLink] = {}
        # Of whom the log was told.
        self._refused: set[tuple[str, str]] = set()

    def take_report(self, now: float, link: PeerLink, report: LoadReport) -> None:
        """A peer has sent a report of itself, in the name that it claims."""
        node_id = report.node_id
        known = self._links.get(node_id)
        if known is not link and not self._takes_over(known, link, node_id):
            assert known is not None
            ours = known in self._daemons and link not in self._daemons
            if ours or not _one_process(known, link):
                self._refuse(known, link, node_id)
                return
        self._reports.accept(now, report)

    def _takes_over(self, known: PeerLink | None, link: PeerLink, node_id: str) -> bool:
        """Let a link speak for a node from now on, if it may."""
        if known is not None and known.peer == node_id:
            ours, theirs = known in self._daemons, link in self._daemons
            if ours > theirs or (ours == theirs and known.up):
                return False
        if known is not None and not _one_process(known, link):
            self._reports.forget(node_id)  # its numbers mean nothing for another
        elif len(self._links) >= NODES_MAX:
            self._links = {
                name: one for name, one in self._links.items() if one.up or one in self._daemons
            }
        self._links[node_id] = link
        return True

    def _refuse(self, known: PeerLink, link: PeerLink, node_id: str) -> None:
        self._counters["reports_refused"] += 1
        told = (node_id, str(link.endpoint))
        if told not in self._refused and len(self._refused) < NODES_MAX:
            self._refused.add(told)
            logger.error(
                "%s and %s are both %r: load reports of the first are believed only",
                known.endpoint,
                link.endpoint,
                node_id,
            )


def _one_process(known: PeerLink, link: PeerLink) -> bool:
    if known.welcome is None or link.welcome is None:
        return False
    return known.welcome.boot_id == link.welcome.boot_id
