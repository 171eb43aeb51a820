"""The two ends of a payload: blocks that arrive (`FetchTransfer`) and blocks that leave
(`PutTransfer`). Sans I/O, as the reader and the writer of a frame stream see them.

Both belong to one request on one connection. A request that is tried again gets a new
request id and a new transfer; what still arrives for the old one goes to scratch memory, so
that a byte of an older attempt never counts.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from kvstore.blocksource import Chunk
from kvstore.checksum import CHECKSUM_BYTES, block_seed, layer_checksums
from kvstore.errors import LocalProtocolError, RemoteProtocolError
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import Done, FetchOutcome, PutOutcome, ServedBy, Tier, Want
from kvstore.wire import PAYLOAD_BYTES_MAX, Header

#: Value of an outcome that is not known yet.
PENDING = 255
_FETCH_OUTCOMES = frozenset(map(int, FetchOutcome))
_PUT_OUTCOMES = frozenset(map(int, PutOutcome))
_TIERS = frozenset(map(int, Tier))
_WAYS = frozenset(map(int, ServedBy))

# The memory of one block: one contiguous buffer of the asked-for layers, or one buffer for
# each of those layers (engines scatter them).
BlockMemory = memoryview | Sequence[memoryview]


def as_memory(buffer: object, what: str, size_bytes: int, writable: bool) -> memoryview:
    """A flat byte view of a buffer of exactly `size_bytes`.

    Raises:
        LocalProtocolError: Not a contiguous buffer, read-only, or of another size.
    """
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as error:
        raise LocalProtocolError(
            f"{what}: {type(buffer).__name__} offers no buffer ({error}); a torch tensor on"
            " the CPU does as tensor.view(torch.uint8).numpy()"
        ) from error
    if not view.c_contiguous:
        raise LocalProtocolError(f"{what}: the buffer is not contiguous")
    if writable and view.readonly:
        raise LocalProtocolError(f"{what}: the buffer is read-only")
    if view.nbytes != size_bytes:
        raise LocalProtocolError(f"{what}: {view.nbytes} bytes, expected {size_bytes}")
    if not size_bytes:
        return memoryview(bytearray())  # `cast` takes no shape with a zero in it
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def slice_memory(
    memory: BlockMemory, geometry: Geometry, layer_first: int, start: int, length: int
) -> list[memoryview]:
    """Views of `length` bytes from byte `start` of a block, in memory that begins at a layer.

    Args:
        memory: Memory of the layers from `layer_first` on.
        start: Byte offset within the whole block.
    """
    if isinstance(memory, memoryview):
        first = start - geometry.offsets[layer_first]
        return [memory[first : first + length]]
    offsets, end = geometry.offsets, start + length
    first = bisect_right(offsets, start) - 1
    last = bisect_left(offsets, end, first)
    views = list(memory[first - layer_first : last - layer_first])
    if offsets[last] > end:
        views[-1] = views[-1][: end - offsets[last - 1]]
    if offsets[first] < start:
        views[0] = views[0][start - offsets[first] :]
    return views


class FetchTransfer:
    """Blocks arriving in answer to one FETCH.

    Args:
        namespace: Seeds the checksums together with the key.
        keys: Keys of the request, as sent.
        pieces: How the request cuts its blocks.
        memory: Destination of each key, writable; nothing else ever is written. Borrowed
            until `abandon` was called or every outcome is known.
        on_piece: Called with (key index, group) when a piece has arrived and was verified.
        on_failed: Called with (key index, outcome) when a block turns out not to come, or
            to be corrupt.
    """

    def __init__(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        memory: Sequence[BlockMemory],
        on_piece: Callable[[int, int], None],
        on_failed: Callable[[int, int], None],
    ) -> None:
        self.keys = keys
        self.pieces = pieces
        self.memory = memory
        self.outcomes = bytearray([PENDING]) * len(keys)
        self.received_bytes = 0
        #: Set where nobody wants checksums compared; for measurements.
        self.trusting = False
        #: Called with the payload bytes of each frame that has arrived, until `abandon`.
        self.on_bytes: Callable[[int], None] | None = None
        self.corrupt: list[int] = []
        self._namespace = namespace
        self._on_piece = on_piece
        self._on_failed = on_failed
        # Bytes of each block that were announced: one number a key, for its groups come in order.
        self._filled = array("Q", bytes(8 * len(keys)))
        self._expected: dict[int, bytes] = {}
        self._seeds = array("Q", bytes(8 * len(keys)))
        self._abandoned = False
        self._trusted = False  # what is told of now was verified before

    @property
    def abandoned(self) -> bool:
        """Whether the memory was given up: what still comes goes to scratch."""
        return self._abandoned

    def abandon(self) -> None:
        """Give the memory up. The connection must also divert a payload under way."""
        self._abandoned = True

    def route(self, header: Header, scratch: Callable[[int], list[memoryview]]) -> list[memoryview]:
        """Destination for the payload of a DATA frame.

        Raises:
            RemoteProtocolError: The frame lies outside of the request, repeats bytes, leaves
                a gap, or brings a group of layers before an earlier one of the same block.
        """
        pieces, geometry = self.pieces, self.pieces.geometry
        views: list[memoryview] = []
        for index, start, take in self.claim(header):
            if self._abandoned or self.outcomes[index] != PENDING:
                views += scratch(take)
            else:
                views += slice_memory(self.memory[index], geometry, pieces.layer_first, start, take)
        return views

    def claim(self, header: Header) -> list[tuple[int, int, int]]:
        """Which bytes a DATA frame brings, (key index, where in the block, how many), that none
        has brought before. `data` must follow. Raises as `route`."""
        pieces, filled = self.pieces, self._filled
        piece, offset, left = header.piece, header.piece_offset, header.payload_length
        parts: list[tuple[int, int, int]] = []
        key_count, ranges = pieces.key_count, pieces.group_ranges
        base = ranges[0][2]
        while left:
            if piece >= pieces.piece_count:
                raise RemoteProtocolError(
                    f"DATA for piece {piece}, the request has {pieces.piece_count}"
                )
            group, index = divmod(piece, key_count)
            _, _, start, size = ranges[group]
            # Groups of a block come in order: so much of this one is here.
            here = filled[index] + base - start
            if here < 0 and not offset:
                raise RemoteProtocolError(
                    f"DATA for group {group} of key {index} before all of the group in front of it"
                )
            if offset != here or offset >= size:
                raise RemoteProtocolError(
                    f"DATA for byte {offset} of piece {piece}, expected byte"
                    f" {min(max(here, 0), size)} of {size}"
                )
            take = min(left, size - offset)
            filled[index] += take
            parts.append((index, start + offset, take))
            left -= take
            piece += 1
            offset = 0
        return parts

    def placed(
        self,
        header: Header,
        checksums: bytes,
        failed: Sequence[int],
        corrupt: Sequence[int],
        verified: bool,
    ) -> None:
        """A DATA frame tells of payload that is in the memory already.

        Args:
            corrupt: Keys that the sender has found bad there.
            verified: Whether it has looked; if not, it is done here.

        Raises:
            RemoteProtocolError: As of `route` and `data`.
        """
        self.claim(header)
        for index in corrupt:
            if not 0 <= index < self.pieces.key_count:
                raise RemoteProtocolError(
                    f"DATA names key {index} as corrupt, the request has {self.pieces.key_count}"
                )
            if self.outcomes[index] == PENDING and not self._abandoned:
                self.corrupt.append(index)
                self._fail(index, FetchOutcome.CORRUPT)
        self._trusted = verified
        self.data(header, checksums, failed)
        self._trusted = False

    def data(self, header: Header, checksums: bytes, failed: Sequence[int]) -> None:
        """A DATA frame is complete: verify the pieces that end in it.

        Raises:
            RemoteProtocolError: The checksums are not those of the pieces that begin here.
        """
        pieces = self.pieces
        piece, offset, left = header.piece, header.piece_offset, header.payload_length
        self.received_bytes += left
        at = 0
        arrived: list[tuple[int, int, int]] = []
        while left:
            group, index = divmod(piece, pieces.key_count)
            first, last, _, size = pieces.group_ranges[group]
            if offset == 0:
                length = (last - first) * CHECKSUM_BYTES
                self._expected[piece] = checksums[at : at + length]
                at += length
            take = min(left, size - offset)
            arrived.append((piece, offset, offset + take))
            left -= take
            piece += 1
            offset = 0
        if at != len(checksums):
            raise RemoteProtocolError(
                f"DATA with {len(checksums)} bytes of checksums, expected {at}"
            )
        for piece, first, last in arrived:
            self._arrived(piece, first, last)
        for index in failed:
            if not 0 <= index < pieces.key_count:
                raise RemoteProtocolError(
                    f"DATA names key {index} as failed, the request has {pieces.key_count}"
                )
            self._fail(index, FetchOutcome.MISS)
        if self.on_bytes is not None and not self._abandoned:
            self.on_bytes(header.payload_length)

    def done(self, done: Done) -> None:
        """The server has said all.

        Raises:
            RemoteProtocolError: Outcomes that cannot be, or a HIT of which bytes are missing.
        """
        if len(done.outcomes) != len(self.keys) or not _FETCH_OUTCOMES.issuperset(done.outcomes):
            raise RemoteProtocolError(
                f"DONE with {len(done.outcomes)} outcomes for {len(self.keys)} keys"
            )
        if len(done.tiers) not in (0, len(self.keys)) or not _TIERS.issuperset(done.tiers):
            raise RemoteProtocolError(
                f"DONE with {len(done.tiers)} tiers for {len(self.keys)} keys"
            )
        known = len(done.served_by)
        if known not in (0, len(self.keys)) or not _WAYS.issuperset(done.served_by):
            raise RemoteProtocolError(f"DONE with {known} ways for {len(self.keys)} keys")
        for index, outcome in enumerate(done.outcomes):
            if self.outcomes[index] == PENDING:
                if outcome == FetchOutcome.HIT and not self._abandoned:
                    raise RemoteProtocolError(
                        f"DONE says HIT for key {index}, but bytes are missing"
                    )
                self._fail(index, outcome or FetchOutcome.UNAVAILABLE)

    def fail_rest(self, outcome: FetchOutcome) -> None:
        """Everything that is not known yet ends with `outcome`."""
        for index, known in enumerate(self.outcomes):
            if known == PENDING:
                self._fail(index, outcome)

    def _arrived(self, piece: int, start: int, end: int) -> None:
        """Bytes `[start, end)` of a piece are where they belong."""
        group, index = divmod(piece, self.pieces.key_count)
        first, last, _, size = self.pieces.group_ranges[group]
        if end < size:
            return
        expected = self._expected.pop(piece)
        if self._abandoned or self.outcomes[index] != PENDING:
            return
        if self._verified(index, first, last, expected):
            self._group_done(index, group)

    def seed(self, index: int) -> int:
        """What the checksums of a block start from."""
        seed = self._seeds[index]
        if not seed:
            seed = self._seeds[index] = block_seed(self._namespace, self.keys[index])
        return seed

    def _verified(self, index: int, first: int, last: int, expected: bytes) -> bool:
        """Whether layers `[first, last)` of a block match their checksums; if not it fails."""
        if self._trusted or self.trusting:
            return True
        seed = self.seed(index)
        geometry = self.pieces.geometry
        layers: Sequence[memoryview]
        memory = self.memory[index]
        base = geometry.offsets[self.pieces.layer_first]
        if isinstance(memory, memoryview):
            layers = [
                memory[geometry.offsets[layer] - base : geometry.offsets[layer + 1] - base]
                for layer in range(first, last)
            ]
        else:
            layers = memory[first - self.pieces.layer_first : last - self.pieces.layer_first]
        return self._compared(index, layer_checksums(layers, seed, first) == expected)

    def _compared(self, index: int, same: bool) -> bool:
        """A block was compared with its checksums, and fails if they are not the same."""
        if same:
            return True
        self.corrupt.append(index)
        self._fail(index, FetchOutcome.CORRUPT)
        return False

    def _group_done(self, index: int, group: int) -> None:
        if group == self.pieces.group_count - 1:  # the others came before it
            self.outcomes[index] = FetchOutcome.HIT
        self._on_piece(index, group)

    def _fail(self, index: int, outcome: int) -> None:
        if self.outcomes[index] == PENDING:
            self.outcomes[index] = outcome
            self._on_failed(index, outcome)


class PutTransfer:
    """Blocks leaving in a put: announced by PUT, sent as WANT asks.

    Args:
        geometry: Geometry of the blocks.
        memory: Memory of each block, all layers. Borrowed, and must not change, until the
            last chunk was released.
    """

    def __init__(self, geometry: Geometry, memory: Sequence[BlockMemory]) -> None:
        self.outcomes = bytearray([PENDING]) * len(memory)
        self.sent_bytes = 0
        #: Called whenever the last chunk that was out has been released.
        self.on_idle: Callable[[], None] = lambda: None
        self._geometry = geometry
        self._memory = memory
        self._wanted: list[int] = []
        self._asked: set[int] = set()
        self._at = 0
        self._offset = 0
        self._out_count = 0
        self._stopped = False

    @property
    def idle(self) -> bool:
        """Whether no chunk is out: nobody reads the memory at present."""
        return self._out_count == 0

    @property
    def queued_bytes(self) -> int:
        """Bytes that were asked for and not yet given out as chunks."""
        return (len(self._wanted) - self._at) * self._geometry.block_bytes - self._offset

    def want(self, want: Want) -> None:
        """The server has reserved space for some blocks.

        Raises:
            RemoteProtocolError: Indices that were not announced, or already asked for.
        """
        for index in want.indices:
            if not 0 <= index < len(self._memory) or index in self._asked:
                raise RemoteProtocolError(f"WANT for block {index} of {len(self._memory)}")
            self._asked.add(index)
        if not self._stopped:
            self._wanted += want.indices

    def stop(self) -> None:
        """Give out no more chunks."""
        self._stopped = True
        self._at = len(self._wanted)
        self._offset = 0

    def next_chunk(self, bytes_max: int = PAYLOAD_BYTES_MAX) -> Chunk | None:
        """The next payload: whole consecutive blocks, or a part of a large one."""
        if self._stopped or self._at >= len(self._wanted):
            return None
        block_bytes = self._geometry.block_bytes
        first, first_offset = self._wanted[self._at], self._offset
        buffers: list[memoryview] = []
        length = 0
        while self._at < len(self._wanted) and length < bytes_max and len(buffers) < 512:
            index = self._wanted[self._at]
            # A frame covers consecutive pieces only.
            if buffers and index != self._wanted[self._at - 1] + 1:
                break
            take = min(bytes_max - length, block_bytes - self._offset)
            buffers += slice_memory(self._memory[index], self._geometry, 0, self._offset, take)
            length += take
            self._offset += take
            if self._offset == block_bytes:
                self._at += 1
                self._offset = 0
        self._out_count += 1
        self.sent_bytes += length
        return Chunk(first, first_offset, buffers, length, b"", self._released)

    def done(self, outcomes: bytes) -> None:
        """The server has said all.

        Raises:
            RemoteProtocolError: Outcomes that cannot be.
        """
        if len(outcomes) != len(self.outcomes) or not _PUT_OUTCOMES.issuperset(outcomes):
            raise RemoteProtocolError(
                f"PUT_DONE with {len(outcomes)} outcomes for {len(self.outcomes)} blocks"
            )
        for index, outcome in enumerate(outcomes):
            if self.outcomes[index] == PENDING:
                self.outcomes[index] = outcome

    def fail_rest(self, outcome: PutOutcome) -> None:
        """Everything that is not known yet ends with `outcome`."""
        for index, known in enumerate(self.outcomes):
            if known == PENDING:
                self.outcomes[index] = outcome

    def _released(self) -> None:
        self._out_count -= 1
        if not self._out_count:
            self.on_idle()


def check_memory(
    memory: object, count: int, pieces_bytes: Sequence[int], what: str, writable: bool
) -> list[BlockMemory]:
    """Views of the memory that a caller gave for `count` blocks.

    Args:
        memory: One contiguous buffer a block; or a list of layer buffers a block; or one
            buffer whose first axis is the block.
        pieces_bytes: Bytes of each layer that the memory of a block holds.

    Raises:
        LocalProtocolError: Names the block, its size and the expected one.
    """
    size_bytes = sum(pieces_bytes)
    if not isinstance(memory, list | tuple):
        whole = as_memory(memory, what, count * size_bytes, writable)
        return [whole[at : at + size_bytes] for at in range(0, count * size_bytes, size_bytes)]
    if len(memory) != count:
        raise LocalProtocolError(f"{what}: {len(memory)} buffers for {count} blocks")
    views: list[BlockMemory] = []
    for index, block in enumerate(memory):
        name = f"{what}[{index}]"
        if isinstance(block, list | tuple):
            if len(block) != len(pieces_bytes):
                raise LocalProtocolError(
                    f"{name}: {len(block)} layer buffers, expected {len(pieces_bytes)}"
                )
            views.append(
                [
                    as_memory(layer, f"{name}[{number}]", size, writable)
                    for number, (layer, size) in enumerate(zip(block, pieces_bytes, strict=True))
                ]
            )
        else:
            views.append(as_memory(block, name, size_bytes, writable))
    return views
