"""The payload of a fetch by RDMA: written from registered memory into that of the asker.

::

    arena ──WRITE──▶ asker's memory        one request a contiguous range
          ──WRITE──▶
          ──WRITE WITH IMMEDIATE (run)──▶  the last of a chunk: news that overtakes no byte
    connection ──DATA (run, checksums)──▶  before or after it: the asker waits for both

The asker verifies what has come. A run that will never come is named by DONE, and so is the rail
that it was lost on: packets of it may be in the network yet, and the asker gives its own end of
that rail up before it touches the memory again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvstore.blocksource import Chunk
from kvstore.errors import KVStoreError, LimitExceeded
from kvstore.layout import PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.messages import Data, Done
from kvstore.protocol.placing import FetchSink, Placed
from kvstore.transport.rdma_cut import cut, local_pieces, remote_ranges
from kvstore.transport.rdma_queue import SENDS_MAX, Job, Payload
from kvstore.transport.verbs import Opcode, Work

if TYPE_CHECKING:
    from kvstore.transport.rdma_end import RdmaEnd

# Four of them are under way on a queue pair, so that the device never runs dry while the next
# one is made; and one costs an interpreter far less than its bytes cost the network (16 MiB are
# 0.34 ms at 400 Gbit/s). With 4 MiB fetches in the tests' guest reached 0.83 of `ib_write_bw`,
# with this 0.97.
CHUNK_BYTES = 16 * 1024 * 1024
# Where somebody may wait for one layer of all blocks.
LAYER_CHUNK_BYTES = 4 * 1024 * 1024


class RdmaSink(FetchSink, Payload):
    """Writes one fetch into its asker's memory; made by `RdmaEnd.fetch_sink`.

    `take` calls `on_news` and nothing else of the protocol; what fails is told in a later turn
    of the loop.
    """

    transport = "rdma"

    def __init__(self, end: RdmaEnd, memory_map: MemoryMap, pieces: PieceMap) -> None:
        super().__init__()
        self._end = end
        self._map = memory_map
        self._pieces = pieces
        self.chunk_bytes = LAYER_CHUNK_BYTES if pieces.group_count > 1 else CHUNK_BYTES
        if memory_map.layered:
            # A request for each layer: 5 us, in which nothing else happens; and two chunks are to
            # be under way.
            layer_bytes = pieces.span_bytes // (pieces.layer_last - pieces.layer_first)
            self.chunk_bytes = min(self.chunk_bytes, layer_bytes * SENDS_MAX // 2)
        self._remote = RemoteMemory(end, memory_map)
        self._under_way = 0
        self._lost_runs: list[int] = []
        self._lost_rails: set[int] = set()

    @property
    def accepts(self) -> bool:
        if self.failure is not None:
            return False
        if self._end.roomy() is not None:
            return True
        self._end.wait_for_room(self)
        return False

    @property
    def idle(self) -> bool:
        return not self._under_way

    def take(self, chunk: Chunk) -> None:
        run = 0
        if chunk.length:
            run = self._end.next_run()
            self._write(chunk, run)
        else:
            chunk.release()
        data = Data(checksums=chunk.checksums, failed=chunk.failed, run=run)
        self.on_news(Placed(chunk.piece, chunk.piece_offset, chunk.length, data, False))

    def amend(self, done: Done) -> Done:
        if not self._lost_runs:
            return done
        return msgspec.structs.replace(
            done,
            lost_runs=(*done.lost_runs, *self._lost_runs),
            lost_rails=tuple(sorted(self._lost_rails)),
        )

    # --- what its end calls ------------------------------------------------------------------

    def completed(self, job: Job) -> None:
        self._under_way -= 1
        job.release()

    def lost(self, job: Job) -> None:
        self._under_way -= 1
        self._lost_runs.append(job.key)
        if job.place >= 0:
            self._lost_rails.add(job.place)
        job.release()

    def resume(self) -> None:
        self.on_ready()

    def _write(self, chunk: Chunk, run: int) -> None:
        end = self._end
        queue = end.roomy() or end.least_loaded()
        job = Job(self, run, chunk.length, 0, chunk.release)
        self._under_way += 1
        if queue is None:
            self.lost(job)
            return
        spans = self._map.spans(self._pieces, chunk.piece, chunk.piece_offset, chunk.length)
        place = queue.place
        remote = self._remote
        try:
            works = cut(
                Opcode.WRITE,
                queue.next_id,
                remote_ranges(spans, remote.addresses, remote.keys[place]),
                local_pieces(chunk.buffers, end.memory, place),
                queue.pieces_max,
                queue.work_bytes_max,
            )
        except KVStoreError as error:
            end.fail_payload(self, error)
            self.lost(job)
            return
        last = works[-1]
        works[-1] = Work(
            last.id,
            Opcode.WRITE_WITH_IMMEDIATE,
            last.pieces,
            last.remote_address,
            last.rkey,
            run,
            True,
        )
        end.add(queue, job, works)


class RemoteMemory:
    """The asker's regions, as work requests name them.

    Attributes:
        addresses: Of each region.
        keys: By the place of a rail: the remote key of each region there.

    Raises:
        LimitExceeded: A region has no key for a rail that is used.
    """

    def __init__(self, end: RdmaEnd, memory_map: MemoryMap) -> None:
        regions = memory_map.regions
        self.addresses = [region.address for region in regions]
        self.keys: dict[int, list[int]] = {}
        for queue in end.queues:
            place = queue.place
            for number, region in enumerate(regions):
                if len(region.keys) <= place:
                    raise LimitExceeded(
                        f"region {number} has {len(region.keys)} keys, and rail {place}"
                        f" ({queue.name}) needs one: one a rail, in the order of RAILS"
                    )
            self.keys[place] = [region.keys[place] for region in regions]


__all__ = ["CHUNK_BYTES", "RdmaSink", "RemoteMemory"]
