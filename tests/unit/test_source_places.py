"""Chunks of the engine that say where in its memory their bytes lie."""

from __future__ import annotations

import pytest

from kvstore.blocksource import FetchStream
from kvstore.layout import Geometry, PieceMap
from tests.support.engine import Engine, content, key

PAGE = 4096
MIB = 1024 * 1024
KEYS = [key(number) for number in (1, 2, 3, 4, 5)]
LAYERS = (1000, 3000)


@pytest.fixture
def engine() -> Engine:
    """Blocks 1 to 4, which do not lie in the order of their keys."""
    engine = Engine(16 * PAGE)
    engine.put(engine.open(*LAYERS), 4, 2, 1, 3)
    return engine


def begin(engine: Engine, group: int, locate: bool) -> FetchStream:
    pieces = PieceMap(Geometry(LAYERS), len(KEYS), group_layers=group)
    stream = engine.source.fetch(engine.open(*LAYERS), KEYS, pieces)
    stream.locate = locate
    return stream


@pytest.mark.parametrize("bytes_max", [100, PAGE, 2 * PAGE, MIB])
@pytest.mark.parametrize("group", [0, 1])
def test_places_are_those_of_the_bytes(engine: Engine, bytes_max: int, group: int) -> None:
    stream = begin(engine, group, locate=True)
    found = []
    while (chunk := stream.next_chunk(bytes_max)) is not None:
        for place, buffer in zip(chunk.places, chunk.buffers, strict=True):
            there = engine.arena[place : place + len(buffer)]
            assert there == buffer
            buffer[0] ^= 0xFF
            assert there == buffer, "a copy of it lies elsewhere"
            buffer[0] ^= 0xFF
            found.append(bytes(there))
        chunk.release()
    blocks = [content(one, sum(LAYERS)) for one in KEYS[:4]]
    if group:
        blocks = [one[:1000] for one in blocks] + [one[1000:] for one in blocks]
    assert b"".join(found) == b"".join(blocks)


@pytest.mark.parametrize("bytes_max", [100, MIB])
def test_nothing_is_told_unasked(engine: Engine, bytes_max: int) -> None:
    stream, found = begin(engine, 0, locate=False), 0
    while (chunk := stream.next_chunk(bytes_max)) is not None:
        assert not chunk.places
        found += sum(map(len, chunk.buffers))
        chunk.release()
    assert found == 4 * sum(LAYERS)
