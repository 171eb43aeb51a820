"""LMCache's remote server and the connector by which its engine side speaks to it.

The connector receives into memory that an allocator of the engine hands out; ours hands out the
place where the block belongs. It moves a block at a time; each lane has a connector of its own.

- A put is not answered: the batch ends with an `exists` of its last block, which the server
  answers after it has read what came before.
- The connector sends a head and then the block, and leaves Nagle's algorithm on, which then
  waits for a delayed acknowledgement, 40 ms. We switch it off at our end, in the connector's
  socket; a user of LMCache does not. The server's end has the same pattern and stays as it is.
- The server evicts nothing and its memory grows; a block put again takes the place of the old.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

from peers.base import Peer, PeerFailed, private_memory
from peers.servers import Server, free_port
from peers.work import Work, split

# Nothing about this run goes anywhere.
QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
LIBRARY = "lmcache"


class LMCachePeer(Peer):
    """See the module."""

    def __init__(self, work: Work, variant: str = "") -> None:
        super().__init__(work, variant)
        self._server: Server | None = None
        self._lanes: list[_Lane] = []

    @classmethod
    def missing(cls) -> str:
        """Whether the library is there."""
        found = importlib.util.find_spec(LIBRARY) and importlib.util.find_spec("torch")
        return "" if found else LIBRARY

    async def open(self, folder: Path) -> None:
        """Start the server and connect."""
        os.environ.update(QUIET)
        port = free_port()
        program = [sys.executable, "-P", "-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu"]
        self._server = Server("lmcache.v1.server", program, folder / "lmcache.log", QUIET)
        self._server.until_listening(("127.0.0.1", port))
        self.server_pids = [self._server.pid]
        self._lanes = [_Lane(self.work, port) for _ in range(self.work.lanes)]
        self.memory = private_memory(self.work)
        torch: Any = importlib.import_module("torch")
        version = importlib.metadata.version(LIBRARY)
        self.versions = f"lmcache {version}, torch {torch.__version__}"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """A block after the other, into place."""
        self._lanes[lane].get(batch, into)

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """A block after the other, and a question that is answered when all are there."""
        self._lanes[lane].put(batch, source)

    async def close(self) -> None:
        """Disconnect and end the server."""
        for lane in self._lanes:
            lane.close()
        if self._server is not None:
            self._server.stop()


class _Block:
    """A piece of memory as the connector wants it (a MemoryObj of LMCache)."""

    def __init__(self, view: memoryview, shape: Any, dtype: Any, form: Any) -> None:
        self.byte_array = view
        self._about = (shape, dtype, form)

    def get_shape(self) -> Any:
        return self._about[0]

    def get_dtype(self) -> Any:
        return self._about[1]

    def get_memory_format(self) -> Any:
        return self._about[2]


class _Allocator:
    """The place where the next block belongs, and what the connector asks of its surroundings."""

    def __init__(self, shape: Any, dtype: Any) -> None:
        # The connector computes the size of a whole chunk from it, and does not use it here.
        self.config = _Plain(extra_config=None, use_layerwise=False)
        self.metadata = _Plain(
            get_shapes=lambda: [shape],
            get_dtypes=lambda: [dtype],
            get_num_groups=lambda: 1,
            use_mla=False,
            chunk_size=1,
        )
        self.next: memoryview

    def allocate(self, shape: Any, dtype: Any, form: Any) -> _Block:
        return _Block(self.next, shape, dtype, form)


class _Plain:
    """Some attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _Lane:
    """One connector, with a loop that its own thread runs."""

    def __init__(self, work: Work, port: int) -> None:
        torch: Any = importlib.import_module("torch")
        utils: Any = importlib.import_module("lmcache.utils")
        management: Any = importlib.import_module("lmcache.v1.memory_management")
        module = "lmcache.v1.storage_backend.connector.lm_connector"
        connector: Any = importlib.import_module(module)
        self._block_bytes = work.block_bytes
        self._shape = torch.Size([work.block_bytes, 0, 0, 0])
        self._dtype = torch.uint8
        self._form = management.MemoryFormat.BINARY
        self._keys = [
            [
                utils.CacheEngineKey("peers", 1, 0, int.from_bytes(key[:8], "big"), torch.uint8)
                for key in work.keys(batch)
            ]
            for batch in range(work.batches)
        ]
        self._loop = asyncio.new_event_loop()
        self._allocator = _Allocator(torch.Size([work.block_bytes]), torch.uint8)
        self._connector = connector.LMCServerConnector(
            "127.0.0.1", port, self._loop, self._allocator
        )
        sock = self._connector.client_socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, batch: int, into: memoryview) -> None:
        self._loop.run_until_complete(self._get(batch, into))

    def put(self, batch: int, source: memoryview) -> None:
        self._loop.run_until_complete(self._put(batch, source))

    def close(self) -> None:
        self._connector.client_socket.close()
        self._loop.close()

    async def _get(self, batch: int, into: memoryview) -> None:
        for key, block in zip(self._keys[batch], split(into, self._block_bytes), strict=True):
            self._allocator.next = block
            if await self._connector.get(key) is None:
                raise PeerFailed("lmcache: a block is not there")

    async def _put(self, batch: int, source: memoryview) -> None:
        keys = self._keys[batch]
        for key, block in zip(keys, split(source, self._block_bytes), strict=True):
            await self._connector.put(key, _Block(block, self._shape, self._dtype, self._form))
        if not await self._connector.exists(keys[-1]):
            raise PeerFailed("lmcache: a block was not stored")
