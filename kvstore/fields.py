"""What fields of messages may hold: bounds with their reasons, and the types made of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvstore.layout import KEY_BYTES_MAX, KEY_BYTES_MIN, NAMESPACE_ID_BYTES

# Bounds the work of one frame on the server's loop to about 2 ms, and the size of a reply.
KEYS_PER_REQUEST_MAX = 4096
NAMESPACES_PER_LOOKUP_MAX = 256  # more ranks than any published deployment has
# Keys times namespaces of one LOOKUP: 8 ranks for 4,096 keys twice over, about 5 ms of work.
LOOKUP_PROBES_MAX = 65_536
LEASE_MS_MAX = 60_000
DEADLINE_MS_MAX = 600_000
# The longest array in any message has an item a key (or a namespace of a daemon). Decoders
# allocate what an array claims to hold, and arrays nest: 4,096 items are 32 KiB a level.
ARRAY_ITEMS_MAX = KEYS_PER_REQUEST_MAX
# Names that engines give their requests: a UUID and some words around it.
REQUEST_NAME_MAX = 256
NODE_ID_MAX = 256
ENDPOINT_MAX = 512  # a host name has 253 characters (RFC 1035), a path of a unix socket 107
# What went wrong behind a server, told with the end of a request.
REASONS_MAX = 8
REASON_MAX = 300

Key = Annotated[bytes, Meta(min_length=KEY_BYTES_MIN, max_length=KEY_BYTES_MAX)]
NamespaceId = Annotated[bytes, Meta(min_length=NAMESPACE_ID_BYTES, max_length=NAMESPACE_ID_BYTES)]
Keys = Annotated[list[Key], Meta(min_length=1, max_length=KEYS_PER_REQUEST_MAX)]
#: Where blocks lie: so many keys of a request, one after the other, are of the extent whose
#: first key is this one. Agents need it, since that key is often not among those of the
#: request; daemons do not. Without it each key is an extent of its own.
Extents = Annotated[
    tuple[tuple[Annotated[int, Meta(ge=1, le=KEYS_PER_REQUEST_MAX)], Key], ...],
    Meta(max_length=KEYS_PER_REQUEST_MAX),
]
Reason = Annotated[str, Meta(max_length=REASON_MAX)]
Reasons = Annotated[tuple[Reason, ...], Meta(max_length=REASONS_MAX)]
DeadlineMs = Annotated[int, Meta(ge=0, le=DEADLINE_MS_MAX)]
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
RequestName = Annotated[str, Meta(min_length=1, max_length=REQUEST_NAME_MAX)]
Attempt = Annotated[int, Meta(ge=0, le=(1 << 62))]


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all messages."""
