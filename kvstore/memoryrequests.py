"""Requests about memory: what a connection of a server answers to SHARE, RAILS, MAP, VIEW.

Thread rule: the server's loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from kvstore.errors import (
    KVStoreError,
    LocalProtocolError,
    PermissionDenied,
    RefusedError,
    TransportError,
    Unsupported,
)
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import (
    RDMA,
    SHM,
    VIEWS,
    Map,
    Mapped,
    Rails,
    Renew,
    RenewReply,
    Share,
    Unshare,
)
from kvstore.messages import Empty, Message, View
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.views import SessionViews
from kvstore.wire import FrameType

if TYPE_CHECKING:
    from kvstore.session import ServerConnection, Session

# Of a session whose last queue pair has failed, so that it hears how its requests have ended.
LAST_WORDS_S = 0.1


class MemoryRequests:
    """Answers one connection.

    Attributes:
        trusted: Whether the process at the other end may hand memory over, and map ours: the
            kernel says whose it is.
    """

    def __init__(self, connection: ServerConnection, trusted: bool) -> None:
        self._connection = connection
        self.trusted = trusted

    def capabilities(self) -> tuple[str, ...]:
        """Ways into memory that the client may choose from."""
        server = self._connection.server
        if self._connection.link in server.rdma:
            return (RDMA,)
        if not self.trusted:
            return ()
        return (SHM, VIEWS) if server.views is not None else (SHM,)

    def share(self, request_id: int, message: Share) -> None:
        """SHARE: map a region."""
        session, fd = self._connection.session, self._connection.connection.stream.take_descriptor()
        assert session is not None
        if fd is None:
            if not self.trusted:
                raise PermissionDenied(
                    "memory can be handed over on a unix socket, by processes of the users"
                    f" {sorted(self._connection.server.options.memory_uids)}"
                )
            raise RefusedError("SHARE without a descriptor")
        if message.inode and os.fstat(fd).st_ino != message.inode:
            os.close(fd)
            raise RefusedError(f"SHARE of region {message.number}: another descriptor came along")
        shared, number = session.memory.shared, message.number
        region = shared.share(number, message.size_bytes, fd)

        async def populated() -> Message:
            try:
                # Thousands of pages to map: not on the loop.
                await self._connection.server.loop.run_in_executor(None, region.populate)
            except KVStoreError:
                shared.unshare(number).close()
                raise
            return Empty()

        try:
            self._connection.answer(FrameType.SHARE, request_id, populated(), lambda reply: reply)
        except KVStoreError:
            shared.unshare(number).close()
            raise

    def unshare(self, request_id: int, message: Unshare) -> None:
        """UNSHARE: unmap one."""
        assert self._connection.session is not None
        region = self._connection.session.memory.shared.unshare(message.number)
        # Begun now: it is to be done also if the connection ends before its turn.
        closing = self._connection.server.loop.run_in_executor(None, region.close)

        async def closed() -> Message:
            await asyncio.shield(closing)
            return Empty()

        self._connection.answer(FrameType.UNSHARE, request_id, closed(), lambda reply: reply)

    def rails(self, request_id: int, message: Rails) -> None:
        """RAILS: connect queue pairs."""
        session, node = (
            self._connection.session,
            self._connection.server.rdma.get(self._connection.link),
        )
        assert session is not None
        if node is None:
            raise Unsupported(
                f"{self._connection.link} was not set up for RDMA (listen on rdma://...)"
            )
        if session.memory.end is not None:
            raise LocalProtocolError("RAILS for the second time in one session")
        try:
            end = node.end(self._connection.peer_name(), active=True)
            session.memory.end = end
            end.on_failed = partial(self._rail_failed, session, end)
            end.connect(message)
            reply = end.addresses()
            for reason in end.left_out:
                self._connection.server.note(logging.WARNING, "a rail is left out: %s", reason)
        except TransportError as error:
            if session.memory.end is not None:
                session.memory.end.close()
                session.memory.end = None
            raise RefusedError(str(error)) from error
        self._connection.protocol.reply(FrameType.RAILS, request_id, reply)

    def _rail_failed(self, session: Session, end: RdmaEnd, error: Exception) -> None:
        """A queue pair is gone. With the last one the session is of no use: its client makes a
        new one, when it has heard how its requests have ended."""
        server = self._connection.server
        server.counters["rdma_queue_failures"] += 1
        server.note(logging.WARNING, "rdma to %s: %s", self._connection.peer_name(), error)
        if end.failed is not None:
            server.loop.call_later(LAST_WORDS_S, session.close, error)

    def map(self, request_id: int, message: Map) -> None:
        """MAP: hand our memory over, to be read."""
        views = self._session_views()
        self._connection.server.source.layer_bytes(message.namespace)  # whether it is open here
        self._connection.connection.stream.send_descriptor(views.memory.fd)
        reply = Mapped(size_bytes=views.memory.region.size_bytes)
        self._connection.protocol.reply(FrameType.MAP, request_id, reply)

    def view(self, request_id: int, message: View) -> None:
        """VIEW: find blocks where they lie."""
        self._connection.protocol.check_room(request_id)
        source, fetch = self._connection.server.source, message.fetch
        views, session = self._session_views(), self._connection.session
        assert session is not None
        pieces = PieceMap(Geometry(source.layer_bytes(fetch.namespace)), len(fetch.keys))
        sink = views.sink(
            fetch.namespace,
            fetch.keys,
            pieces,
            message.lease_ms,
            message.verify,
            self._connection.strands,
        )
        stream = source.fetch(fetch.namespace, fetch.keys, pieces, session, fetch)
        stream.locate = True
        self._connection.begin(request_id, fetch.deadline_ms)
        self._connection.protocol.add_fetch(request_id, stream, fetch.priority, sink)
        self._connection.cancelled_early(request_id)

    def renew(self, request_id: int, message: Renew) -> None:
        """RENEW: let leases of views hold."""
        assert self._connection.session is not None
        views = self._connection.session.views
        held = (
            views.renew(message.leases, message.lease_ms)
            if views is not None
            else [False] * len(message.leases)
        )
        self._connection.protocol.reply(FrameType.RENEW, request_id, RenewReply(held=tuple(held)))

    def _session_views(self) -> SessionViews:
        """The views of this client.

        Raises:
            Unsupported: This server has none.
            PermissionDenied: Not for this client.
        """
        session, memory = self._connection.session, self._connection.server.views
        assert session is not None
        if memory is None:
            raise Unsupported(
                "memory is mapped only where a process serves one pool and no other (--pool)"
            )
        if not self.trusted:
            raise PermissionDenied(
                "memory can be mapped over a unix socket, by processes of the users"
                f" {sorted(self._connection.server.options.memory_uids)}"
            )
        if session.views is None:
            session.views = SessionViews(self._connection.server.loop, memory)
        return session.views

    def drop_descriptor(self) -> None:
        """Close the descriptor that came with a request which was not read."""
        fd = self._connection.connection.stream.take_descriptor()
        if fd is not None:
            os.close(fd)


__all__ = ["MemoryRequests"]
