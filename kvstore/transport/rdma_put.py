"""The payload of a put by RDMA: read out of the asker's memory into reserved blocks.

::

    asker's memory ──READ──▶ reserved block        the last one of a block tells that it is there

Nobody at the asker does anything meanwhile; the source verifies what has come.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from kvstore.errors import LocalProtocolError
from kvstore.layout import PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.protocol.placing import PutPuller
from kvstore.transport.rdma_cut import cut, remote_ranges
from kvstore.transport.rdma_fetch import RemoteMemory
from kvstore.transport.rdma_queue import Job, Payload, RdmaQueue
from kvstore.transport.shm import address_of
from kvstore.transport.verbs import Opcode, Work

if TYPE_CHECKING:
    from kvstore.transport.rdma_end import RdmaEnd

# A block of 256 MiB in one request would say nothing for so long that it looks stalled.
READ_BYTES_MAX = 4 * 1024 * 1024


class RdmaPuller(PutPuller, Payload):
    """Reads blocks of one put; made by `RdmaEnd.put_puller`.

    `pull` calls nothing of the protocol; what fails is told in a later turn of the loop.
    """

    transport = "rdma"

    def __init__(self, end: RdmaEnd, memory_map: MemoryMap, pieces: PieceMap) -> None:
        super().__init__()
        if pieces.group_count != 1:
            raise LocalProtocolError(f"a put in {pieces.group_count} groups of layers")
        self._end = end
        self._map = memory_map
        self._pieces = pieces
        self._remote = RemoteMemory(end, memory_map)
        self._under_way = 0
        self._stopped = False
        # Index, and address and length of the target: views would keep blocks from others.
        self._asked: deque[tuple[int, int, int]] = deque()

    @property
    def idle(self) -> bool:
        return not (self._under_way or (self._asked and self.failure is None))

    def pull(self, index: int, target: memoryview) -> None:
        if self._stopped or self.failure is not None:
            return
        address = address_of(target)
        if self._end.memory.find(address, target.nbytes) is None:
            error = LocalProtocolError(
                f"block {index} of a put: {target.nbytes} bytes at {address:#x} are not registered"
            )
            self._end.fail_payload(self, error)
            return
        self._asked.append((index, address, target.nbytes))
        self.resume()

    def stop(self) -> None:
        self._stopped = True
        self._asked.clear()

    # --- what its end calls ------------------------------------------------------------------

    def completed(self, job: Job) -> None:
        self._under_way -= 1
        if not self._stopped:
            self.on_pulled(job.key)

    def lost(self, job: Job) -> None:
        if not job.kept:  # or its block would be another's
            self._under_way -= 1

    def resume(self) -> None:
        end = self._end
        while self._asked and self.failure is None:
            queue = end.roomy(for_reads=True)
            if queue is None:
                end.wait_for_room(self)
                return
            self._read(queue, *self._asked.popleft())

    def _read(self, queue: RdmaQueue, index: int, address: int, length: int) -> None:
        end, remote, place = self._end, self._remote, queue.place
        spans = self._map.spans(self._pieces, index, 0, length)
        try:
            lkey = end.memory.get(address, length).lkeys[place]
        except LocalProtocolError as error:
            end.fail_payload(self, error)
            return
        works = cut(
            Opcode.READ,
            queue.next_id,
            remote_ranges(spans, remote.addresses, remote.keys[place]),
            [(address, length, lkey)],
            1,
            min(queue.work_bytes_max, READ_BYTES_MAX),
        )
        works = [_signalled(work) if work.pieces[0].length == READ_BYTES_MAX else work
                 for work in works[:-1]] + [_signalled(works[-1])]  # fmt: skip
        self._under_way += 1
        end.add(queue, Job(self, index, length, len(works), _nothing), works)


def _signalled(work: Work) -> Work:
    return work._replace(signalled=True)


def _nothing() -> None:
    pass


__all__ = ["READ_BYTES_MAX", "RdmaPuller"]
