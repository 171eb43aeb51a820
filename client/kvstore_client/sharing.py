"""The regions of a client at all of its peers: handed over, taken back, and unmapped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from kvstore_client.link import PeerLink, closed_error
from kvstore_client.memory import Region, Regions

logger = logging.getLogger(__name__)


class Sharing:
    """Everything on the loop's thread, save what takes long.

    Args:
        links: To all peers of this moment.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        regions: Regions,
        links: Callable[[], Iterable[PeerLink]],
    ) -> None:
        self._loop = loop
        self._regions = regions
        self._links = links
        self._tasks: set[asyncio.Task[None]] = set()
        self._withdrawn: list[Region] = []
        self._closed = False

    async def allocate(self, size_bytes: int) -> Region:
        """New memory that all peers reach; see `AsyncClient.allocate`."""
        if self._closed:
            raise closed_error()
        making = asyncio.ensure_future(asyncio.to_thread(self._regions.allocate, size_bytes))
        try:
            region = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._unwanted)  # threads cannot be cancelled
            raise
        return await self.add(region)

    async def add(self, region: Region) -> Region:
        """Let all peers reach a region, now or when their links come up. If that is cancelled,
        or the client was closed, the region is given back: nobody else has it."""
        try:
            if self._closed:
                raise closed_error()
            await asyncio.gather(*(link.add_region(region) for link in self._links()))
        except BaseException:
            self._discard(region)
            raise
        return region

    async def free(self, region: Region) -> None:
        """Take a region back from all peers; none reaches it when this returns. It is taken back
        too if this is cancelled.

        Raises:
            LocalProtocolError: It is none of ours, or a request is not quiet.
        """
        self._regions.check_free(region)
        await asyncio.shield(self._take_back(region))

    def close(self) -> None:
        """Take no more regions."""
        self._closed = True

    def withdraw(self) -> None:
        """All links are down: take all regions from all devices, even if some do not let go.
        What a peer may touch yet stays as it is."""
        with contextlib.ExitStack() as ending:
            for region in self._regions.all():
                self._regions.remove(region, close=False)
                if not region.users:
                    self._withdrawn.append(region)
                    ending.callback(region.withdraw)

    async def unmap(self) -> None:
        """Give back the memory of all that was withdrawn; also if this is cancelled."""
        regions, self._withdrawn = self._withdrawn, []

        def unmap() -> None:
            for region in regions:
                region.unmap()

        if regions:
            self._begin(asyncio.to_thread(unmap)).add_done_callback(_log_failure)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _take_back(self, region: Region) -> asyncio.Task[None]:
        self._regions.remove(region, close=False)
        return self._begin(self._taking_back(region))

    def _begin(self, run: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that goes on if who waits for it gives up."""
        task = self._loop.create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _taking_back(self, region: Region) -> None:
        try:
            await asyncio.gather(*(link.remove_region(region) for link in self._links()))
        finally:
            # Nothing is under way in it, whoever has it mapped yet.
            try:
                region.withdraw()
            finally:
                await asyncio.to_thread(region.unmap)

    def _discard(self, region: Region) -> None:
        """Take a region back that nobody has."""
        self._take_back(region).add_done_callback(_log_failure)

    def _unwanted(self, making: asyncio.Future[Region]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._discard(making.result())


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.warning("memory of a region is not given back: %s", task.exception())


__all__ = ["Sharing"]
