"""The limit: a bare TCP connection on loopback between two processes, `sendall` and `recv_into`.

No keys, no index, no checksums, and no requests: who reads says once where it begins, and is
sent one block after the other until it hangs up. A put ends when the other end has said that all
is there. What is sent are the blocks of the work, so that they can be compared as everybody's.

    header   kind (1 byte: r or w), first byte, bytes (8 each): a read begins again at the first
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

from peers.base import Peer, PeerFailed, private_memory
from peers.servers import Server, connect, free_port
from peers.work import Work, split

HEADER = struct.Struct("<cQQ")
RECEIVED = b"r"


class RawPeer(Peer):
    """See the module."""

    lanes_max = 1
    in_order = True

    def __init__(self, work: Work, variant: str = "") -> None:
        super().__init__(work, variant)
        self._server: Server | None = None
        self._reading: socket.socket | None = None
        self._writing: socket.socket | None = None
        self._written = 0

    async def open(self, folder: Path) -> None:
        """Start the other end, which touches as much memory as a server would have."""
        work, port = self.work, free_port()
        self.memory = private_memory(work)
        arguments = [str(port), str(work.stored_bytes), str(work.block_bytes)]
        program = [sys.executable, "-P", "-m", "peers.raw", *arguments]
        self._server = Server("raw", program, folder / "raw.log")
        self._address = ("127.0.0.1", port)
        self._server.until_listening(self._address)
        self.server_pids = [self._server.pid]
        self.versions = f"Python {sys.version.split()[0]}"

    def rewind(self) -> None:
        """Begin a stream at the first batch."""
        self._hang_up()
        self._reading = connect(self._address)
        size = self.work.read_batches * self.work.batch_bytes
        self._reading.sendall(HEADER.pack(b"r", 0, size))

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """Receive what comes next."""
        assert self._reading is not None
        for block in split(into, self.work.block_bytes):
            receive(self._reading, block)

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """Send a batch; the first says that there will be more."""
        if self._writing is None:
            self._hang_up()
            begin = batch * self.work.batch_bytes
            self._writing = connect(self._address)
            self._writing.sendall(HEADER.pack(b"w", begin, self.work.stored_bytes - begin))
        for block in split(source, self.work.block_bytes):
            self._writing.sendall(block)

    def settle(self) -> None:
        """Hang up, and wait until the other end has all."""
        if self._writing is not None:
            self._writing.shutdown(socket.SHUT_WR)
            said = self._writing.recv(1)
            self._writing.close()
            self._writing = None
            if said != RECEIVED:
                raise PeerFailed("raw: the other end did not receive all")

    def read_back(self, batch: int, into: memoryview) -> None:
        """A batch by itself, which the stream does not give."""
        self._hang_up()
        size = self.work.batch_bytes
        with connect(self._address) as sock:
            sock.sendall(HEADER.pack(b"r", batch * size, size))
            receive(sock, into)

    def _hang_up(self) -> None:
        """End the stream that is read: the other end has one connection at a time."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    async def close(self) -> None:
        """Hang up and end the other end."""
        self._hang_up()
        if self._writing is not None:
            self._writing.close()
        if self._server is not None:
            self._server.stop()


def receive(sock: socket.socket, view: memoryview) -> None:
    """Fill `view`.

    Raises:
        PeerFailed: The other end hung up.
    """
    got = sock.recv_into(view)
    while got < len(view):
        more = sock.recv_into(view[got:])
        if not more:
            raise PeerFailed("raw: the other end hung up")
        got += more


# --- the other end ---------------------------------------------------------------------------


def serve(port: int, size: int, block_bytes: int) -> None:
    """Serve one connection after the other, for ever."""
    memory = memoryview(bytearray(size))
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    _stream(sock, memory, block_bytes)
                except (ConnectionError, PeerFailed):
                    pass  # who reads hangs up when it has enough


def _stream(sock: socket.socket, memory: memoryview, block_bytes: int) -> None:
    header = bytearray(HEADER.size)
    receive(sock, memoryview(header))
    kind, first, size = HEADER.unpack(header)
    at = first
    if kind == b"r":
        while True:
            sock.sendall(memory[at : at + block_bytes])
            at += block_bytes
            if at == first + size:
                at = first
    while got := sock.recv_into(memory[at : at + block_bytes]):
        at += got
    sock.sendall(RECEIVED)


if __name__ == "__main__":
    serve(*(int(word) for word in sys.argv[1:]))
