"""Work requests for consecutive bytes: local pieces on one side, ranges of a peer on the other.

::

    local     |   a   | b |        c        |         buffers, wherever they lie
    peer      |     range 0     |  range 1  |         contiguous each
    requests  |  a, b, some of c| rest of c |         one a range, unless a limit cuts it

Blocks that lie side by side, here or there, are one piece or one range.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.memorymap import Span
from kvstore.transport.rdma_memory import Registrations
from kvstore.transport.shm import address_of
from kvstore.transport.verbs import Opcode, Piece, Work

#: Address and remote key of a peer's memory, and how many bytes.
Range = tuple[int, int, int]


def remote_ranges(
    spans: Sequence[Span], addresses: Sequence[int], keys: Sequence[int]
) -> list[Range]:
    """The ranges of a peer's memory, in order.

    Args:
        spans: In regions of it, by number.
        addresses, keys: Of those regions.
    """
    ranges: list[Range] = []
    region, begin, end = -1, 0, 0
    for number, at, size in spans:
        if number == region and at == end:
            end += size
            continue
        if end > begin:
            ranges.append((addresses[region] + begin, keys[region], end - begin))
        region, begin, end = number, at, at + size
    if end > begin:
        ranges.append((addresses[region] + begin, keys[region], end - begin))
    return ranges


def local_pieces(
    buffers: Sequence[memoryview], memory: Registrations, place: int
) -> list[tuple[int, int, int]]:
    """Address, length and local key of what buffers are, in order.

    Args:
        place: Of the rail.

    Raises:
        LocalProtocolError: A buffer is not registered.
    """
    pieces: list[tuple[int, int, int]] = []
    get = memory.get
    begin = end = key = 0
    for buffer in buffers:
        size = buffer.nbytes
        if not size:
            continue
        address = address_of(buffer)
        lkey = get(address, size).lkeys[place]
        if address == end and lkey == key:
            end += size
            continue
        if end > begin:
            pieces.append((begin, end - begin, key))
        begin, end, key = address, address + size, lkey
    if end > begin:
        pieces.append((begin, end - begin, key))
    return pieces


def cut(
    opcode: Opcode,
    first_id: int,
    ranges: Sequence[Range],
    pieces: Sequence[tuple[int, int, int]],
    pieces_max: int,
    bytes_max: int,
) -> list[Work]:
    """Work requests between as many bytes on both sides, none of them signalled.

    Args:
        first_id: Their ids count from here.
        pieces_max, bytes_max: Of one request.
    """
    works: list[Work] = []
    rest = iter(pieces)
    address = lkey = left = 0
    for remote, rkey, size in ranges:
        while size:
            room = min(size, bytes_max)
            taken = 0
            gathered: list[Piece] = []
            while taken < room and len(gathered) < pieces_max:
                if not left:
                    address, left, lkey = next(rest)
                part = min(left, room - taken)
                gathered.append(Piece(address, part, lkey))
                address += part
                left -= part
                taken += part
            works.append(Work(first_id + len(works), opcode, gathered, remote, rkey))
            remote += taken
            size -= taken
    assert not left, "both sides have as many bytes"
    return works


__all__ = ["Range", "cut", "local_pieces", "remote_ranges"]
