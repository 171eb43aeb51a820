"""The regions of a client at all of its peers: handed over, taken back, and unmapped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from kvstore_client.link import PeerLink
from kvstore_client.memory import Region, Regions


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

    async def allocate(self, size_bytes: int) -> Region:
        """New memory that all peers reach; see `AsyncClient.allocate`."""
        making = asyncio.ensure_future(asyncio.to_thread(self._regions.allocate, size_bytes))
        try:
            region = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._unwanted)  # threads cannot be cancelled
            raise
        return await self.add(region)

    async def add(self, region: Region) -> Region:
        """Let all peers reach a region, now or when their links come up. If that is cancelled
        the region is given back: nobody else has it."""
        try:
            await asyncio.gather(*(link.add_region(region) for link in self._links()))
        except BaseException:
            self._discard(region)
            raise
        return region

    async def free(self, region: Region) -> None:
        """Take a region back from all peers; none reaches it when this returns.

        Raises:
            LocalProtocolError: It is none of ours, or a request is not quiet.
        """
        self._regions.check_free(region)
        self._regions.remove(region, close=False)
        await self._take_back(region)

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
        """Give back the memory of all that was withdrawn."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        regions, self._withdrawn = self._withdrawn, []

        def unmap() -> None:
            for region in regions:
                region.unmap()

        if regions:
            await asyncio.to_thread(unmap)

    async def _take_back(self, region: Region) -> None:
        try:
            await asyncio.gather(*(link.remove_region(region) for link in self._links()))
        finally:
            # Nothing is under way in it, whoever has it mapped yet.
            try:
                region.withdraw()
            finally:
                await asyncio.to_thread(region.unmap)

    def _discard(self, region: Region) -> None:
        self._regions.remove(region, close=False)
        task = self._loop.create_task(self._take_back(region))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _unwanted(self, making: asyncio.Future[Region]) -> None:
        if not making.cancelled() and making.exception() is None:
            self._discard(making.result())


__all__ = ["Sharing"]
