"""Frames in and out of a byte stream, cut at any place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvstore.errors import RemoteProtocolError
from kvstore.framing import BUFFERS_PER_CALL_MAX, Frame, FrameReader, FrameWriter
from kvstore.messages import REPLIES, REQUESTS, decode
from kvstore.wire import HEADER_BYTES, METADATA_BYTES_MAX, PAYLOAD_BYTES_MAX, FrameType, Header
from tests.support.frames import frame, take
from tests.support.samples import FROM_CLIENT, FROM_SERVER

PAYLOAD = bytes(range(256)) * 2
ROWS = [
    pytest.param(type, message, table, id=f"{side}-{type.name}")
    for side, samples, table in (
        ("request", FROM_CLIENT, REQUESTS),
        ("reply", FROM_SERVER, REPLIES),
    )
    for type, message in samples.items()
]


class Target:
    """Destination of payloads, one after the other in one piece of memory."""

    def __init__(self, size_bytes: int = 1 << 20) -> None:
        self.memory = bytearray(size_bytes)
        self.routed: list[Header] = []
        self._at = 0

    def route(self, header: Header) -> Sequence[memoryview]:
        self.routed.append(header)
        view = memoryview(self.memory)[self._at : self._at + header.payload_length]
        self._at += header.payload_length
        middle = header.payload_length // 3
        return [view[:middle], view[middle:]]


def whole(reader: FrameReader, data: bytes) -> list[Frame]:
    return reader.feed(data)


def byte_by_byte(reader: FrameReader, data: bytes) -> list[Frame]:
    return [frame for at in range(len(data)) for frame in reader.feed(data[at : at + 1])]


def as_sockets_do(reader: FrameReader, data: bytes) -> list[Frame]:
    """Everything that is asked for arrives, with one call."""
    frames: list[Frame] = []
    view = memoryview(data)
    while len(view):
        count = 0
        for buffer in reader.buffers():
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            view = view[size:]
            count += size
        frames += reader.received(count)
    return frames


WAYS = [whole, byte_by_byte, as_sockets_do]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("type", "message", "table"), ROWS)
def test_every_frame_is_read(
    type: FrameType,
    message: Any,
    table: dict[FrameType, Any],
    way: Callable[[FrameReader, bytes], list[Frame]],
) -> None:
    payload = PAYLOAD if type is FrameType.DATA else b""
    place = (3, 4) if payload else (0, 0)
    data = frame(type, 1 << 50, message, payload, *place, flags=1)
    following = frame(FrameType.PING, 2)
    for trailing in (b"", following[:20], following, following + data):
        target = Target()
        reader = FrameReader(target.route)
        frames = way(reader, data + trailing)
        assert len(frames) == 1 + (len(trailing) >= 48) + (len(trailing) > 48)
        header, metadata = frames[0]
        assert (header.type, header.request_id, header.flags) == (type, 1 << 50, 1)
        assert (header.piece, header.piece_offset) == place
        assert decode(metadata, table[type]) == message
        assert target.memory.startswith(payload)
        assert len(target.routed) == len(frames[::2]) * bool(payload)
        assert reader.mid_frame == (len(trailing) == 20)


def test_frames_are_handed_out_before_the_next_is_looked_at() -> None:
    """What a frame says may change where the payload of the next one goes."""
    heard: list[object] = []

    def route(header: Header) -> Sequence[memoryview]:
        heard.append(header.piece)
        return [memoryview(bytearray(header.payload_length))]

    reader = FrameReader(route)
    first = frame(FrameType.DATA, 1, b"", PAYLOAD, piece=1)
    second = frame(FrameType.DATA, 1, b"", PAYLOAD, piece=2)
    reader.feed(first[:HEADER_BYTES])
    rest = first[HEADER_BYTES:] + second[:HEADER_BYTES]
    buffers = reader.buffers()
    assert list(map(len, buffers)) == [len(PAYLOAD), HEADER_BYTES]
    buffers[0][:], buffers[1][:] = rest[: len(PAYLOAD)], rest[len(PAYLOAD) :]
    for complete in reader.received(len(rest)):
        heard.append(("complete", complete.header.piece))
    assert heard == [1, ("complete", 1), 2]


def test_a_frame_without_a_body_is_complete_with_its_header() -> None:
    reader = FrameReader(Target().route)
    assert [f.header.request_id for f in reader.feed(frame(FrameType.PING, 5))] == [5]
    assert not reader.mid_frame


@pytest.mark.parametrize("way", WAYS)
def test_damaged_metadata_is_refused(way: Callable[[FrameReader, bytes], list[Frame]]) -> None:
    data = bytearray(frame(FrameType.WANT, 1, FROM_SERVER[FrameType.WANT]))
    data[-1] ^= 1
    with pytest.raises(RemoteProtocolError, match="WANT: metadata checksum"):
        way(FrameReader(Target().route), bytes(data))


def test_nothing_is_allocated_for_a_header_that_lies() -> None:
    reader = FrameReader(Target().route)
    data = bytearray(frame(FrameType.LOOKUP, 1, bytes(METADATA_BYTES_MAX)))
    data[18] = 0xFF
    with pytest.raises(RemoteProtocolError, match="header checksum"):
        reader.feed(data[:HEADER_BYTES])


def test_a_payload_may_have_more_buffers_than_a_call_takes() -> None:
    memory = bytearray(5000)
    views = [memoryview(memory)[at : at + 2] for at in range(0, 5000, 2)]
    assert len(views) > 2 * BUFFERS_PER_CALL_MAX
    payload = bytes(at % 251 for at in range(5000))
    data = frame(FrameType.DATA, 1, b"\x80", payload) + frame(FrameType.PING, 2)
    reader = FrameReader(lambda header: list(views))
    offered: list[int] = []
    view, frames = memoryview(data), []
    while len(view):
        buffers = reader.buffers()
        offered.append(len(buffers))
        assert sum(map(len, buffers)) == reader.requested_bytes
        count = 0
        for buffer in buffers:
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            view = view[size:]
            count += size
        frames += list(reader.received(count))
    assert memory == payload
    assert [f.header.type for f in frames] == [FrameType.DATA, FrameType.PING]
    # A header, the metadata with 1,023 buffers, then 1,024, then the rest and a header.
    assert offered == [1, 1024, 1024, 454]


@pytest.mark.parametrize("cut", [0, 1, 5, 6, 7, 100, 516])
def test_after_divert_no_byte_reaches_the_destination(cut: int) -> None:
    metadata = b"meta!"
    data = frame(FrameType.DATA, 7, metadata, PAYLOAD)
    target = Target()
    reader = FrameReader(target.route)
    reader.feed(data[: HEADER_BYTES + cut])
    before = bytes(target.memory)
    reader.divert(8)
    assert reader.mid_frame
    reader.divert(7)
    reader.divert(7)
    frames = reader.feed(data[HEADER_BYTES + cut :] + frame(FrameType.PING, 9))
    assert [f.header.request_id for f in frames] == [7, 9]
    assert frames[0].metadata == metadata
    assert bytes(target.memory) == before
    arrived = max(0, cut - len(metadata))
    assert before == PAYLOAD[:arrived] + bytes(len(before) - arrived)


def test_divert_leaves_other_payloads_alone() -> None:
    target = Target()
    reader = FrameReader(target.route)
    reader.divert(7)
    data = frame(FrameType.DATA, 7, b"", PAYLOAD)
    reader.feed(data[:100])
    reader.divert(6)
    reader.feed(data[100:])
    assert target.memory.startswith(PAYLOAD)


def test_scratch_is_one_payload_for_all() -> None:
    reader = FrameReader(Target().route)
    assert reader.scratch(0) == []
    [first], [second] = reader.scratch(PAYLOAD_BYTES_MAX), reader.scratch(10)
    assert first.obj is second.obj
    assert (len(first), len(second)) == (PAYLOAD_BYTES_MAX, 10)


def test_a_destination_of_another_length_is_our_mistake() -> None:
    reader = FrameReader(lambda header: [memoryview(bytearray(3))])
    with pytest.raises(AssertionError, match="another length"):
        reader.feed(frame(FrameType.DATA, 1, b"", PAYLOAD))


# --- FrameWriter -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 10, 11, 1000])
def test_buffers_go_in_order_and_come_back_when_sent(step: int) -> None:
    writer = FrameWriter()
    returned: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: returned.append(name)

    writer.push([b"0123", memoryview(b"456789")], 10, note("first"))
    writer.push([bytearray(b"x")], 1)
    writer.push([b"abc", b"", b"def"], 6, note("second"))
    writer.push([b"ghi"], 3, note("third"))
    assert writer.queued_bytes == 20
    moved = b""
    while data := take(writer, step):
        moved += data
        assert writer.queued_bytes == 20 - len(moved)
        ends = {"first": 10, "second": 17, "third": 20}
        assert returned == [name for name, end in ends.items() if end <= len(moved)]
    assert moved == b"0123456789xabcdefghi"
    assert (writer.queued_bytes, writer.sent_total) == (0, 20)
    assert writer.buffers() == []


def test_one_call_gets_as_many_buffers_as_it_takes() -> None:
    writer = FrameWriter()
    parts = [bytes([at % 256]) * 3 for at in range(2500)]
    for part in parts:
        writer.push([part], 3)
    calls = []
    while buffers := writer.buffers():
        assert writer.offered_bytes == sum(map(len, buffers))
        calls.append(len(buffers))
        writer.sent(writer.offered_bytes)
    assert calls == [BUFFERS_PER_CALL_MAX, BUFFERS_PER_CALL_MAX, 452]


def test_empty_buffers_are_not_offered_for_ever() -> None:
    writer = FrameWriter()
    writer.push([b"ab", b"", b""], 2)
    take(writer, 2)
    assert writer.buffers() == []


def test_abort_gives_every_buffer_back_once() -> None:
    writer = FrameWriter()
    returned: list[int] = []
    for number in range(4):
        writer.push([bytes(10)], 10, lambda number=number: returned.append(number))
    take(writer, 15)
    assert returned == [0]
    writer.abort()
    writer.abort()
    assert returned == [0, 1, 2, 3]
    assert (writer.queued_bytes, writer.buffers()) == (0, [])


def test_ends_are_found_without_looking_at_all_of_them() -> None:
    """A step of one byte costs the same whatever is queued: 20,000 buffers and 60,000 steps."""
    writer = FrameWriter()
    ended = itertools.count()
    for _ in range(20_000):
        writer.push([b"abc"], 3, lambda: next(ended))  # type: ignore[arg-type, return-value]
    for _ in range(60_000):
        writer.sent(1)
    assert next(ended) == 20_000
