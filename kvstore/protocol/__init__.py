"""The conversation of one connection, sans I/O: who may say what, and when.

`ClientProtocol` and `ServerProtocol` own a `FrameReader` and a `FrameWriter`. The shell
(`kvstore.transport.connection.FrameConnection`) moves bytes between those and a socket; it
calls `receive` when some came and `fill` when the socket can take more. Neither side ever
waits here, and neither looks at a clock.

::

    client                                server
    HELLO (versions, session, channel) →
                                        ← WELCOME (version, limits)   or ERROR
    OPEN_NAMESPACE, LOOKUP, ... →
                                        ← the same type with flag REPLY, or ERROR
    FETCH →
                                        ← DATA* (payload), DONE
    PUT (keys, checksums) →
                                        ← WANT* (blocks to send)
    DATA* (payload) →
                                        ← PUT_DONE

An ERROR carries the id of the request that it refuses; with id 0 it ends the connection.
"""

from __future__ import annotations

from kvstore.protocol.base import FrameProtocol, Reply
from kvstore.protocol.client import ClientProtocol, hello_message
from kvstore.protocol.server import OUTPUT_BYTES_MAX, ServerHooks, ServerProtocol

__all__ = [
    "OUTPUT_BYTES_MAX",
    "ClientProtocol",
    "FrameProtocol",
    "Reply",
    "ServerHooks",
    "ServerProtocol",
    "hello_message",
]
