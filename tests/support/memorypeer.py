"""A client that hands memory over by hand, and what a process has mapped and open."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvstore.buffers import Region
from kvstore.checksum import block_seed, layer_checksums
from kvstore.layout import Geometry, Layout
from kvstore.memorymessages import Memory, MemoryRegion, Share, Unshare
from kvstore.messages import REPLIES, Error, Fetch, Put, decode, encode
from kvstore.wire import HEADER_BYTES, FrameType, decode_header, encode_header
from tests.support.rawpeer import RawPeer, Received


class MemoryPeer(RawPeer):
    """As `RawPeer`, on a unix socket."""

    def __enter__(self) -> MemoryPeer:
        return self

    def receive(self) -> Received:
        """The next frame; of one that is placed no payload follows."""
        header = decode_header(memoryview(self._exactly(HEADER_BYTES)))
        metadata = self._exactly(header.metadata_length)
        payload = self._exactly(header.stream_bytes)
        return Received(header, decode(metadata, REPLIES[header.type]), payload)

    def send_with(self, fds: Sequence[int], type: FrameType, message: Any) -> int:
        """Send a frame, or raw metadata, and descriptors with its first byte; its id."""
        number = next(self._ids)
        metadata = message if isinstance(message, bytes) else encode(message)
        data = encode_header(type, number, metadata) + metadata
        if fds:
            assert socket.send_fds(self.sock, [data], fds) == len(data)
        else:
            self.sock.sendall(data)
        return number

    def share(self, number: int, size_bytes: int, *fds: int) -> Any:
        """Hand memory over; what the server says to it."""
        sent = self.send_with(fds, FrameType.SHARE, Share(number=number, size_bytes=size_bytes))
        frame = self.receive()
        assert frame.header.request_id == sent
        return frame.message

    def unshare(self, number: int) -> Any:
        """Take memory back; what the server says to it."""
        return self.call(FrameType.UNSHARE, Unshare(number=number))

    def fetch_into(
        self, namespace: bytes, layout: Layout, keys: list[bytes], memory: Memory
    ) -> Any:
        """Fetch whole blocks into memory; the DONE, or the refusal."""
        fetch = Fetch(
            namespace=namespace,
            keys=keys,
            layer_first=0,
            layer_last=len(layout.layer_bytes),
            deadline_ms=60_000,
            memory=memory,
        )
        self.send(FrameType.FETCH, fetch)
        while (frame := self.receive()).header.type is FrameType.DATA:
            pass
        return frame.message

    def put_from(
        self,
        namespace: bytes,
        layout: Layout,
        keys: list[bytes],
        blocks: Sequence[bytes],
        memory: Memory,
    ) -> Any:
        """Put blocks that lie in memory; the PUT_DONE, or the refusal."""
        offsets = Geometry(layout.layer_bytes).offsets
        checksums = b"".join(
            layer_checksums([block[a:b] for a, b in pairwise(offsets)], block_seed(namespace, key))
            for key, block in zip(keys, blocks, strict=True)
        )
        put = Put(
            namespace=namespace, keys=keys, checksums=checksums, deadline_ms=60_000, memory=memory
        )
        self.send(FrameType.PUT, put)
        return self.receive().message


def places(*found: tuple[int, int]) -> bytes:
    """Places of blocks, as (region, offset)."""
    return b"".join(struct.pack("<IQ", *place) for place in found)


def in_region(number: int, size_bytes: int, *offsets: int) -> Memory:
    """Blocks at these offsets of a region."""
    region = MemoryRegion(keys=(number,), size_bytes=size_bytes)
    return Memory(regions=(region,), places=places(*((0, offset) for offset in offsets)))


def refused(reply: Any, words: str) -> bool:
    """Whether a reply is a refusal that says so."""
    assert isinstance(reply, Error), reply
    assert words in reply.message, reply.message
    return True


def memfd(size_bytes: int, seals: int = fcntl.F_SEAL_SHRINK, name: str = "foreign") -> int:
    """Memory with seals of one's own choice."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def marked(size_bytes: int, mark: int) -> Region:
    """Memory that is full of a byte."""
    region = Region(size_bytes, "marked")
    region.view[:] = bytes([mark]) * size_bytes
    return region


def mappings(pid: int | str, *names: str) -> list[str]:
    """Memory of clients that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if any(f"memfd:{name}" in line for name in names)]


def descriptors(pid: int | str) -> list[str]:
    """What a process has open, by what it is."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(entry.path).split(":")[0])
        except OSError:
            continue  # that of this scan
    return sorted(found)
