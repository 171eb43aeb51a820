"""An engine over a small arena, and blocks whose bytes follow from their key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kvstore.checksum import block_seed, layer_checksums
from kvstore.layout import Geometry, Layout, PieceMap
from kvstore.messages import AckLevel, FetchOutcome, PutOutcome
from kvstore_daemon.source import ArenaSource

CHUNK_BYTES = 1024 * 1024


def layout(*layer_bytes: int, **fields: object) -> Layout:
    """A layout with these layers; `fields` overrides the rest."""
    values = {"model_id": "model", "dtype": "bfloat16", "block_tokens": 16, **fields}
    return Layout(layer_bytes=layer_bytes, **values)  # type: ignore[arg-type]


def key(number: int) -> bytes:
    """The 32-byte key of block `number`."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def content(name: bytes, size_bytes: int, version: int = 0) -> bytes:
    """Bytes of the block under a key; another version has other bytes everywhere."""
    return hashlib.shake_128(name + bytes([version])).digest(size_bytes)


class Engine:
    """A source with a clock that stands until it is told to go on.

    Attributes:
        now: What the clock shows, in seconds.
        layers: Layer sizes of each namespace that was opened.
    """

    def __init__(self, arena_bytes: int, **options: Any) -> None:
        self.now = 0.0
        self.layers: dict[bytes, tuple[int, ...]] = {}
        self.arena = memoryview(bytearray(arena_bytes))
        self.source = ArenaSource(self.arena, clock=lambda: self.now, **options)
        self.store = self.source.store

    def open(self, *layer_bytes: int, pool: str = "pool", **fields: object) -> bytes:
        """Open a namespace; its id."""
        namespace = self.source.open_namespace(pool, layout(*layer_bytes, **fields)).namespace
        self.layers[namespace] = layer_bytes
        return namespace

    def checksums(self, namespace: bytes, name: bytes, data: bytes) -> bytes:
        """Layer checksums of the bytes of a block, as its writer announces them."""
        offsets = Geometry(self.layers[namespace]).offsets
        layers = [data[a:b] for a, b in pairwise(offsets)]
        return layer_checksums(layers, block_seed(namespace, name))

    def put(self, namespace: bytes, *numbers: int, version: int = 0) -> list[PutOutcome]:
        """Put blocks as a server does that gives each all the room it wants."""
        size = sum(self.layers[namespace])
        blocks = [content(key(number), size, version) for number in numbers]
        announced = b"".join(
            self.checksums(namespace, key(number), data)
            for number, data in zip(numbers, blocks, strict=True)
        )
        stream = self.source.put(namespace, list(map(key, numbers)), announced, AckLevel.MEMORY)
        while not stream.finished:
            for index in stream.reserve(max(size, CHUNK_BYTES)):
                target = stream.target(index)
                assert target is not None
                target[:] = blocks[index]
                stream.received(index)
        return [PutOutcome(outcome) for outcome in stream.outcomes()]

    def get(
        self, namespace: bytes, *numbers: int, layers: tuple[int, int] | None = None, group: int = 0
    ) -> list[bytes | FetchOutcome]:
        """Fetch blocks and verify checksums; for each its bytes, or why there are none."""
        keys = list(map(key, numbers))
        first, last = layers or (0, len(self.layers[namespace]))
        pieces = PieceMap(Geometry(self.layers[namespace]), len(keys), first, last, group)
        stream = self.source.fetch(namespace, keys, pieces)
        reader = Reader(namespace, keys, pieces)
        while (chunk := stream.next_chunk(CHUNK_BYTES)) is not None:
            reader.take(chunk)
            chunk.release()
        assert stream.finished
        assert stream.queued_bytes == 0
        return reader.results(stream.outcomes())

    def stored(self, namespace: bytes, *numbers: int) -> list[bool]:
        """Which blocks a lookup finds."""
        bitmap, _ = self.source.lookup([namespace], list(map(key, numbers)), 0, None)
        return [bool(bitmap[at // 8] >> at % 8 & 1) for at in range(len(numbers))]


class Reader:
    """Puts the chunks of a fetch together and verifies every piece."""

    def __init__(self, namespace: bytes, keys: Sequence[bytes], pieces: PieceMap) -> None:
        self.namespace = namespace
        self.keys = keys
        self.pieces = pieces
        self.parts = [bytearray() for _ in range(pieces.piece_count)]
        self.announced: dict[int, bytes] = {}
        self.failed: list[int] = []

    def take(self, chunk: object) -> None:
        """Copy what a chunk holds; checks its form."""
        piece, offset, buffers, length, checksums, _, failed, _ = chunk  # type: ignore[misc]
        assert length == sum(map(len, buffers))
        assert length <= CHUNK_BYTES
        assert len(buffers) <= 512
        self.failed += failed
        data, at, seen = b"".join(buffers), 0, 0
        while at < length:
            group, _ = divmod(piece, self.pieces.key_count)
            first, last, _, size = self.pieces.group_ranges[group]
            assert offset == len(self.parts[piece])
            if offset == 0:
                self.announced[piece] = checksums[seen : seen + 8 * (last - first)]
                seen += 8 * (last - first)
            take = min(length - at, size - offset)
            self.parts[piece] += data[at : at + take]
            at += take
            piece += 1
            offset = 0
        assert seen == len(checksums)

    def results(self, outcomes: bytes) -> list[bytes | FetchOutcome]:
        """For each key its bytes, or its outcome."""
        return [
            self._block(index) if outcome == FetchOutcome.HIT else FetchOutcome(outcome)
            for index, outcome in enumerate(outcomes)
        ]

    def _block(self, index: int) -> bytes:
        pieces, whole = self.pieces, b""
        offsets = pieces.geometry.offsets
        for group, (first, last, start, size) in enumerate(pieces.group_ranges):
            piece = group * pieces.key_count + index
            data = bytes(self.parts[piece])
            assert len(data) == size
            layers = [
                data[offsets[layer] - start : offsets[layer + 1] - start]
                for layer in range(first, last)
            ]
            seed = block_seed(self.namespace, self.keys[index])
            assert layer_checksums(layers, seed, first) == self.announced[piece]
            whole += data
        return whole
