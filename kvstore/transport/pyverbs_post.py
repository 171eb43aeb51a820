"""How work requests are handed to pyverbs: two interfaces, of which every device has the second.

Entries and requests of pyverbs hold memory that only their `close` gives back (44 to 59: the
method that should be the destructor is misspelt), so that they are kept and used again, or
closed here. A device has copied them when the call into it returns.
"""

from __future__ import annotations

import abc
import socket
from collections.abc import Sequence
from typing import Any

from kvstore.transport.pyverbs_import import Modules
from kvstore.transport.verbs import Opcode, Work

#: Bit of the id of all receives; a failed completion does not say otherwise what it is of.
RECEIVE = 1 << 63
# Receives posted by one call.
_CHAIN_LENGTH = 64


class Poster(abc.ABC):
    """Posts work on one queue pair."""

    @abc.abstractmethod
    def post(self, works: Sequence[Work]) -> None:
        """Hand work to the device; see `kvstore.transport.verbs.QueuePair.post`.

        Raises:
            OverflowError: A number is too large for its field; nothing was handed over.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give memory back."""


class ExtendedPoster(Poster):
    """The extended interface: written straight into the device's queue, one doorbell a batch.

    Args:
        gathers: Whether the driver can gather by it. Soft RoCE cannot: it takes all pieces to
            be as long as the first one (rdma-core 44, seen: bytes are left out, and the
            request succeeds).
    """

    def __init__(self, modules: Modules, queue: Any, pieces_max: int, gathers: bool) -> None:
        self._queue = queue
        self._gatherer = None if gathers else PlainPoster(modules, queue)
        self._signalled = int(modules.enums.IBV_SEND_SIGNALED)
        self._entries = [modules.wr.SGE(0, 0, 0) for _ in range(pieces_max)]

    def post(self, works: Sequence[Work]) -> None:
        gatherer = self._gatherer
        if gatherer is not None and any(len(work.pieces) > 1 for work in works):
            gatherer.post(works)
            return
        queue, entries = self._queue, self._entries
        queue.wr_start()
        try:
            for work in works:
                queue.wr_id = work.id
                queue.wr_flags = self._signalled if work.signalled else 0
                if work.opcode == Opcode.WRITE:
                    queue.wr_rdma_write(work.rkey, work.remote_address)
                elif work.opcode == Opcode.READ:
                    queue.wr_rdma_read(work.rkey, work.remote_address)
                else:
                    # It swaps the bytes to the order of the network; the other one does not.
                    queue.wr_rdma_write_imm(work.rkey, work.remote_address, work.immediate)
                pieces = work.pieces
                for entry, piece in zip(entries, pieces, strict=False):
                    entry.addr, entry.length, entry.lkey = piece
                if len(pieces) == 1:
                    queue.wr_set_sge(entries[0])
                else:
                    queue.wr_set_sge_list(len(pieces), entries)
        except BaseException:
            queue.wr_abort()
            raise
        queue.wr_complete()

    def close(self) -> None:
        entries, self._entries = self._entries, []
        for entry in entries:
            entry.close()


class PlainPoster(Poster):
    """The interface that every device has: a chain of requests, which the device copies."""

    def __init__(self, modules: Modules, queue: Any) -> None:
        self._queue = queue
        self._modules = modules
        enums = modules.enums
        self._signalled = int(enums.IBV_SEND_SIGNALED)
        self._opcodes = {
            Opcode.WRITE: enums.IBV_WR_RDMA_WRITE,
            Opcode.WRITE_WITH_IMMEDIATE: enums.IBV_WR_RDMA_WRITE_WITH_IMM,
            Opcode.READ: enums.IBV_WR_RDMA_READ,
        }

    def post(self, works: Sequence[Work]) -> None:
        wr = self._modules.wr
        made: list[Any] = []
        chain = None
        try:
            for work in reversed(works):
                # It wants one entry at least; what counts is how many it is told of then.
                entries = [wr.SGE(*piece) for piece in work.pieces] or [wr.SGE(0, 0, 0)]
                made += entries
                chain = wr.SendWR(
                    wr_id=work.id,
                    opcode=self._opcodes[work.opcode],
                    num_sge=len(entries),
                    sg=entries,
                    imm_data=socket.htonl(work.immediate),
                    send_flags=self._signalled if work.signalled else 0,
                    next_wr=chain,
                )
                made.append(chain)
                chain.num_sge = len(work.pieces)
                chain.set_wr_rdma(work.rkey, work.remote_address)
            if chain is not None:
                self._queue.post_send(chain)
        finally:
            for part in made:
                part.close()

    def close(self) -> None:
        pass


class ReceiveChain:
    """Receives without memory, for all queue pairs of a rail: the end of it is posted."""

    def __init__(self, modules: Modules) -> None:
        wr = modules.wr
        entry = wr.SGE(0, 0, 0)
        self._chain: list[Any] = []
        try:
            following = None
            for _ in range(_CHAIN_LENGTH):
                following = wr.RecvWR(wr_id=RECEIVE, num_sge=1, sg=[entry], next_wr=following)
                following.num_sge = 0
                # The one at index n heads a chain of n + 1.
                self._chain.append(following)
        finally:
            entry.close()

    def post(self, queue: Any, count: int) -> None:
        """Post so many receives on a queue pair."""
        while count > 0:
            some = min(count, _CHAIN_LENGTH)
            queue.post_recv(self._chain[some - 1])
            count -= some

    def close(self) -> None:
        """Give memory back."""
        chain, self._chain = self._chain, []
        for part in chain:
            part.close()
