"""Mooncake Store by its Python library: a master, a storage node, and a client without memory.

Batches go by `batch_put_from` and `batch_get_into`, out of and into memory that is registered;
16 calls of one block side by side were far slower where it was measured. TCP, since there is no
RDMA on loopback; peers find each other by handshake (`P2PHANDSHAKE`), so nothing else runs.

- A block that is there is not stored again, and the put says that it was: so the blocks are
  removed before (`forget`).
- Leases are left at 5 s: a get whose lease ends while it is under way fails.
- The transfer engine's ports are open on all interfaces, and it has no option about that.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.base import Peer, PeerFailed, private_memory
from peers.servers import Server, free_port
from peers.work import Work

MIB = 1024 * 1024
# A client's or node's own buffer, which `*_into` and `*_from` do not use.
LOCAL_BUFFER_BYTES = 16 * MIB
# Of the segment, beyond what is stored: nothing may be evicted, which begins at 95 %.
SEGMENT_SPARE_BYTES = 256 * MIB
LEASE_MS = 5000
# Without it the log has a line for each metric every few seconds.
QUIET = {"GLOG_minloglevel": "1"}
READY = "the segment is there"
DISTRIBUTION = "mooncake-transfer-engine-non-cuda"


class MooncakePeer(Peer):
    """See the module."""

    def __init__(self, work: Work, variant: str = "") -> None:
        super().__init__(work, variant)
        self._names = [[key.hex() for key in work.keys(batch)] for batch in range(work.batches)]
        self._sizes = [work.block_bytes] * work.batch
        self._servers: list[Server] = []
        self._store: Any = None

    @classmethod
    def missing(cls) -> str:
        """Whether the library is there."""
        return "" if importlib.util.find_spec("mooncake") else DISTRIBUTION

    async def open(self, folder: Path) -> None:
        """Start master and storage node, connect, register memory."""
        os.environ.update(QUIET)
        port = free_port()
        master = [
            str(Path(sysconfig.get_path("purelib"), "mooncake", "mooncake_master")),
            "--rpc_address=127.0.0.1",
            f"--rpc_port={port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={free_port()}",
            f"--default_kv_lease_ttl={LEASE_MS}",
        ]
        self._servers.append(Server("mooncake_master", master, folder / "master.log", QUIET))
        self._servers[0].until_listening(("127.0.0.1", port))
        segment_bytes = self.work.stored_bytes * 3 // 2 + SEGMENT_SPARE_BYTES
        node = [sys.executable, "-P", "-m", "peers.mooncake", str(port), str(segment_bytes)]
        self._servers.append(Server("mooncake node", node, folder / "node.log", QUIET))
        self._servers[1].until_said(READY)
        self.server_pids = [server.pid for server in self._servers]
        self._store = connected(port, 0)
        self.memory = private_memory(self.work)
        self._base = int(np.frombuffer(self.memory.view, np.uint8).ctypes.data)
        if self._store.register_buffer(self._base, self.work.memory_bytes) != 0:
            raise PeerFailed("mooncake: memory cannot be registered")
        self.versions = f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """One request, into place."""
        got = self._store.batch_get_into(self._names[batch], self._places(into), self._sizes)
        if got != self._sizes:
            raise PeerFailed(f"mooncake: a get failed: {sorted(set(got))}")

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """One request, out of place."""
        done = self._store.batch_put_from(self._names[batch], self._places(source), self._sizes)
        if any(done):
            raise PeerFailed(f"mooncake: a put failed: {sorted(set(done))}")

    async def forget(self, batches: Sequence[int]) -> None:
        """Remove them, leases or not."""
        for batch in batches:
            self._store.batch_remove(self._names[batch], True)

    async def close(self) -> None:
        """Disconnect and end both."""
        if self._store is not None:
            self._store.close()
        for server in reversed(self._servers):
            server.stop()

    def _places(self, view: memoryview) -> list[int]:
        """Addresses of the blocks of a batch's memory."""
        first = int(np.frombuffer(view, np.uint8).ctypes.data)
        return list(range(first, first + len(view), self.work.block_bytes))


def connected(master_port: int, segment_bytes: int) -> Any:
    """A store that gives so much memory.

    Raises:
        PeerFailed: It could not be set up.
    """
    library: Any = importlib.import_module("mooncake.store")
    store = library.MooncakeDistributedStore()
    status = store.setup(
        "127.0.0.1",
        "P2PHANDSHAKE",
        segment_bytes,
        LOCAL_BUFFER_BYTES,
        "tcp",
        "",
        f"127.0.0.1:{master_port}",
    )
    if status != 0:
        raise PeerFailed(f"mooncake: the store cannot be set up: status {status}")
    return store


def serve(master_port: int, segment_bytes: int) -> None:
    """Be the storage node, until somebody ends this process."""
    # Kept, since what is no longer referred to is taken down.
    store = connected(master_port, segment_bytes)
    print(READY, flush=True)
    threading.Event().wait()
    store.close()


if __name__ == "__main__":
    serve(*(int(word) for word in sys.argv[1:]))
