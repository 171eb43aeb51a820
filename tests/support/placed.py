"""Both sides of a connection whose payload does not pass through it.

The asker's memory is that of its calls; ways into it are the real one of shared memory, and a
stand-in for RDMA whose writes end, or fail, when a test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kvstore.blocksource import Chunk
from kvstore.layout import PieceMap
from kvstore.memorymessages import Memory, MemoryRegion
from kvstore.messages import Data, Done, Fetch, Message, Put
from kvstore.protocol.copying import CopyPuller, CopySink
from kvstore.protocol.placing import FetchSink, Placed, PutPuller
from kvstore.protocol.strands import Strands
from kvstore.transfer import BlockMemory, slice_memory
from kvstore.wire import FrameType
from tests.support.frames import (
    MIB,
    NAMESPACE,
    FetchCall,
    Hooks,
    Pair,
    PutCall,
    Store,
    StoreFetch,
    StorePut,
)
from tests.support.workers import ByHand

#: What a request says of memory; here the stand-ins know where that is.
SOMEWHERE = Memory(regions=(MemoryRegion(keys=(1,), size_bytes=1),), places=b"")


class Run:
    """One write under way: its bytes, and what is called when it has ended."""

    def __init__(self, sink: RunSink, number: int, chunk: Chunk) -> None:
        self.number = number
        self._sink = sink
        self._chunk = chunk

    def land(self) -> int:
        """The bytes come to the asker's memory, and the server knows; its number."""
        self._sink.write(self._chunk)
        self._end()
        return self.number

    def fail(self) -> None:
        """It never comes."""
        self._sink.lost.append(self.number)
        self._end()

    def _end(self) -> None:
        self._chunk.release()
        self._sink.runs.remove(self)
        self._sink.on_ready()


class RunSink(FetchSink):
    """Writes that end when a test says so.

    Attributes:
        room: Writes that may be under way.
        runs: Those that are.
        lost: Numbers of those that failed.
    """

    transport = "rdma"
    chunk_bytes = MIB
    numbers = 0

    def __init__(self, pieces: PieceMap, memory: Sequence[BlockMemory], room: int) -> None:
        super().__init__()
        self.room = room
        self.runs: list[Run] = []
        self.lost: list[int] = []
        self._pieces = pieces
        self._memory = memory

    @property
    def accepts(self) -> bool:
        return self.failure is None and len(self.runs) < self.room

    @property
    def idle(self) -> bool:
        return not self.runs

    def take(self, chunk: Chunk) -> None:
        number = 0
        if chunk.length:
            RunSink.numbers += 1
            number = RunSink.numbers
            self.runs.append(Run(self, number, chunk))
        else:
            chunk.release()
        data = Data(checksums=chunk.checksums, failed=chunk.failed, run=number)
        self.on_news(Placed(chunk.piece, chunk.piece_offset, chunk.length, data, False))

    def write(self, chunk: Chunk) -> None:
        """Bring the bytes of a chunk to where they belong."""
        piece, offset = chunk.piece, chunk.piece_offset
        pieces, payload = self._pieces, memoryview(b"".join(chunk.buffers))
        while payload:
            group, index = divmod(piece, pieces.key_count)
            _, _, start, size = pieces.group_ranges[group]
            take = min(len(payload), size - offset)
            memory = self._memory[index]
            for view in slice_memory(
                memory, pieces.geometry, pieces.layer_first, start + offset, take
            ):
                view[:] = payload[: len(view)]
                payload = payload[len(view) :]
            piece, offset = piece + 1, 0

    def amend(self, done: Done) -> Done:
        return msgspec.structs.replace(done, lost_runs=tuple(self.lost))

    def fail(self, error: Exception) -> None:
        """Nothing can be brought any more; what is under way goes on."""
        self.failure = error
        self.on_ready()


class SlowPuller(PutPuller):
    """Reads that end when a test says so.

    Attributes:
        asked: Blocks that are to be read, (index, target).
    """

    transport = "rdma"

    def __init__(self, memory: Sequence[BlockMemory]) -> None:
        super().__init__()
        self.asked: list[tuple[int, memoryview]] = []
        self.stopped = False
        self._memory = memory

    @property
    def idle(self) -> bool:
        return not self.asked

    def pull(self, index: int, target: memoryview) -> None:
        self.asked.append((index, target))

    def stop(self) -> None:
        self.stopped = True

    def land(self) -> None:
        """The oldest read ends."""
        index, target = self.asked[0]
        memory = self._memory[index]
        target[:] = memory if isinstance(memory, memoryview) else b"".join(memory)
        del self.asked[0]
        self.on_pulled(index)
        if self.idle:
            self.on_ready()

    def break_off(self) -> None:
        """All reads end without their bytes."""
        self.asked.clear()
        self.on_ready()

    def fail(self, error: Exception) -> None:
        """Nothing can be read any more; what is under way goes on."""
        self.failure = error
        self.on_ready()


class PlacedHooks(Hooks):
    """As `Hooks`; requests with memory are answered beside the stream.

    Attributes:
        memory: Of each request, by its id.
        sinks, pullers: What was made for them.
        worker: Copies, where that is the way.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.memory: dict[int, Sequence[BlockMemory]] = {}
        self.sinks: list[FetchSink] = []
        self.pullers: list[PutPuller] = []
        self.make_sink: Callable[[Fetch, PieceMap, Sequence[BlockMemory]], FetchSink] = (
            self._copy_sink
        )
        self.make_puller: Callable[[Sequence[BlockMemory]], PutPuller] = self._copy_puller
        self.worker = ByHand()
        self.strands = Strands(self.worker)

    def request(self, type: FrameType, request_id: int, message: Message) -> None:
        protocol, store = self.protocol, self.store
        if isinstance(message, Fetch) and message.memory is not None:
            pieces = store.pieces(message)
            sink = self.make_sink(message, pieces, self.memory[request_id])
            self.sinks.append(sink)
            stream = StoreFetch(store, message.keys, pieces)
            protocol.add_fetch(request_id, stream, message.priority, sink)
        elif isinstance(message, Put) and message.memory is not None:
            puller = self.make_puller(self.memory[request_id])
            self.pullers.append(puller)
            put = StorePut(store, message.keys, message.checksums)
            protocol.add_put(request_id, put, store.geometry.block_bytes, puller)
        else:
            super().request(type, request_id, message)

    def _copy_sink(
        self, message: Fetch, pieces: PieceMap, memory: Sequence[BlockMemory]
    ) -> FetchSink:
        """The way of shared memory."""
        return CopySink(message.namespace, message.keys, pieces, memory, self.strands)

    def _copy_puller(self, memory: Sequence[BlockMemory]) -> PutPuller:
        return CopyPuller(memory, self.strands)


def run_sink(room: int) -> Callable[[Fetch, PieceMap, Sequence[BlockMemory]], RunSink]:
    """The way of RDMA, with room for so many writes."""
    return lambda message, pieces, memory: RunSink(pieces, memory, room)


class PlacedPair(Pair):
    """As `Pair`; all calls name their memory.

    Attributes:
        hooks: Of the server.
    """

    hooks: PlacedHooks

    def __init__(
        self,
        store: Store,
        cut: Callable[[], int] = lambda: MIB,
        in_flight_bytes_max: int = 64 * MIB,
    ) -> None:
        super().__init__(store, cut, in_flight_bytes_max)
        self.hooks = PlacedHooks(store)
        self.hooks.protocol = self.server
        self.hooks.strands.on_ready = lambda: self.server.on_output()
        self.server._hooks = self.hooks

    @property
    def work_count(self) -> int:
        return self.hooks.strands.count + len(self.hooks.worker.jobs)

    def pump(self) -> None:
        while self.up(self._cut()) + self.down(self._cut()) or self._goes_on():
            pass

    def _goes_on(self) -> bool:
        return self.server.unfilled or self.hooks.worker.finish()

    def begin_fetch(self, call: FetchCall, **changes: object) -> int:
        self.hooks.memory[self._next_id] = call.transfer.memory
        return super().begin_fetch(call, memory=SOMEWHERE, **changes)

    def begin_put(self, call: PutCall, **changes: object) -> int:
        self.hooks.memory[self._next_id] = call.transfer._memory
        return super().begin_put(call, memory=SOMEWHERE, **changes)


__all__ = [
    "NAMESPACE",
    "SOMEWHERE",
    "PlacedHooks",
    "PlacedPair",
    "Run",
    "RunSink",
    "SlowPuller",
    "run_sink",
]
