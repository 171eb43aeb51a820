"""Fetches of much that is not there: bounded work at a time, and each block looked at once."""

from __future__ import annotations

import pytest

from kvstore.blocksource import FetchStream
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import FetchOutcome
from kvstore_daemon import streams
from kvstore_daemon.streams import ArenaFetch
from tests.support.engine import Engine, Reader, content, key

PAGE = 4096
MIB = 1024 * 1024
HIT = FetchOutcome.HIT


def begin_fetch(
    engine: Engine, namespace: bytes, *numbers: int, group: int = 0
) -> tuple[FetchStream, Reader]:
    keys = list(map(key, numbers))
    pieces = PieceMap(Geometry(engine.layers[namespace]), len(keys), group_layers=group)
    return engine.source.fetch(namespace, keys, pieces), Reader(namespace, keys, pieces)


@pytest.mark.parametrize("group", [0, 1])
def test_misses_come_a_bounded_number_at_a_time(group: int) -> None:
    engine = Engine(16 * PAGE)
    namespace = engine.open(16, 16)
    engine.put(namespace, 1, 2)
    numbers = [*range(100, 1300), 1, *range(1300, 1900), 2, *range(1900, 2000)]
    stream, reader = begin_fetch(engine, namespace, *numbers, group=group)
    counts = []
    while (chunk := stream.next_chunk(MIB)) is not None:
        reader.take(chunk)
        chunk.release()
        counts.append((len(chunk.failed), len(chunk.buffers)))
    most = streams.MISSES_PER_CHUNK_MAX
    assert counts[:4] == [(most, 0), (most, 0), (1200 - 2 * most + 1, 1), (most, 0)]
    assert counts[4] == (599 - most + 1, 1)
    missing = [index for index, number in enumerate(numbers) if number >= 100]
    assert reader.failed == missing[: len(reader.failed)], "DONE tells of those at the end"
    assert len(reader.failed) > 1800
    assert [numbers[i] for i, out in enumerate(stream.outcomes()) if out == HIT] == [1, 2]
    assert sum(map(len, reader.parts)) == 2 * 32


def test_groups_after_the_first_look_at_what_is_left_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(16 * PAGE)
    namespace = engine.open(*(8,) * 64)
    engine.put(namespace, 1, 2, 3)
    stream, reader = begin_fetch(engine, namespace, 7, 1, 8, 2, 3, *range(100, 400), group=1)
    find, looks = ArenaFetch._find, []

    def count(self: ArenaFetch, group: int, index: int) -> int:
        looks.append((group, index))
        return find(self, group, index)

    monkeypatch.setattr(ArenaFetch, "_find", count)
    while (chunk := stream.next_chunk(MIB)) is not None:
        reader.take(chunk)
        chunk.release()
    assert [look for look in looks if look[0]] == [(g, i) for g in range(1, 64) for i in (1, 3, 4)]
    assert stream.queued_bytes == 0
    results = reader.results(stream.outcomes())
    assert [results[index] for index in (1, 3, 4)] == [content(key(n), 512) for n in (1, 2, 3)]
