"""The engine `raw`: bytes through a bare TCP connection on loopback, the limit of this host.

Two processes, as with `kv`: this one is the client, the peer (`raw_peer`) the server. One
connection a clone, blocking sockets, TCP_NODELAY, buffer sizes left to the system. Memory is
touched before and reused: the server walks `size` bytes, we walk `iodepth` I/Os, as with `kv`.

- read: the peer calls `sendall` with `bs` bytes after the other, without being asked; we call
  `recv_into` until `bs` bytes are in our memory, and then again.
- write: the other way round; it ends when the peer has said that it received all.

There are no requests, keys, checksums or answers: nothing that could be slower. An I/O is one
block; `clat` of a read is the time from one block to the next. `batch` and `iodepth` only size
our memory. The same streams have the same number of connections: `numjobs` of each.
"""

from __future__ import annotations

import socket
import struct
import subprocess

from kvstore.buffers import Region
from kvstore_bench.children import STOP_TIMEOUT_S, bound_command
from kvstore_bench.engines.base import Engine, JobFailed, OnStep, Task
from kvstore_bench.meter import Meter, clock_ns
from kvstore_bench.workload import Workload

# A peer that neither takes nor gives a byte for that long has failed.
STALL_TIMEOUT_S = 30
# Peers touch their memory before they connect; see `daemons.TOUCH_BPS_MIN`.
TOUCH_BPS_MIN = 256 * 1024 * 1024

START = b"g"
RECEIVED = b"r"


class RawEngine(Engine):
    """See the module."""

    def __init__(self, task: Task) -> None:
        self._job = task.job
        self._peer: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    async def open(self, workload: Workload, on_step: OnStep) -> None:
        """Touch our memory, start the peer, and wait until it has touched its own."""
        on_step("touch memory", 0, self._job.size)
        self._region = Region(self._job.iodepth * self._job.io_bytes, "kvbench-raw")
        self._region.touch()
        self._connect()

    async def run(self, workload: Workload, meter: Meter) -> None:
        """Move blocks until it is over."""
        assert self._socket is not None
        try:
            self._stream(self._socket, workload, meter)
            if self._job.writes:
                self._socket.shutdown(socket.SHUT_WR)
                if self._socket.recv(1) != RECEIVED:
                    raise ConnectionError("the peer did not receive all")
        except OSError as error:
            meter.error = f"raw: {error}"
        meter.finish()
        direction = meter.read if self._job.reads else meter.write
        direction.transports["tcp"] = direction.bytes

    async def close(self) -> None:
        """Hang up; the peer ends by itself."""
        if self._socket is not None:
            self._socket.close()
        if self._peer is not None:
            try:
                self._peer.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._peer.kill()
                self._peer.wait()

    def _connect(self) -> None:
        job = self._job
        role = "source" if job.reads else "sink"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            arguments = [role, str(port), str(job.io_count * job.io_bytes), str(job.bs)]
            self._peer = subprocess.Popen(
                bound_command("kvstore_bench.engines.raw_peer", arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            listener.settimeout(STALL_TIMEOUT_S + job.size / TOUCH_BPS_MIN)
            try:
                self._socket, _ = listener.accept()
            except TimeoutError:
                raise JobFailed(f"raw: no peer (its exit status: {self._peer.poll()})") from None
        set_up(self._socket)
        self.server_pids = [self._peer.pid]

    def _stream(self, sock: socket.socket, workload: Workload, meter: Meter) -> None:
        job, view, at = self._job, self._region.view, 0
        bs, is_read = job.bs, job.reads
        move = receive_block if is_read else socket.socket.sendall
        blocks_left = 0
        sock.sendall(START)
        meter.start()
        while not meter.over(began := clock_ns()):
            counts = meter.counts(began)
            # `size` is counted in I/Os of `batch` blocks, whatever moves them.
            if counts and not blocks_left:
                if workload.next() is None:
                    break
                blocks_left = job.batch
            move(sock, view[at : at + bs])
            ended = clock_ns()
            at = (at + bs) % len(view)
            if counts:
                blocks_left -= 1
                meter.completed(is_read, (began, began, ended), bs, False)
            meter.seen(is_read, bs, ended)


def set_up(sock: socket.socket) -> None:
    """The options that both ends set; every call has an end without a poll before it."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack("ll", STALL_TIMEOUT_S, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def receive_block(sock: socket.socket, view: memoryview) -> None:
    """Fill `view`. (MSG_WAITALL instead of the loop was slower where it was measured.)

    Raises:
        ConnectionError: The peer hung up.
    """
    got = sock.recv_into(view)
    while got < len(view):
        more = sock.recv_into(view[got:])
        if not more:
            raise ConnectionError("the peer hung up")
        got += more
