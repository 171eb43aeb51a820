"""Both sides of a connection in memory: a small store, hooks, and a wire cut at any place."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from kvstore.blocksource import Chunk, FetchStream, PutStream
from kvstore.checksum import CHECKSUM_BYTES, block_seed, layer_checksums
from kvstore.errors import KVStoreError, LimitExceeded, TransportError
from kvstore.framing import FrameWriter
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import (
    Cancel,
    CancelReply,
    Channel,
    Done,
    Empty,
    Fetch,
    FetchOutcome,
    Goaway,
    Hello,
    Limits,
    Message,
    Put,
    PutDone,
    PutOutcome,
    Role,
    Tier,
    Welcome,
    encode,
)
from kvstore.protocol import (
    ClientProtocol,
    FrameProtocol,
    Reply,
    ServerHooks,
    ServerProtocol,
    hello_message,
)
from kvstore.transfer import BlockMemory, FetchTransfer, PutTransfer
from kvstore.wire import HEADER_BYTES, FrameType, decode_header, encode_header
from tests.support.engine import content, key

MIB = 1024 * 1024
NAMESPACE = bytes(range(32))
#: Of the blocks in most tests.
LAYERS = (40, 24, 100)
BLOCK = sum(LAYERS)
KEYS = [key(number) for number in range(6)]
#: Why a connection ended.
LOST = TransportError("the wire broke")
_PENDING = 255
_GUARD = b"\xa5" * 32


def frame(
    type: FrameType,
    request_id: int,
    message: Message | bytes = b"",
    payload: bytes = b"",
    piece: int = 0,
    piece_offset: int = 0,
    flags: int = 0,
) -> bytes:
    """One whole frame with right checksums; metadata may be a message or raw bytes."""
    metadata = message if isinstance(message, bytes) else encode(message)
    header = encode_header(type, request_id, metadata, len(payload), piece, piece_offset, flags)
    return header + metadata + payload


class Guarded:
    """Memory between guard bytes: what is written beside it shows."""

    def __init__(self, size_bytes: int) -> None:
        self._bytes = bytearray(_GUARD + bytes(size_bytes) + _GUARD)
        self.view = memoryview(self._bytes)[len(_GUARD) : len(_GUARD) + size_bytes]

    @property
    def intact(self) -> bool:
        """Whether nothing was written outside."""
        return self._bytes.startswith(_GUARD) and self._bytes.endswith(_GUARD)


class Store:
    """Blocks by key, and the streams that give them out and take them.

    Attributes:
        damaged: Keys whose last byte is sent wrong.
        late: Keys whose blocks are not ready yet.
        chunk_bytes: Largest chunk that a fetch gives out.
        room: Blocks that may still be reserved.
        lent: Chunks that were given out and not released.
        held: Reservations that have not ended.
        targets: Memory of every reservation there ever was.
    """

    def __init__(self, *layer_bytes: int) -> None:
        self.geometry = Geometry(layer_bytes)
        self.blocks: dict[bytes, bytes] = {}
        self.damaged: set[bytes] = set()
        self.late: set[bytes] = set()
        self.chunk_bytes = MIB
        self.room = 1 << 30
        self.lent = 0
        self.held = 0
        self.targets: list[Guarded] = []

    def block(self, key: bytes, version: int = 0) -> bytes:
        """The bytes that belong to a key."""
        return content(key, self.geometry.block_bytes, version)

    def fill(self, *keys: bytes) -> None:
        """Store blocks."""
        self.blocks.update((key, self.block(key)) for key in keys)

    def checksums(self, key: bytes, data: bytes | None = None) -> bytes:
        """All layer checksums of a block."""
        block = self.block(key) if data is None else data
        layers = [block[a:b] for a, b in pairwise(self.geometry.offsets)]
        return layer_checksums(layers, block_seed(NAMESPACE, key))

    def pieces(self, fetch: Fetch) -> PieceMap:
        """What a fetch asks for, piece by piece."""
        return PieceMap(
            self.geometry,
            len(fetch.keys),
            fetch.layer_first,
            fetch.layer_last,
            fetch.group_layers,
        )

    def lend(self) -> Callable[[], None]:
        """A chunk is given out; what it gets to be released once."""
        self.lent += 1
        released: list[bool] = []

        def release() -> None:
            assert not released, "released twice"
            released.append(True)
            self.lent -= 1

        return release


class StoreFetch(FetchStream):
    """A fetch out of a `Store`."""

    def __init__(self, store: Store, keys: Sequence[bytes], pieces: PieceMap) -> None:
        self.on_ready = lambda: None
        self._store = store
        self._keys = keys
        self._pieces = pieces
        self._outcomes = bytearray([_PENDING]) * len(keys)
        self._piece = 0
        self._offset = 0
        self._failed: list[int] = []

    @property
    def finished(self) -> bool:
        return self._piece == self._pieces.piece_count

    @property
    def queued_bytes(self) -> int:
        return 0 if self.finished else self._pieces.span_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def tiers(self) -> bytes:
        return bytes([Tier.ARENA]) * len(self._keys)

    def stop(self, outcome: FetchOutcome) -> None:
        self._piece = self._pieces.piece_count
        self._outcomes = self._outcomes.replace(bytes([_PENDING]), bytes([outcome]))

    def next_chunk(self, bytes_max: int) -> Chunk | None:
        pieces, store = self._pieces, self._store
        limit = min(bytes_max, store.chunk_bytes)
        start, buffers, checksums, length = (self._piece, self._offset), [], b"", 0
        while not self.finished and length < limit:
            group, index = divmod(self._piece, pieces.key_count)
            first, last, at, size = pieces.group_ranges[group]
            key = self._keys[index]
            if key in store.late:
                break
            if key not in store.blocks:
                if self._outcomes[index] == _PENDING:
                    self._outcomes[index] = FetchOutcome.MISS
                    self._failed.append(index)
                self._piece += 1
                if buffers:
                    break
                start = (self._piece, 0)
                continue
            data = store.blocks[key]
            if not self._offset:
                part = slice(first * CHECKSUM_BYTES, last * CHECKSUM_BYTES)
                checksums += store.checksums(key, data)[part]
            if key in store.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            take = min(limit - length, size - self._offset)
            buffers.append(memoryview(data)[at + self._offset : at + self._offset + take])
            length += take
            self._offset += take
            if self._offset == size:
                self._piece += 1
                self._offset = 0
                if group == pieces.group_count - 1:
                    self._outcomes[index] = FetchOutcome.HIT
        failed, self._failed = tuple(self._failed), []
        if not buffers and not failed:
            return None
        return Chunk(*start, buffers, length, checksums, store.lend(), failed)


class StorePut(PutStream):
    """A put into a `Store`."""

    def __init__(self, store: Store, keys: Sequence[bytes], checksums: bytes) -> None:
        self.on_decided = lambda: None
        self._store = store
        self._keys = keys
        size = store.geometry.layer_count * CHECKSUM_BYTES
        self._announced = [checksums[at : at + size] for at in range(0, len(checksums), size)]
        self._outcomes = bytearray([_PENDING]) * len(keys)
        self._next = 0
        self._reserved: dict[int, memoryview] = {}

    @property
    def finished(self) -> bool:
        return _PENDING not in self._outcomes

    @property
    def reserved_bytes(self) -> int:
        return len(self._reserved) * self._store.geometry.block_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def reserve(self, bytes_max: int) -> list[int]:
        store, wanted = self._store, []
        size = store.geometry.block_bytes
        while self._next < len(self._keys):
            index = self._next
            key = self._keys[index]
            if key not in store.blocks and store.room and (len(wanted) + 1) * size > bytes_max:
                break
            self._next += 1
            if key in store.blocks:
                same = store.checksums(key, store.blocks[key]) == self._announced[index]
                self._outcomes[index] = PutOutcome.EXISTS if same else PutOutcome.CONFLICT
            elif not store.room:
                self._outcomes[index] = PutOutcome.FULL
            else:
                store.room -= 1
                store.held += 1
                target = Guarded(size)
                store.targets.append(target)
                self._reserved[index] = target.view
                wanted.append(index)
        return wanted

    def target(self, index: int) -> memoryview | None:
        return self._reserved.get(index)

    def received(self, index: int) -> None:
        data = bytes(self._reserved.pop(index))
        self._store.held -= 1
        key = self._keys[index]
        if self._store.checksums(key, data) != self._announced[index]:
            self._outcomes[index] = PutOutcome.CORRUPT
        else:
            self._outcomes[index] = PutOutcome.STORED
            self._store.blocks.setdefault(key, data)

    def stop(self, outcome: PutOutcome) -> None:
        self._store.held -= len(self._reserved)
        self._reserved.clear()
        self._next = len(self._keys)
        self._outcomes = self._outcomes.replace(bytes([_PENDING]), bytes([outcome]))


class Hooks(ServerHooks):
    """A server shell that serves a `Store` and notes what it was asked.

    Attributes:
        requests: Type, id and message of every request.
        ended: Ids of the fetches and puts that have ended.
        refusals: Type and reason of every request that was refused.
        answers: What to reply to other requests, by type; default is `Empty`.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hellos: list[Hello] = []
        self.requests: list[tuple[FrameType, int, Message]] = []
        self.ended: list[int] = []
        self.refusals: list[tuple[FrameType, KVStoreError]] = []
        self.answers: dict[FrameType, Reply] = {}
        self.limits = Limits()
        self.protocol: ServerProtocol

    def hello(self, hello: Hello, version: int) -> Welcome:
        self.hellos.append(hello)
        return Welcome(
            version=version,
            node_id="server",
            boot_id=bytes(16),
            role=Role.DAEMON,
            limits=self.limits,
        )

    def request(self, type: FrameType, request_id: int, message: Message) -> None:
        self.requests.append((type, request_id, message))
        protocol, store = self.protocol, self.store
        if isinstance(message, Fetch):
            protocol.check_room(request_id)
            stream = StoreFetch(store, message.keys, store.pieces(message))
            protocol.add_fetch(request_id, stream, message.priority)
        elif isinstance(message, Put):
            protocol.check_room(request_id)
            size = len(message.keys) * store.geometry.layer_count * CHECKSUM_BYTES
            if len(message.checksums) != size:
                raise LimitExceeded(f"{len(message.checksums)} bytes of checksums, not {size}")
            put = StorePut(store, message.keys, message.checksums)
            protocol.add_put(request_id, put, store.geometry.block_bytes)
        elif isinstance(message, Cancel):
            found = protocol.stop_request(message.request_id, timed_out=False)
            protocol.reply(type, request_id, CancelReply(found=found))
        else:
            answer = self.answers.get(type, Empty())
            if isinstance(answer, Exception):
                raise answer
            protocol.reply(type, request_id, answer)

    def refused(self, type: FrameType, error: KVStoreError) -> None:
        self.refusals.append((type, error))

    def fetch_begins(self, request_id: int) -> None:
        """Nobody asks for times here."""

    def fetch_done(self, request_id: int, stream: FetchStream) -> Done:
        self.ended.append(request_id)
        return Done(outcomes=stream.outcomes(), tiers=stream.tiers())

    def put_done(self, request_id: int, stream: PutStream) -> PutDone:
        self.ended.append(request_id)
        return PutDone(outcomes=stream.outcomes())


def hello(**changes: object) -> Hello:
    """A HELLO as clients send it."""
    message = hello_message("client", Role.CLIENT, bytes(16), Channel.DATA)
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return Hello(**{**values, **changes})


def take(writer: FrameWriter, bytes_max: int) -> bytes:
    """The next bytes of a stream, as a send of at most `bytes_max` would move them."""
    data = b""
    for buffer in writer.buffers():
        data += buffer[: bytes_max - len(data)]
        if len(data) == bytes_max:
            break
    writer.sent(len(data))
    return data


def deliver(target: FrameProtocol, data: bytes) -> None:
    """Bytes arrive, scattered over the reader's buffers as `recvmsg` would."""
    view = memoryview(data)
    while len(view) and target.lost_by is None:
        count = 0
        for buffer in target.reader.buffers():
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            view = view[size:]
            count += size
        target.receive(count)


class FetchCall:
    """A fetch as a client sees it: guarded memory, progress and the reply.

    Args:
        scattered: Give each layer memory of its own.
    """

    def __init__(
        self,
        geometry: Geometry,
        keys: Sequence[bytes],
        layers: tuple[int, int] | None = None,
        group_layers: int = 0,
        scattered: bool = False,
    ) -> None:
        self.keys = list(keys)
        self.geometry = geometry
        first, last = layers or (0, geometry.layer_count)
        self.pieces = PieceMap(geometry, len(keys), first, last, group_layers)
        sizes = geometry.layer_bytes[first:last]
        self.guards = [
            [Guarded(size) for size in (sizes if scattered else [sum(sizes)])] for _ in keys
        ]
        memory: list[BlockMemory] = [
            [guard.view for guard in guards] if scattered else guards[0].view
            for guards in self.guards
        ]
        self.arrived: list[tuple[int, int]] = []
        self.failed: list[tuple[int, int]] = []
        self.replies: list[Reply] = []
        self.transfer = FetchTransfer(
            NAMESPACE,
            self.keys,
            self.pieces,
            memory,
            lambda index, group: self.arrived.append((index, group)),
            lambda index, outcome: self.failed.append((index, outcome)),
        )

    def message(self, **changes: object) -> Fetch:
        """The FETCH that asks for this."""
        values = {
            "namespace": NAMESPACE,
            "keys": self.keys,
            "layer_first": self.pieces.layer_first,
            "layer_last": self.pieces.layer_last,
            "group_layers": 0 if self.pieces.group_count == 1 else self._step(),
            "deadline_ms": 1000,
        }
        return Fetch(**{**values, **changes})  # type: ignore[arg-type]

    def _step(self) -> int:
        first, last, *_ = self.pieces.group_ranges[0]
        return last - first

    def data(self, index: int) -> bytes:
        """What lies in the memory of a block now."""
        return b"".join(guard.view for guard in self.guards[index])

    def expected(self, index: int) -> bytes:
        """What belongs there."""
        offsets = self.geometry.offsets
        block = content(self.keys[index], self.geometry.block_bytes)
        return block[offsets[self.pieces.layer_first] : offsets[self.pieces.layer_last]]

    def check(self) -> list[FetchOutcome | None]:
        """Outcomes (None: not known); guards are intact, and what is called a hit is right."""
        assert all(guard.intact for guards in self.guards for guard in guards)
        outcomes: list[FetchOutcome | None] = []
        for index, outcome in enumerate(self.transfer.outcomes):
            if outcome == FetchOutcome.HIT:
                assert self.data(index) == self.expected(index)
            outcomes.append(None if outcome == _PENDING else FetchOutcome(outcome))
        for index, group in self.arrived:
            _, _, start, size = self.pieces.group_ranges[group]
            at = start - self.pieces.geometry.offsets[self.pieces.layer_first]
            assert self.data(index)[at : at + size] == self.expected(index)[at : at + size]
        return outcomes


class PutCall:
    """A put as a client sees it."""

    def __init__(self, store: Store, keys: Sequence[bytes], scattered: bool = False) -> None:
        self.keys = list(keys)
        self.replies: list[Reply] = []
        memory: list[BlockMemory] = []
        for name in keys:
            block = memoryview(store.block(name))
            offsets = store.geometry.offsets
            memory.append([block[a:b] for a, b in pairwise(offsets)] if scattered else block)
        self.checksums = b"".join(map(store.checksums, keys))
        self.transfer = PutTransfer(store.geometry, memory)

    def message(self, **changes: object) -> Put:
        """The PUT that announces this."""
        values = {
            "namespace": NAMESPACE,
            "keys": self.keys,
            "checksums": self.checksums,
            "deadline_ms": 1000,
        }
        return Put(**{**values, **changes})  # type: ignore[arg-type]

    def outcomes(self) -> list[PutOutcome]:
        """Outcomes, all known."""
        return [PutOutcome(outcome) for outcome in self.transfer.outcomes]


class Pair:
    """A client and a server with a wire between them that carries what it is told to.

    Args:
        cut: Draws how many bytes the next step carries.
        in_flight_bytes_max: The server's budget for puts.
    """

    def __init__(
        self,
        store: Store,
        cut: Callable[[], int] = lambda: MIB,
        in_flight_bytes_max: int = 64 * MIB,
    ) -> None:
        self.store = store
        self.hooks = Hooks(store)
        self.welcomes: list[Welcome] = []
        self.goaways: list[Goaway] = []
        self.client = ClientProtocol(hello(), self.welcomes.append, self.goaways.append)
        self.server = ServerProtocol(self.hooks, in_flight_bytes_max)
        self.hooks.protocol = self.server
        self._cut = cut
        self._next_id = 1

    @property
    def work_count(self) -> int:
        """What is under way beside the stream, or waits to be."""
        return 0

    def up(self, bytes_max: int) -> int:
        """Carry bytes from the client to the server; how many there were."""
        return self._carry(self.client, self.server, bytes_max)

    def down(self, bytes_max: int) -> int:
        """Carry bytes from the server to the client; how many there were."""
        return self._carry(self.server, self.client, bytes_max)

    def pump(self) -> None:
        """Carry until neither side has anything to say."""
        while self.up(self._cut()) + self.down(self._cut()):
            pass

    def begin_fetch(self, call: FetchCall, **changes: object) -> int:
        """Send the FETCH of a call; its id."""
        request_id = self._take_id()
        self.client.fetch(request_id, call.message(**changes), call.transfer, call.replies.append)
        return request_id

    def begin_put(self, call: PutCall, **changes: object) -> int:
        """Send the PUT of a call; its id."""
        request_id = self._take_id()
        self.client.put(request_id, call.message(**changes), call.transfer, call.replies.append)
        return request_id

    def call(self, type: FrameType, message: Message) -> list[Reply]:
        """Send another request; the list gets its reply."""
        replies: list[Reply] = []
        self.client.call(self._take_id(), type, message, replies.append)
        return replies

    def cancel(self, request_id: int) -> list[Reply]:
        """Abandon a request and tell the server, as a client does."""
        self.client.abandon(request_id)
        return self.call(FrameType.CANCEL, Cancel(request_id=request_id))

    def lose(self, error: Exception) -> None:
        """The wire breaks."""
        self.client.lost(error)
        self.server.lost(error)

    def _carry(self, source: FrameProtocol, target: FrameProtocol, bytes_max: int) -> int:
        source.fill()
        data = take(source.writer, bytes_max)
        deliver(target, data)
        return len(data)

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def check_idle(pair: Pair) -> None:
    """Nothing is under way, and nothing is held."""
    assert (pair.store.lent, pair.store.held) == (0, 0)
    assert (pair.client.call_count, pair.server.request_count) == (0, 0)
    assert not pair.client._runs
    assert not pair.client._run_waiters
    assert not pair.client._late_runs
    assert pair.work_count == 0


def cuts(seed: int, most: int = 500) -> Callable[[], int]:
    """Draws of how much a step of the wire carries; the same in every run."""
    draws = random.Random(seed)
    return lambda: draws.choice([1, HEADER_BYTES - 1, HEADER_BYTES, draws.randrange(1, most)])


def welcomed_client(*frames: bytes) -> ClientProtocol:
    """A welcomed client that receives frames."""
    client = ClientProtocol(hello(), lambda welcome: None, lambda goaway: None)
    welcome = Welcome(version=1, node_id="server", boot_id=bytes(16), role=Role.DAEMON)
    deliver(client, frame(FrameType.WELCOME, 0, welcome))
    for data in frames:
        deliver(client, data)
    return client


def connected_server(store: Store, in_flight_bytes_max: int = MIB) -> tuple[ServerProtocol, Hooks]:
    """A server that has heard HELLO and whose WELCOME was read."""
    hooks = Hooks(store)
    hooks.protocol = server = ServerProtocol(hooks, in_flight_bytes_max)
    deliver(server, frame(FrameType.HELLO, 0, hello()))
    take(server.writer, MIB)
    return server, hooks


def sent_types(data: bytes) -> list[FrameType]:
    """Types of the frames in a stream."""
    types = []
    while data:
        header = decode_header(data[:HEADER_BYTES])
        types.append(header.type)
        data = data[HEADER_BYTES + header.metadata_length + header.payload_length :]
    return types


def said(server: ServerProtocol) -> list[FrameType]:
    """Types of all frames that a server has to say, now that it may."""
    types: list[FrameType] = []
    while True:
        server.fill()
        data = take(server.writer, 1 << 30)
        if not data:
            return types
        types += sent_types(data)
