"""Frame headers: where every field lies, and what is refused."""

from __future__ import annotations

import struct

import pytest

from kvstore.checksum import short_checksum
from kvstore.errors import LocalProtocolError, RemoteProtocolError
from kvstore.wire import (
    HEADER_BYTES,
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    Flags,
    FrameType,
    Header,
    decode_header,
    encode_header,
)

HEADER = Header(FrameType.DATA, Flags.REPLY, 1 << 63, 3, 1024, 5, 6, short_checksum(b"abc"))


def encoded() -> bytes:
    return encode_header(FrameType.DATA, 1 << 63, b"abc", 1024, 5, 6, Flags.REPLY)


def changed(offset: int, data: bytes, header: bytes | None = None) -> bytes:
    """A header with some bytes replaced and a checksum that is right again."""
    body = bytearray((header or encoded())[:-4])
    body[offset : offset + len(data)] = data
    return bytes(body) + short_checksum(bytes(body)).to_bytes(4, "little")


def test_every_field_lies_where_the_picture_says() -> None:
    data = encoded()
    assert len(data) == HEADER_BYTES == 48
    assert data[0:4] == b"KVD1"
    assert data[4] == 1
    assert data[5] == FrameType.DATA == 7
    assert struct.unpack_from("<H", data, 6) == (1,)
    assert struct.unpack_from("<Q", data, 8) == (1 << 63,)
    assert struct.unpack_from("<II", data, 16) == (3, 1024)
    assert struct.unpack_from("<II", data, 24) == (5, 6)
    assert struct.unpack_from("<I", data, 32) == (short_checksum(b"abc"),)
    assert data[36:44] == bytes(8)
    assert struct.unpack_from("<I", data, 44) == (short_checksum(data[:44]),)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_header_comes_back_as_it_went(kind: type) -> None:
    assert decode_header(kind(encoded())) == HEADER


def test_the_numbers_of_frame_types_never_change() -> None:
    assert [(member.name, member.value) for member in FrameType] == [
        ("HELLO", 1),
        ("WELCOME", 2),
        ("OPEN_NAMESPACE", 3),
        ("NAMESPACES", 4),
        ("LOOKUP", 5),
        ("FETCH", 6),
        ("DATA", 7),
        ("DONE", 8),
        ("PUT", 9),
        ("WANT", 10),
        ("PUT_DONE", 11),
        ("DELETE", 12),
        ("RELEASE", 13),
        ("CLAIM", 14),
        ("CANCEL", 15),
        ("CORRUPT_REPORT", 16),
        ("SUBSCRIBE", 17),
        ("LOAD_REPORT", 18),
        ("STATUS", 19),
        ("SCRUB", 20),
        ("DRAIN", 21),
        ("PING", 22),
        ("GOAWAY", 23),
        ("ERROR", 24),
        ("POOL", 25),
        ("SHARE", 26),
        ("UNSHARE", 27),
        ("MAP", 28),
        ("RAILS", 29),
        ("VIEW", 30),
        ("RENEW", 31),
    ]


def test_every_flipped_bit_is_noticed() -> None:
    data = encoded()
    for bit in range(8 * HEADER_BYTES):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            decode_header(broken)


@pytest.mark.parametrize(
    ("offset", "data", "complaint"),
    [
        (0, b"HTTP", "magic is b'HTTP', expected b'KVD1'"),
        (4, b"\0", "frame version 0, this side speaks 1 to 1"),
        (4, b"\2", "frame version 2, this side speaks 1 to 1"),
        (5, b"\0", "unknown frame type 0"),
        (5, b"\x20", "unknown frame type 32"),
        (6, b"\x08\0", "unknown flags 0x0008"),
        (6, b"\4\0", "only DATA is placed"),
        (6, b"\1\x80", "unknown flags 0x8001"),
        (36, b"\1", "reserved bytes are not zero"),
        (43, b"\1", "reserved bytes are not zero"),
        (16, struct.pack("<I", METADATA_BYTES_MAX + 1), "1048577 bytes, the limit is 1048576"),
        (20, struct.pack("<I", PAYLOAD_BYTES_MAX + 1), "1048577 bytes, the limit is 1048576"),
        (5, bytes([FrameType.PING]), "PING with a payload of 1024 bytes"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(offset: int, data: bytes, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode_header(changed(offset, data))


@pytest.mark.parametrize("offset", [20, 24, 28])
def test_only_data_has_a_payload_and_a_place_for_it(offset: int) -> None:
    ping = encode_header(FrameType.PING, 1)
    assert decode_header(ping).type is FrameType.PING
    with pytest.raises(RemoteProtocolError, match="only DATA"):
        decode_header(changed(offset, b"\1", ping))


def test_what_we_send_has_limits_too() -> None:
    longest = encode_header(FrameType.DATA, 1, bytes(METADATA_BYTES_MAX), PAYLOAD_BYTES_MAX)
    assert decode_header(longest).payload_length == PAYLOAD_BYTES_MAX
    with pytest.raises(LocalProtocolError, match="1048577 bytes, the limit is 1048576"):
        encode_header(FrameType.LOOKUP, 1, bytes(METADATA_BYTES_MAX + 1))
    with pytest.raises(LocalProtocolError, match="1048577 bytes, the limit is 1048576"):
        encode_header(FrameType.DATA, 1, b"", PAYLOAD_BYTES_MAX + 1)
