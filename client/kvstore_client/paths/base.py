"""The seam between a job and a way for its bytes.

Rule: on failure a path gives its blocks back, so that another path or another daemon can be
tried; it never raises for what a peer, a disk or a network did.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

from kvstore.messages import FetchOutcome
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink


class FetchPath(abc.ABC):
    """One way from storage into the caller's memory."""

    #: Name in attribution and metrics.
    name: str

    @abc.abstractmethod
    async def fetch(
        self,
        link: PeerLink,
        job: FetchJob,
        indices: Sequence[int],
        on_failed: Callable[[int, FetchOutcome], None],
    ) -> None:
        """Fetch some blocks of a job from one peer; return when the request has ended.

        Pieces that arrive and verify are reported to the job at once.

        Args:
            indices: Which blocks; not more than the peer takes in one request.
            on_failed: Called with the outcome of every block that is no hit, once, as soon
                as it is known. Whether it is final is the caller's decision.
        """
