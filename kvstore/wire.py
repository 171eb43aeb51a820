"""The frame format: the only module that knows where a byte of a frame lies.

Every message is one frame: a fixed header, MessagePack metadata, raw payload.

::

     0               4       5       6               8
    +---------------+-------+-------+---------------+
    | magic "KVD1"  |version| type  |     flags     |
    +---------------+-------+-------+---------------+-------------------------------+
  8 |                                  request id                                   |
    +---------------------------------------+---------------------------------------+
 16 |            metadata length            |            payload length             |
    +---------------------------------------+---------------------------------------+
 24 |                 piece                 |             piece offset              |
    +---------------------------------------+---------------------------------------+
 32 |           metadata checksum           |           reserved, zero              |
    +---------------------------------------+---------------------------------------+
 40 |           reserved, zero              |            header checksum            |
    +---------------------------------------+---------------------------------------+
 48   metadata (MessagePack), then payload (raw bytes)

All integers are little-endian. The header checksum (xxh32 of bytes 0 to 43) covers only the
header, so that its lengths can be trusted before anything else is read. `piece` and `piece
offset` say where the payload of a DATA frame belongs (see `kvstore.layout.PieceMap`); they
are in the header and not in the metadata so that the receiver knows the destination before
it reads the payload, and reads it there with one system call. They are zero in other frames,
and only DATA frames have a payload.

A DATA frame with the flag PLACED is news of bytes that came, or come, another way: into
memory that the asker has named (RDMA, shared memory). Its payload length counts them, and
nothing follows the metadata.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from kvstore.checksum import short_checksum
from kvstore.errors import LocalProtocolError, RemoteProtocolError

MAGIC = b"KVD1"
VERSION = 1
#: Versions that this build speaks; HELLO carries the window and WELCOME the choice.
VERSION_MIN = 1
VERSION_MAX = 1

_HEADER = struct.Struct("<4sBBHQIIIIIIII")
_HEADER_BODY = struct.Struct("<4sBBHQIIIIIII")
HEADER_BYTES = 48
assert _HEADER.size == HEADER_BYTES
assert _HEADER_BODY.size == HEADER_BYTES - 4

# 4,096 keys of 64 bytes with their framing are 0.27 MiB, and the checksums announced by a
# PUT may fill the rest; a peer can never make us allocate more than this for one frame.
METADATA_BYTES_MAX = 1024 * 1024
# Large enough that Python's cost a frame vanishes, small enough that a CANCEL, a report or
# another request waits for no more than 1 ms at 10 Gbit/s.
PAYLOAD_BYTES_MAX = 1024 * 1024
# Of bytes that are not in the stream: nobody waits behind them. Any block whole.
PLACED_BYTES_MAX = 256 * 1024 * 1024


class FrameType(enum.IntEnum):
    """What a frame is. Replies have the type of their request and the flag REPLY."""

    HELLO = 1
    WELCOME = 2
    OPEN_NAMESPACE = 3
    NAMESPACES = 4
    LOOKUP = 5
    FETCH = 6
    DATA = 7
    DONE = 8
    PUT = 9
    WANT = 10
    PUT_DONE = 11
    DELETE = 12
    RELEASE = 13
    CLAIM = 14
    CANCEL = 15
    CORRUPT_REPORT = 16
    SUBSCRIBE = 17
    LOAD_REPORT = 18
    STATUS = 19
    SCRUB = 20
    DRAIN = 21
    PING = 22
    GOAWAY = 23
    ERROR = 24
    POOL = 25
    SHARE = 26
    UNSHARE = 27
    MAP = 28
    RAILS = 29
    VIEW = 30
    RENEW = 31


class Flags(enum.IntFlag):
    """Bits of the header's flags field; unknown bits are refused."""

    NONE = 0
    REPLY = 1
    PLACED = 2
    """Of DATA: the payload is no part of the stream."""
    VERIFIED = 4
    """Beside PLACED: the sender has compared the bytes with their checksums where they lie."""


# Plain numbers: arithmetic with enumerations costs a microsecond, on each frame.
_REPLY, _PLACED = int(Flags.REPLY), int(Flags.PLACED)
_TYPES = {int(member): member for member in FrameType}
_FLAGS_KNOWN = int(Flags.REPLY | Flags.PLACED | Flags.VERIFIED)


class Header(NamedTuple):
    """A decoded frame header."""

    type: FrameType
    flags: int
    request_id: int
    metadata_length: int
    payload_length: int
    piece: int
    piece_offset: int
    metadata_checksum: int

    @property
    def stream_bytes(self) -> int:
        """Bytes of payload that follow the metadata in the stream."""
        return 0 if self.flags & _PLACED else self.payload_length


def encode_header(
    type: FrameType,
    request_id: int,
    metadata: bytes = b"",
    payload_length: int = 0,
    piece: int = 0,
    piece_offset: int = 0,
    flags: int = 0,
) -> bytes:
    """The 48 bytes in front of `metadata` and a payload of `payload_length` bytes.

    Raises:
        LocalProtocolError: Metadata or payload are longer than a frame may hold.
    """
    if len(metadata) > METADATA_BYTES_MAX:
        raise LocalProtocolError(
            f"{type.name}: metadata of {len(metadata)} bytes, the limit is {METADATA_BYTES_MAX}"
        )
    payload_bytes_max = PLACED_BYTES_MAX if flags & _PLACED else PAYLOAD_BYTES_MAX
    if payload_length > payload_bytes_max:
        raise LocalProtocolError(
            f"{type.name}: payload of {payload_length} bytes, the limit is {payload_bytes_max}"
        )
    body = _HEADER_BODY.pack(
        MAGIC,
        VERSION,
        type,
        flags,
        request_id,
        len(metadata),
        payload_length,
        piece,
        piece_offset,
        short_checksum(metadata),
        0,
        0,
    )
    return body + short_checksum(body).to_bytes(4, "little")


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Check and decode one header.

    Args:
        data: Exactly `HEADER_BYTES` bytes.

    Raises:
        RemoteProtocolError: Says which field is wrong and what was expected.
    """
    (
        magic,
        version,
        type_number,
        flags,
        request_id,
        metadata_length,
        payload_length,
        piece,
        piece_offset,
        metadata_checksum,
        reserved_low,
        reserved_high,
        header_checksum,
    ) = _HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"magic is {magic!r}, expected {MAGIC!r}: not our protocol")
    actual = short_checksum(bytes(data[: HEADER_BYTES - 4]))
    if actual != header_checksum:
        raise RemoteProtocolError(
            f"header checksum is {header_checksum:#010x}, its bytes give {actual:#010x}"
        )
    if not VERSION_MIN <= version <= VERSION_MAX:
        raise RemoteProtocolError(
            f"frame version {version}, this side speaks {VERSION_MIN} to {VERSION_MAX}"
        )
    frame_type = _TYPES.get(type_number)
    if frame_type is None:
        raise RemoteProtocolError(f"unknown frame type {type_number}")
    if flags & ~_FLAGS_KNOWN:
        raise RemoteProtocolError(f"unknown flags {flags:#06x}")
    if reserved_low or reserved_high:
        raise RemoteProtocolError("reserved bytes are not zero")
    if metadata_length > METADATA_BYTES_MAX:
        raise RemoteProtocolError(
            f"metadata of {metadata_length} bytes, the limit is {METADATA_BYTES_MAX}"
        )
    if flags > _REPLY and (frame_type is not FrameType.DATA or not flags & _PLACED):
        raise RemoteProtocolError(f"flags {flags:#06x} of a {frame_type.name}: only DATA is placed")
    payload_bytes_max = PLACED_BYTES_MAX if flags & _PLACED else PAYLOAD_BYTES_MAX
    if payload_length > payload_bytes_max:
        raise RemoteProtocolError(
            f"payload of {payload_length} bytes, the limit is {payload_bytes_max}"
        )
    if frame_type is not FrameType.DATA and (payload_length or piece or piece_offset):
        raise RemoteProtocolError(
            f"{frame_type.name} with a payload of {payload_length} bytes for byte"
            f" {piece_offset} of piece {piece}: only DATA has one"
        )
    return Header(
        frame_type,
        flags,
        request_id,
        metadata_length,
        payload_length,
        piece,
        piece_offset,
        metadata_checksum,
    )
