"""Messages about memory that two sides share, by one host's memory or by RDMA.

They set up, on the control connection, what FETCH, PUT and VIEW then use: `kvstore.messages` has
those, and the tables of all.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvstore.fields import KEYS_PER_REQUEST_MAX, LEASE_MS_MAX, Message, NamespaceId

# Regions of one session at a time: a pool of buffers, caches of layers, some for staging.
REGIONS_SHARED_MAX = 1024
# Regions that one request names, each with a key for each rail: all that there are, or an engine
# with a buffer a layer and one more for each layer's scales could not say where a block lies.
REGIONS_PER_REQUEST_MAX = REGIONS_SHARED_MAX
RAILS_MAX = 8
# Of each in the metadata of its request, which is 84 KiB for all of them: the names of its fields
# and two numbers of 8 bytes, in MessagePack; and a number of 4 bytes for each rail.
REGION_METADATA_BYTES = 44 + 5 * RAILS_MAX

#: Capabilities in HELLO and WELCOME. `SHM`: memory handed over by a unix socket (SHARE).
#: `VIEWS`: the pool's memory may be mapped (MAP, VIEW). `RDMA`: queue pairs (RAILS).
SHM = "shm"
VIEWS = "views"
RDMA = "rdma"

Number = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class MemoryRegion(Message, frozen=True, kw_only=True):
    """A piece of the asker's memory that the server may reach, for one request.

    Attributes:
        keys: With RDMA the remote key of it on each rail, in the order of RAILS. With shared
            memory one number: that of its SHARE.
        address: With RDMA where it begins, in the asker's process; else 0.
        size_bytes: How much of it.
    """

    keys: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=0xFFFFFFFF)], ...],
        Meta(min_length=1, max_length=RAILS_MAX),
    ]
    address: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    size_bytes: Annotated[int, Meta(ge=1, le=(1 << 62))]


class Memory(Message, frozen=True, kw_only=True):
    """Where the blocks of a request lie in the asker's memory; see `kvstore.memorymap`.

    Attributes:
        regions: What the places are in.
        places: For each block, or for each asked-for layer of each block, 12 bytes: the number
            of a region (4 bytes) and an offset in it (8), little-endian.
        layered: Whether each layer has a place of its own.
    """

    regions: Annotated[
        tuple[MemoryRegion, ...], Meta(min_length=1, max_length=REGIONS_PER_REQUEST_MAX)
    ]
    places: bytes
    layered: bool = False


class Share(Message, frozen=True, kw_only=True):
    """Hands memory to the server; the memfd comes with the bytes of this frame (SCM_RIGHTS).

    Attributes:
        number: Its name in later requests of this session, chosen by the client.
        size_bytes: How much of it.
        inode: Of the memfd, so that one descriptor cannot be taken for another; 0 if it is not
            told.
    """

    number: Number
    size_bytes: Annotated[int, Meta(ge=1, le=(1 << 62))]
    inode: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0


class Unshare(Message, frozen=True, kw_only=True):
    """Takes memory back; the reply comes when the server has unmapped it."""

    number: Number


class Map(Message, frozen=True, kw_only=True):
    """Asks for the memory of the pool of a namespace, to read blocks where they lie."""

    namespace: NamespaceId


class Mapped(Message, frozen=True, kw_only=True):
    """Reply to MAP; the memfd comes with the bytes of this frame, read-only and sealed."""

    size_bytes: Annotated[int, Meta(ge=1, le=(1 << 62))]


class RailAddress(Message, frozen=True, kw_only=True):
    """One end of a queue pair: `kvstore.transport.verbs.QueueAddress`; number 0 for none."""

    number: Annotated[int, Meta(ge=0, le=0xFFFFFF)] = 0
    psn: Annotated[int, Meta(ge=0, le=0xFFFFFF)] = 0
    gid: Annotated[str, Meta(max_length=64)] = ""
    lid: Annotated[int, Meta(ge=0, le=0xFFFF)] = 0
    mtu_bytes: Annotated[int, Meta(ge=256, le=4096)] = 1024


class Rails(Message, frozen=True, kw_only=True):
    """Queue pairs of one side, and in the reply those of the other, place for place.

    A rail for which the other side has none is number 0 in the reply.

    Attributes:
        receives: News that each queue pair of the sender takes before it must be read.
    """

    rails: Annotated[tuple[RailAddress, ...], Meta(min_length=1, max_length=RAILS_MAX)]
    receives: Annotated[int, Meta(ge=1, le=1 << 16)] = 256


class Renew(Message, frozen=True, kw_only=True):
    """Lets leases of VIEW hold for so long from now on."""

    leases: Annotated[tuple[int, ...], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]
    lease_ms: Annotated[int, Meta(ge=1, le=LEASE_MS_MAX)] = 10_000


class RenewReply(Message, frozen=True, kw_only=True):
    """`held`: for each lease, whether it had held until now, and holds on."""

    held: tuple[bool, ...]
