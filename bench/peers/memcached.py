"""memcached, as the distribution has it: two threads, memory for everything twice.

Items of 1 MiB need `-I`, and chunks of half a MiB, which are asked for in bytes. Variants:

library   pymemcache: `get_many` and `set_many` of a batch, with replies. Values are new objects,
          which are copied, and go out as copies, since it takes nothing else
bare      a client of our own (`exchange`): values are received where they belong
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from peers.base import CALL_TIMEOUT_S, Peer, PeerFailed, private_memory
from peers.exchange import Reply, send_all
from peers.servers import Server, connect, first_line, free_port, program_path
from peers.work import Work, split

PROGRAM = "memcached"
MIB = 1024 * 1024
OPTIONS = ["-I", "8m", "-t", "2", "-o", "slab_chunk_max=524288"]
# Slabs of sizes that are not used, beside the items twice: size classes lie a quarter apart.
SPARE_MIB = 256


class MemcachedServer(Peer):
    """The server, whoever its client is."""

    def __init__(self, work: Work, variant: str = "") -> None:
        super().__init__(work, variant)
        self.names = [[key.hex() for key in work.keys(batch)] for batch in range(work.batches)]
        self.address: tuple[str, int]
        self._server: Server | None = None

    def start(self, folder: Path) -> None:
        """Start it and wait until it listens."""
        port = free_port()
        memory_mib = 2 * self.work.stored_bytes // MIB + SPARE_MIB
        # It refuses to run as root unless it is told to.
        user = ["-u", "root"] if os.geteuid() == 0 else []
        where = ["-l", "127.0.0.1", "-p", str(port), "-U", "0", "-m", str(memory_mib)]
        program = [program_path(PROGRAM), *user, *where, *OPTIONS]
        self._server = Server("memcached", program, folder / "memcached.log")
        self.address = ("127.0.0.1", port)
        self._server.until_listening(self.address)
        self.server_pids = [self._server.pid]
        self.versions = first_line([program_path(PROGRAM), "--version"])

    async def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.stop()


class MemcachedLibrary(MemcachedServer):
    """By pymemcache."""

    async def open(self, folder: Path) -> None:
        """Start the server and connect."""
        self.start(folder)
        pymemcache: Any = importlib.import_module("pymemcache")
        options = {"timeout": CALL_TIMEOUT_S, "connect_timeout": CALL_TIMEOUT_S, "no_delay": True}
        self._clients = [pymemcache.Client(self.address, **options) for _ in range(self.work.lanes)]
        self.memory = private_memory(self.work)
        self.versions += f", pymemcache {pymemcache.__version__}"

    @classmethod
    def missing(cls) -> str:
        """Whether the library is there."""
        return "" if importlib.util.find_spec("pymemcache") else "pymemcache"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """One request, and a copy of each value."""
        names = self.names[batch]
        values = self._clients[lane].get_many(names)
        if len(values) != len(names):
            raise PeerFailed(f"memcached: {len(names) - len(values)} values are not there")
        for block, name in zip(split(into, self.work.block_bytes), names, strict=True):
            block[:] = values[name]

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """All in one go, with replies."""
        blocks = map(bytes, split(source, self.work.block_bytes))
        values = dict(zip(self.names[batch], blocks, strict=True))
        failed = self._clients[lane].set_many(values, noreply=False)
        if failed:
            raise PeerFailed(f"memcached: {len(failed)} values were not stored")


class MemcachedBare(MemcachedServer):
    """By a client of our own."""

    async def open(self, folder: Path) -> None:
        """Start the server and connect."""
        self.start(folder)
        work = self.work
        self._sockets = [connect(self.address) for _ in range(work.lanes)]
        size = work.block_bytes
        self._get = [f"get {' '.join(names)}\r\n".encode() for names in self.names]
        self._set = [[f"set {n} 0 0 {size}\r\n".encode() for n in names] for names in self.names]
        self._stored = [Reply([b"STORED\r\n" * work.batch]) for _ in range(work.lanes)]
        self.memory = private_memory(work)
        self.versions += f", no library, Python {sys.version.split()[0]}"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """One request, received into place."""
        sock = self._sockets[lane]
        sock.sendall(self._get[batch])
        blocks = split(into, self.work.block_bytes)
        reply_to_get(self.names[batch], self.work.block_bytes).receive(sock, blocks)

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """All in one go, with replies."""
        parts: list[bytes | memoryview] = []
        for head, block in zip(self._set[batch], split(source, self.work.block_bytes), strict=True):
            parts += (head, block, b"\r\n")
        send_all(self._sockets[lane], parts)
        self._stored[lane].receive(self._sockets[lane], [])

    async def close(self) -> None:
        """Disconnect and end the server."""
        for sock in getattr(self, "_sockets", []):
            sock.close()
        await super().close()


def reply_to_get(names: list[str], block_bytes: int) -> Reply:
    """What memcached says when all of them are there."""
    heads = [f"VALUE {name} 0 {block_bytes}\r\n".encode() for name in names]
    return Reply([heads[0], *(b"\r\n" + head for head in heads[1:]), b"\r\nEND\r\n"])
