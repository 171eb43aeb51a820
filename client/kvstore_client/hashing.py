"""Checksums of blocks that are about to be put: large ones are made beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from kvstore.checksum import block_seed, layer_checksums
from kvstore.layout import Geometry
from kvstore.transfer import BlockMemory
from kvstore_client.jobs import PutJob
from kvstore_client.namespaces import Namespace

# Hashed on the loop's thread: 30 us of work, less than it takes to wake another one.
INLINE_BYTES_MAX = 1024 * 1024
# One keeps up with ten links of 3 GiB/s; the second is for a caller with several loops' worth.
THREADS = 2


def block_checksums(
    namespace: Namespace, key: bytes, memory: BlockMemory, geometry: Geometry, layer_first: int
) -> bytes:
    """Layer checksums of a block in the caller's memory, as a PUT announces them.

    Args:
        geometry: Of the layers that the memory holds.
        layer_first: The first of these layers.
    """
    layers: Sequence[memoryview]
    if isinstance(memory, memoryview):
        layers = [memory[a:b] for a, b in pairwise(geometry.offsets)]
    else:
        layers = memory
    return layer_checksums(layers, block_seed(namespace.id, key), layer_first)


class ChecksumMaker:
    """Makes checksums while the loop goes on sending; hashing lets go of the GIL.

    On the loop's thread. `close` when no job is under way any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="kvstore-checksum")

    async def checksums(self, job: PutJob, indices: Sequence[int]) -> bytes:
        """Checksums of some blocks of a job, packed. Borrows the job's memory meanwhile, also
        when the waiting task is cancelled."""

        made = job.checksums
        if made is not None:
            return b"".join(made[index] for index in indices)

        def make() -> bytes:
            return b"".join(
                block_checksums(
                    job.namespace, job.keys[index], job.memory[index], job.geometry, job.layer_first
                )
                for index in indices
            )

        if len(indices) * job.geometry.block_bytes <= INLINE_BYTES_MAX:
            return make()
        hashing = self._executor.submit(make)
        job.borrow(hashing, lambda: None)  # it takes a millisecond: nothing to be stopped
        try:
            return await asyncio.wrap_future(hashing, loop=self._loop)
        finally:
            job.finished(hashing)
            if hashing.done():
                job.let_go()
            else:
                hashing.add_done_callback(lambda done: self._loop.call_soon_threadsafe(job.let_go))

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown()
