"""A client that speaks the protocol by hand: one blocking socket, as rude as a test wants."""

from __future__ import annotations

import itertools
import os
import socket
from typing import Any, NamedTuple

from kvstore.checksum import block_seed, layer_checksums
from kvstore.endpoint import parse_endpoint
from kvstore.layout import Geometry, Layout
from kvstore.messages import (
    REPLIES,
    Channel,
    Fetch,
    OpenNamespace,
    Put,
    Role,
    decode,
    encode,
)
from kvstore.protocol import hello_message
from kvstore.wire import (
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameType,
    Header,
    decode_header,
    encode_header,
)

# A test that waits this long for what should take milliseconds has failed.
PATIENCE_S = 60.0


class Received(NamedTuple):
    """A frame from the daemon."""

    header: Header
    message: Any
    payload: bytes


class RawPeer:
    """One connection; use it as a context manager.

    Args:
        uri: Where the daemon listens.
        receive_buffer_bytes: What the kernel may keep for a reader that does not read; 0
            leaves it to the kernel.
        greet: Whether to say HELLO and to wait for the WELCOME.
        node_id: Its name in the HELLO.
    """

    def __init__(
        self,
        uri: str,
        receive_buffer_bytes: int = 0,
        greet: bool = True,
        node_id: str = "raw",
    ) -> None:
        endpoint = parse_endpoint(uri)
        family = socket.AF_UNIX if endpoint.scheme == "unix" else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if receive_buffer_bytes:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            self.sock.settimeout(PATIENCE_S)
            self.sock.connect(endpoint.path or (endpoint.host, endpoint.port))
            self._ids = itertools.count(1)
            if greet:
                hello = hello_message(node_id, Role.CLIENT, os.urandom(16), Channel.DATA)
                self.send(FrameType.HELLO, hello, 0)
                assert self.receive().header.type is FrameType.WELCOME
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *error: object) -> None:
        self.sock.close()

    def send(self, type: FrameType, message: Any, request_id: int | None = None) -> int:
        """Send a frame without payload; returns the request id."""
        number = next(self._ids) if request_id is None else request_id
        metadata = encode(message)
        self.sock.sendall(encode_header(type, number, metadata) + metadata)
        return number

    def send_data(self, request_id: int, index: int, data: bytes) -> None:
        """Send the bytes of one block of a put."""
        for at in range(0, len(data), PAYLOAD_BYTES_MAX):
            part = data[at : at + PAYLOAD_BYTES_MAX]
            header = encode_header(FrameType.DATA, request_id, b"", len(part), index, at)
            self.sock.sendall(header + part)

    def receive(self) -> Received:
        """The next frame, whole."""
        header = decode_header(memoryview(self._exactly(HEADER_BYTES)))
        metadata = self._exactly(header.metadata_length)
        payload = self._exactly(header.payload_length)
        return Received(header, decode(metadata, REPLIES[header.type]), payload)

    def rest(self) -> bytes:
        """All that still comes until the daemon closes the connection."""
        data = bytearray()
        try:
            while part := self.sock.recv(PAYLOAD_BYTES_MAX):
                data += part
        except ConnectionResetError:
            pass
        return bytes(data)

    def call(self, type: FrameType, message: Any) -> Any:
        """Send a request and take its one reply."""
        number = self.send(type, message)
        frame = self.receive()
        assert frame.header.request_id == number
        return frame.message

    def open_namespace(self, layout: Layout, pool: str = "pool") -> bytes:
        """Open a namespace; its id."""
        reply = self.call(FrameType.OPEN_NAMESPACE, OpenNamespace(pool=pool, layout=layout))
        return bytes(reply.namespaces[0].namespace)

    def put(self, namespace: bytes, layout: Layout, keys: list[bytes], blocks: list[bytes]) -> Any:
        """Put blocks; returns the PUT_DONE."""
        offsets = Geometry(layout.layer_bytes).offsets
        checksums = b"".join(
            layer_checksums(
                [block[a:b] for a, b in itertools.pairwise(offsets)], block_seed(namespace, key)
            )
            for key, block in zip(keys, blocks, strict=True)
        )
        put = Put(namespace=namespace, keys=keys, checksums=checksums, deadline_ms=60_000)
        number = self.send(FrameType.PUT, put)
        while (frame := self.receive()).header.type is not FrameType.PUT_DONE:
            for index in frame.message.indices:
                self.send_data(number, index, blocks[index])
        return frame.message

    def ask_for(self, namespace: bytes, layout: Layout, keys: list[bytes]) -> int:
        """Send a FETCH of whole blocks and read nothing; returns its request id."""
        return self.send(
            FrameType.FETCH,
            Fetch(
                namespace=namespace,
                keys=keys,
                layer_first=0,
                layer_last=len(layout.layer_bytes),
                deadline_ms=600_000,
            ),
        )

    def take_fetch(self) -> tuple[bytes, bytes]:
        """Read one fetch to its DONE: all its payload, and the outcomes."""
        payload = bytearray()
        while True:
            frame = self.receive()
            if frame.header.type is FrameType.DATA:
                payload += frame.payload
            elif frame.header.type is FrameType.DONE:
                return bytes(payload), frame.message.outcomes

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.sock.recv(min(size - len(data), PAYLOAD_BYTES_MAX))
            assert part, f"the daemon closed the connection {size - len(data)} bytes too early"
            data += part
        return bytes(data)
