"""Redis, as the distribution has it: one thread, no persistence, no eviction.

A batch is read by MGETs of 8 and written by SETs in one go, which is what cost Redis least where
it was measured: an MGET of 16 MiB takes it more than twice the processor time a byte, and GETs one
by one or with several under way take more at 64 KiB and no less at 1 MiB. Variants:

library     redis-py with hiredis, by TCP. It gives a new object for each value, which is copied
bare        a client of our own (`exchange`), by TCP: values are received where they belong
bare-unix   the same by a unix socket
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from peers.base import Peer, PeerFailed, private_memory
from peers.exchange import Reply, send_all
from peers.servers import Server, connect, first_line, free_port, program_path
from peers.work import Work, split

T = TypeVar("T")

PROGRAM = "redis-server"
OPTIONS = ["--save", "", "--appendonly", "no", "--io-threads", "1", "--daemonize", "no"]
OK = b"+OK\r\n"
# Keys of one MGET.
MGET_KEYS = 8


class RedisServer(Peer):
    """The server, whoever its client is."""

    def __init__(self, work: Work, variant: str = "") -> None:
        super().__init__(work, variant)
        self.names = [[key.hex() for key in work.keys(batch)] for batch in range(work.batches)]
        self.address: str | tuple[str, int]
        self._server: Server | None = None

    def start(self, folder: Path) -> None:
        """Start it and wait until it listens."""
        port, path = free_port(), str(folder / "redis.sock")
        where = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path]
        options = [*OPTIONS, "--dir", str(folder)]
        self._server = Server(
            "redis", [program_path(PROGRAM), *where, *options], folder / "redis.log"
        )
        self.address = path if self.variant.endswith("unix") else ("127.0.0.1", port)
        self._server.until_listening(self.address)
        self.server_pids = [self._server.pid]
        words = first_line([program_path(PROGRAM), "--version"]).split()
        self.versions = f"{PROGRAM} {words[2].removeprefix('v=')}"

    async def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.stop()


class RedisLibrary(RedisServer):
    """By redis-py."""

    async def open(self, folder: Path) -> None:
        """Start the server and connect."""
        self.start(folder)
        redis: Any = importlib.import_module("redis")
        hiredis: Any = importlib.import_module("hiredis")
        assert isinstance(self.address, tuple)
        host, port = self.address
        self._clients = [
            redis.Redis(host, port, protocol=2, single_connection_client=True)
            for _ in range(self.work.lanes)
        ]
        self.memory = private_memory(self.work)
        self.versions += f", redis-py {redis.__version__}, hiredis {hiredis.__version__}"

    @classmethod
    def missing(cls) -> str:
        """Whether the library is there."""
        found = importlib.util.find_spec("redis") and importlib.util.find_spec("hiredis")
        return "" if found else "redis-py and hiredis"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """MGETs, and a copy of each value."""
        values: list[bytes | None] = []
        for names in groups(self.names[batch]):
            values += self._clients[lane].mget(names)
        for block, value in zip(split(into, self.work.block_bytes), values, strict=True):
            if value is None:
                raise PeerFailed("redis: a value is not there")
            block[:] = value

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """SETs in one pipeline."""
        pipeline = self._clients[lane].pipeline(transaction=False)
        for name, block in zip(
            self.names[batch], split(source, self.work.block_bytes), strict=True
        ):
            pipeline.set(name, block)
        if not all(pipeline.execute()):
            raise PeerFailed("redis: a value was not stored")


class RedisBare(RedisServer):
    """By a client of our own."""

    async def open(self, folder: Path) -> None:
        """Start the server and connect."""
        self.start(folder)
        work = self.work
        self._sockets = [connect(self.address) for _ in range(work.lanes)]
        count, size = work.batch, work.block_bytes
        between = f"\r\n${size}\r\n".encode()
        # What comes before the values of a group, and between and after them.
        fixed = [
            [f"*{len(group)}".encode() + between, *[between] * (len(group) - 1), b"\r\n"]
            for group in groups(self.names[0])
        ]
        self._values = [[Reply(of_group) for of_group in fixed] for _ in range(work.lanes)]
        self._stored = [Reply([OK * count]) for _ in range(work.lanes)]
        self._mget = [[command("MGET", *group) for group in groups(names)] for names in self.names]
        self._set = [
            [f"*3\r\n$3\r\nSET\r\n${len(n)}\r\n{n}\r\n${size}\r\n".encode() for n in names]
            for names in self.names
        ]
        self.memory = private_memory(work)
        self.versions += f", no library, Python {sys.version.split()[0]}"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """MGETs, received into place."""
        sock, blocks = self._sockets[lane], groups(split(into, self.work.block_bytes))
        for request, reply, group in zip(
            self._mget[batch], self._values[lane], blocks, strict=True
        ):
            sock.sendall(request)
            reply.receive(sock, group)

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """SETs in one go."""
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


def groups(items: Sequence[T]) -> list[Sequence[T]]:
    """As many at a time as one MGET takes."""
    return [items[at : at + MGET_KEYS] for at in range(0, len(items), MGET_KEYS)]


def command(*words: str) -> bytes:
    """A command as Redis reads it."""
    parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
    return "".join(parts).encode()
