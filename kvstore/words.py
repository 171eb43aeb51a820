"""Words that travel: how a block ended, where it was found, what a peer is.

By their numbers or texts they are on the wire; `kvstore.messages` offers them with the messages
that carry them.
"""

from __future__ import annotations

import enum


class FetchOutcome(enum.IntEnum):
    """How the fetch of one block ended."""

    HIT = 0
    """All asked-for bytes are in the buffer, and their checksums were verified."""
    MISS = 1
    """The block is not stored, or was evicted before it could be sent."""
    CORRUPT = 2
    """Bytes came, and do not match their checksums."""
    TIMEOUT = 3
    """The deadline came first."""
    UNAVAILABLE = 4
    """No peer that should have the block could be asked, or it failed on the way."""


class PutOutcome(enum.IntEnum):
    """How the put of one block ended."""

    STORED = 0
    """The block is stored as the acknowledgement level says."""
    EXISTS = 1
    """The same bytes were there already; nothing was sent."""
    CONFLICT = 2
    """Other bytes are stored under this key; the first stay. Not an error: recomputed KV
    differs in bits."""
    FULL = 3
    """No space could be freed."""
    TIMEOUT = 4
    """The deadline came first."""
    UNAVAILABLE = 5
    """No peer that should take the block could be reached, or it failed on the way."""
    CORRUPT = 6
    """The bytes that arrived do not match the announced checksums; nothing was stored."""


class Tier(enum.IntEnum):
    """Where a block was found."""

    NONE = 0
    ARENA = 1
    SEGMENT = 2
    RELAY = 3
    REMOTE = 4


class ServedBy(enum.IntEnum):
    """Which way a block came to the server that says so, or to the caller."""

    UNKNOWN = 0
    HELD = 1
    """It was there."""
    DIRECT = 2
    RELAY = 3
    PEER = 4


class AckLevel(enum.StrEnum):
    """What has happened to a block when its put is acknowledged."""

    MEMORY = "memory"
    """It is in the daemon's memory."""
    WRITTEN = "written"
    """It was handed to the operating system: survives a crash of the process."""
    SYNCED = "synced"
    """It is on the device: survives a loss of power."""


class FetchSource(enum.StrEnum):
    """Where the server of a fetch may take blocks from. A daemon has its own store only."""

    ANY = "any"
    """Whatever is best. At an agent for engines of its own node only: what it holds, the peer
    that the request names, storage by both paths."""
    RELAY = "relay"
    """An agent: what it holds, and storage by its own storage link; never another agent."""
    PEER = "peer"
    """An agent: what it holds or is about to hold; never storage."""


class Order(enum.StrEnum):
    """Order in which the pieces of a fetch travel."""

    BLOCK = "block"
    LAYER = "layer"


class Role(enum.StrEnum):
    """What a peer is."""

    CLIENT = "client"
    AGENT = "agent"
    DAEMON = "daemon"
    CONTROL = "control"


class Channel(enum.StrEnum):
    """What a connection is for. Reports and cancels never travel behind data."""

    CONTROL = "control"
    DATA = "data"
