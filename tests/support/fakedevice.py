"""What a device does, done by two threads a rail and sockets between rails.

One thread executes what was posted: packet after packet, one queue pair after the other, each
sent to the peer's rail and answered by it. The other thread answers for the memory registered
here. So no process reaches into another: every check is made where the memory is, under the
lock that also `MemoryRegion.close` and `QueuePair.flush` take.

Stricter than devices are, so that mistakes show: nothing completes before `post` returns; the
descriptor is readable once for each `poll` that found less than it could take; what is not
counted right raises; both ends must have connected to each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import random
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstore.transport.verbs import (
    Completion,
    MemoryRegion,
    Opcode,
    QueueAddress,
    QueuePair,
    QueueSetup,
    QueueTuning,
    Rail,
    RailSetup,
    VerbsClosed,
    VerbsError,
    Work,
)
from tests.support.fakeverbs import DOWN, PACKET_BYTES, PATIENCE_S, REMOVED, Control, Slot

SUCCESS, LENGTH, PROTECTION, FLUSHED, INVALID, ACCESS, NO_ANSWER, NOT_READY = (
    0, 1, 4, 5, 9, 10, 12, 13,
)  # fmt: skip
# Answers of a rail that are no status of a completion.
NO_RECEIVE, NOBODY = 254, 255

# What a packet may do: nothing, move, or move as one of those that a test has allowed.
HELD, FREE, COUNTED = range(3)

PIECES_MAX = 16
READS_MAX = 16
QUEUE_DEPTH_MAX = 16384
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
# How often a rail looks whether it may go on, and a sender whether there is a receive now.
LOOK_AGAIN_S = 0.0005

# | opcode, last packet | target, source and first psn of a queue pair | rkey, immediate |
# | address, bytes | gids of source and target |, then the bytes of a write.
_REQUEST = struct.Struct("<BBIIIIIQI16s16s")


class FakeRegion(MemoryRegion):
    """Registered memory."""

    def __init__(
        self, rail: FakeRail, address: int, length: int, key: int, write: bool, read: bool
    ) -> None:
        self.address = address
        self.length = length
        self.lkey = key
        self.rkey = key ^ 0x5A5A5A5A
        self.remote_write = write
        self.remote_read = read
        self._rail = rail

    def holds(self, address: int, length: int) -> bool:
        """Whether it has all of a range."""
        return self.address <= address and address + length <= self.address + self.length

    def close(self) -> None:
        with self._rail.lock:
            self._rail.regions.pop(self.lkey, None)


class Sending:
    """A work request on its way."""

    def __init__(self, work: Work, position: int) -> None:
        self.work = work
        #: How many were posted on its queue pair before it.
        self.position = position
        self.length = sum(piece.length for piece in work.pieces)
        self.done = 0


class FakeQueue(QueuePair):
    """One end of a connection. All of it under the rail's lock."""

    def __init__(self, rail: FakeRail, number: int, setup: QueueSetup) -> None:
        self.number = number
        self.closed = False
        self.setup = setup
        self.psn = secrets.randbits(24)
        self.peer: QueueAddress | None = None
        self.tuning = QueueTuning()
        self.failed = False
        self.sends: deque[Sending] = deque()
        self.receives = 0
        #: When the first of `sends` is tried again, and since when it is tried.
        self.again_at = 0.0
        self.silent_since: float | None = None
        self._rail = rail
        # Those that a completion which was polled has not told about.
        self._posted = 0
        self._retired = 0
        self._receives_out = 0

    def address(self) -> QueueAddress:
        self._check()
        return QueueAddress(self.number, self.psn, self._rail.gid, 0, self._rail.mtu_bytes)

    def connect(self, peer: QueueAddress, tuning: QueueTuning) -> None:
        self._check()
        if self.peer is not None or self.failed:
            raise VerbsError(f"queue pair {self.number:#x}: is connected already, or has failed")
        if not 0 <= tuning.retry_count <= 6:
            raise VerbsError(f"retry_count={tuning.retry_count}: must be from 0 to 6")
        try:
            socket.inet_pton(socket.AF_INET6, peer.gid)
        except OSError as error:
            raise VerbsError(f"queue pair {self.number:#x}: gid {peer.gid!r} of peer") from error
        if min(peer.mtu_bytes, self._rail.mtu_bytes) not in (256, 512, 1024, 2048, 4096):
            raise VerbsError(f"queue pair {self.number:#x}: mtu_bytes={peer.mtu_bytes} of peer")
        with self._rail.lock:
            self.peer, self.tuning = peer, tuning

    def post(self, works: Sequence[Work]) -> None:
        self._check()
        self._rail.check_there()
        if self.peer is None:
            raise VerbsError(f"queue pair {self.number:#x}: work for one that is not connected")
        for work in works:
            if len(work.pieces) > self.setup.pieces_max:
                raise VerbsError(f"{len(work.pieces)} pieces: at most {self.setup.pieces_max}")
            assert 0 <= work.id < 1 << 63, "ids have 63 bits"
            assert 0 <= work.immediate < 1 << 32, "immediates have 32 bits"
        with self._rail.lock:
            under_way = self._posted - self._retired + len(works)
            if under_way > self.setup.sends_max:
                raise VerbsError(f"{under_way} under way: at most {self.setup.sends_max}")
            for work in works:
                # The caller may use its lists again at once.
                work = work._replace(pieces=tuple(work.pieces))
                self.sends.append(Sending(work, self._posted))
                self._posted += 1
            self._rail.notice()

    def post_receives(self, count: int) -> None:
        self._check()
        self._rail.check_there()
        with self._rail.lock:
            out = self._receives_out + count
            if out > self.setup.receives_max:
                raise VerbsError(f"{out} receives out: at most {self.setup.receives_max}")
            self._receives_out = out
            self.receives += count
            self._rail.notice()

    def flush(self) -> None:
        self._check()
        with self._rail.lock:
            self.failed = True
            self._rail.notice()

    def close(self) -> None:
        with self._rail.lock:
            if not self.closed:
                self.closed = True
                self._rail.forget(self)

    def polled(self, completion: Completion, position: int) -> None:
        """A completion of it was polled: room for more."""
        if completion.received:
            self._receives_out -= 1
        else:
            self._retired = position + 1

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed(f"queue pair {self.number:#x} is closed")


class FakeRail(Rail):
    """One port of one device.

    Attributes:
        lock: Under which everything happens here but the exchange with a peer.
        regions: By lkey.
    """

    def __init__(self, directory: Path, device: int, setup: RailSetup, gid: str) -> None:
        self.name = f"{setup.device}:{setup.port}"
        self.gid = gid
        self.mtu_bytes = 4096
        self.completions_max = setup.completions_max
        self.pieces_max = PIECES_MAX
        self.reads_max = READS_MAX
        self.message_bytes_max = MESSAGE_BYTES_MAX
        self.closed = False
        self.lock = threading.RLock()
        self.regions: dict[int, FakeRegion] = {}
        self.queues: dict[int, FakeQueue] = {}
        self._gid = socket.inet_pton(socket.AF_INET6, gid)
        self._device = device
        self._directory = directory
        self._control = Control(directory)
        self._slot = self._control.claim_slot()
        self._executed = 0
        self._network = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        self._counter = secrets.randbits(16)
        self._key = secrets.randbits(24)
        self._random = random.Random(self._control.head().seed)
        self._completions: deque[tuple[FakeQueue, int, Completion]] = deque()
        self._overrun = False
        self._armed = True
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._news = threading.Condition(self.lock)
        self._peers: dict[int, socket.socket] = {}
        self._turn = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self._socket_name(self._slot))
        self._listener.listen(128)
        self._wake, self._woken = socket.socketpair()
        self._threads = [
            threading.Thread(target=self._execute, name=f"{self.name} executes", daemon=True),
            threading.Thread(target=self._serve, name=f"{self.name} answers", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- the interface ---------------------------------------------------------------------

    def fileno(self) -> int:
        self._check()
        return self._event

    def register(
        self, address: int, length: int, *, remote_write: bool = False, remote_read: bool = False
    ) -> FakeRegion:
        self._check()
        self.check_there()
        if not _writable(address, length):
            raise VerbsError(f"{self.name}: {length} bytes at {address:#x} are not ours to write")
        with self.lock:
            self._key += 0x101
            region = FakeRegion(
                self, address, length, self._key & 0xFFFFFFFF, remote_write, remote_read
            )
            self.regions[region.lkey] = region
        return region

    def queue_pair(self, setup: QueueSetup) -> FakeQueue:
        self._check()
        self.check_there()
        for name, value, value_max in (
            ("sends_max", setup.sends_max, QUEUE_DEPTH_MAX),
            ("receives_max", setup.receives_max, QUEUE_DEPTH_MAX),
            ("pieces_max", setup.pieces_max, self.pieces_max),
        ):
            if not 1 <= value <= value_max:
                raise VerbsError(f"{self.name}: {name}={value}: must be from 1 to {value_max}")
        with self.lock:
            while True:
                self._counter = (self._counter + 1) & 0xFFFF
                number = self._slot << 16 | self._counter
                # No device gives number 0 to a connection.
                if number and number not in self.queues:
                    break
            queue = self.queues[number] = FakeQueue(self, number, setup)
        return queue

    def poll(self, count_max: int = 256) -> list[Completion]:
        self._check()
        found = []
        with self.lock:
            if self._overrun:
                raise VerbsError(f"{self.name}: more than {self.completions_max} completions")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event)
            while self._completions and len(found) < count_max:
                queue, position, completion = self._completions.popleft()
                queue.polled(completion, position)
                found.append(completion)
            self._armed = len(found) < count_max
        return found

    def failed(self) -> str:
        self._check()
        state = self._control.head().states[self._device]
        if state == REMOVED:
            return f"{self.name}: the device was removed"
        return f"{self.name}: the port is down" if state == DOWN else ""

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            for queue in list(self.queues.values()):
                queue.close()
            self.regions.clear()
            self.closed = True
            self._news.notify_all()
            for peer in self._peers.values():
                # Wakes the thread if it waits for an answer there.
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
        self._wake.send(b"x")
        for thread in self._threads:
            thread.join()
        self._control.set_slot(self._slot, Slot(0, 0, 0))
        for sock in (self._listener, self._wake, self._woken, *self._peers.values()):
            sock.close()
        self._control.close()
        os.close(self._event)

    # --- what queue pairs need -------------------------------------------------------------

    def check_there(self) -> None:
        """Raise if the device is gone."""
        if self._control.head().states[self._device] == REMOVED:
            raise VerbsError(f"{self.name}: the device was removed")

    def notice(self) -> None:
        """There is something new to do."""
        self._tell()
        self._news.notify_all()

    def forget(self, queue: FakeQueue) -> None:
        """A queue pair is closed."""
        self.queues.pop(queue.number, None)
        self._completions = deque(item for item in self._completions if item[0] is not queue)
        queue.sends.clear()
        self._tell()

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed(f"{self.name} is closed")

    def _tell(self) -> None:
        waiting = sum(len(queue.sends) for queue in self.queues.values() if not queue.failed)
        self._control.set_slot(self._slot, Slot(os.getpid(), waiting, self._executed))

    def _complete(self, queue: FakeQueue, position: int, completion: Completion) -> None:
        if len(self._completions) == self.completions_max:
            self._overrun = True
        self._completions.append((queue, position, completion))
        if self._armed or self._overrun:
            self._armed = False
            os.eventfd_write(self._event, 1)

    def _end(self, queue: FakeQueue, sending: Sending, status: int) -> None:
        """The first of a queue pair's requests has ended."""
        assert queue.sends.popleft() is sending
        queue.silent_since = None
        if status:
            queue.failed = True
        if status or sending.work.signalled:
            completion = Completion(queue.number, sending.work.id, status, False, 0)
            self._complete(queue, sending.position, completion)

    # --- the thread that executes ------------------------------------------------------------

    def _execute(self) -> None:
        control = Control(self._directory)  # its lock is this thread's alone
        try:
            while True:
                with self.lock:
                    if self.closed:
                        return
                    queue, wait_s = self._next()
                    if queue is None:
                        self._news.wait(wait_s)
                        continue
                if not self._move(control, queue):
                    with self.lock:
                        if not self.closed:
                            self._news.wait(LOOK_AGAIN_S)
        finally:
            control.close()

    def _next(self) -> tuple[FakeQueue | None, float | None]:
        """The queue pair whose turn it is; or how long there is nothing to do."""
        if self._control.head().states[self._device] == REMOVED:
            return None, LOOK_AGAIN_S
        now = time.monotonic()
        wait_s = None
        for queue in list(self.queues.values()):
            if queue.failed and (queue.sends or queue.receives):
                self._flush(queue)
        due = []
        for queue in self.queues.values():
            if queue.sends and queue.again_at <= now:
                due.append(queue)
            elif queue.sends:
                left_s = queue.again_at - now
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
        if not due:
            return None, wait_s
        self._turn += 1
        return due[self._turn % len(due)], None

    def _flush(self, queue: FakeQueue) -> None:
        while queue.sends:
            self._end(queue, queue.sends[0], FLUSHED)
        while queue.receives:
            queue.receives -= 1
            self._complete(queue, 0, Completion(queue.number, 0, FLUSHED, True, 0))
        self._tell()

    def _move(self, control: Control, queue: FakeQueue) -> bool:
        """Move one packet, unless held; false if held."""
        jitter_us = control.head().jitter_us
        if jitter_us:
            time.sleep(self._random.uniform(0, jitter_us) / 1e6)
        with _permission(control) as permission:
            if permission and self._packet(queue) and permission == COUNTED:
                head = control.head()
                control.set_head(head._replace(allowed=head.allowed - 1))
        return permission != HELD

    def _packet(self, queue: FakeQueue) -> bool:
        """Move the next packet of a queue pair; false if none has moved."""
        with self.lock:
            if queue.closed or queue.failed or not queue.sends:
                return False
            sending = queue.sends[0]
            count = min(PACKET_BYTES, sending.length - sending.done)
            local = self._local(sending, count)
            if isinstance(local, int):
                self._end(queue, sending, local)
                self._tell()
                return True
            request = self._request(queue, sending, count, local)
            assert queue.peer is not None
            target = queue.peer.number >> 16
        answer = self._exchange(target, request)
        with self.lock:
            # Whoever has closed or flushed it meanwhile is not to see its memory change.
            if queue.closed or queue.failed:
                return False
            moved = self._answered(queue, sending, count, local, answer)
            self._executed += moved
            self._tell()
            return moved

    def _local(self, sending: Sending, count: int) -> list[memoryview] | int:
        """Local memory of the next packet, or the status with which the request fails."""
        if sending.length > MESSAGE_BYTES_MAX:
            return LENGTH
        found = []
        skip, rest = sending.done, count
        for piece in sending.work.pieces:
            region = self.regions.get(piece.lkey)
            if region is None or not region.holds(piece.address, piece.length):
                return PROTECTION
            first, last = min(skip, piece.length), min(skip + rest, piece.length)
            if last > first:
                found.append(_memory(piece.address + first, last - first))
                rest -= last - first
            skip -= first
        return found

    def _request(
        self, queue: FakeQueue, sending: Sending, count: int, local: Sequence[memoryview]
    ) -> bytes:
        work, peer = sending.work, queue.peer
        assert peer is not None
        head = _REQUEST.pack(
            work.opcode,
            sending.done + count == sending.length,
            peer.number,
            queue.number,
            queue.psn,
            work.rkey,
            work.immediate,
            work.remote_address + sending.done,
            count,
            self._gid,
            socket.inet_pton(socket.AF_INET6, peer.gid),
        )
        return head if work.opcode == Opcode.READ else b"".join((head, *local))

    def _exchange(self, target: int, request: bytes) -> bytes:
        """The answer of a rail; of nobody if it is gone or the port is down."""
        nobody = bytes([NOBODY])
        if self._control.head().states[self._device] != 0:
            return nobody
        peer = self._peers.get(target)
        try:
            if peer is None:
                peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                # A device answers however busy its host is.
                peer.settimeout(PATIENCE_S)
                with self.lock:
                    if self.closed:
                        peer.close()
                        return nobody
                    self._peers[target] = peer
                peer.connect(self._socket_name(target))
            peer.send(request)
            answer = peer.recv(1 + PACKET_BYTES)
        except OSError:
            answer = b""
        if not answer:
            with self.lock:
                dead = self._peers.pop(target, None)
            if dead is not None:
                dead.close()
        return answer or nobody

    def _answered(
        self,
        queue: FakeQueue,
        sending: Sending,
        count: int,
        local: Sequence[memoryview],
        answer: bytes,
    ) -> bool:
        now = time.monotonic()
        status = answer[0]
        if status == NO_RECEIVE:
            queue.silent_since = None
            queue.again_at = now + LOOK_AGAIN_S
            if queue.tuning.rnr_retry < 7:
                self._end(queue, sending, NOT_READY)
            return False
        if status == NOBODY:
            if queue.silent_since is None:
                queue.silent_since = now
            tuning = queue.tuning
            patience_s = 4.096e-6 * 2**tuning.timeout * (tuning.retry_count + 1)
            queue.again_at = now + patience_s / 16
            if now - queue.silent_since > patience_s:
                self._end(queue, sending, NO_ANSWER)
            return False
        queue.silent_since = None
        if status:
            self._end(queue, sending, status)
            return True
        at = 1
        if sending.work.opcode == Opcode.READ:
            for memory in local:
                memory[:] = answer[at : at + len(memory)]
                at += len(memory)
        sending.done += count
        if sending.done == sending.length:
            self._end(queue, sending, SUCCESS)
        return True

    # --- the thread that answers -------------------------------------------------------------

    def _serve(self) -> None:
        buffer = memoryview(bytearray(_REQUEST.size + PACKET_BYTES))
        with selectors.DefaultSelector() as selector:
            for sock in (self._listener, self._woken):
                selector.register(sock, selectors.EVENT_READ)
            try:
                while not self.closed:
                    for key, _ in selector.select():
                        sock = key.fileobj
                        assert isinstance(sock, socket.socket)
                        if sock is self._listener:
                            selector.register(sock.accept()[0], selectors.EVENT_READ)
                        elif sock is not self._woken and not self._serve_one(sock, buffer):
                            selector.unregister(sock)
                            sock.close()
            finally:
                for key in list(selector.get_map().values()):
                    if key.fileobj not in (self._listener, self._woken):
                        assert isinstance(key.fileobj, socket.socket)
                        key.fileobj.close()

    def _serve_one(self, sock: socket.socket, buffer: memoryview) -> bool:
        """Answer one packet; false at the end of the connection."""
        try:
            count = sock.recv_into(buffer)
            if count:
                with self.lock:
                    answer = self._answer(buffer[:count])
                sock.send(answer)
        except OSError:
            return False
        return count > 0

    def _answer(self, request: memoryview) -> bytes:
        """Execute a packet of a peer and answer it; under the lock."""
        (
            opcode, last, target, source, psn, rkey, immediate, address, count, from_gid, to_gid,
        ) = _REQUEST.unpack_from(request)  # fmt: skip
        queue = self.queues.get(target)
        if (
            queue is None
            or queue.peer is None
            or queue.failed
            or (queue.peer.number, queue.peer.psn) != (source, psn)
            or from_gid != to_gid
            or to_gid != self._gid
            or self._control.head().states[self._device] != 0
        ):
            return bytes([NOBODY])
        status = self._access(opcode, rkey, address, count)
        if status:
            queue.failed = True
            self.notice()
            return bytes([status])
        if opcode == Opcode.READ:
            return b"\0" + _memory(address, count)
        news = opcode == Opcode.WRITE_WITH_IMMEDIATE and last
        if news and not queue.receives:
            return bytes([NO_RECEIVE])
        if count:
            _memory(address, count)[:] = request[_REQUEST.size :]
        if news:
            queue.receives -= 1
            self._complete(queue, 0, Completion(target, 0, SUCCESS, True, immediate))
        return bytes([SUCCESS])

    def _access(self, opcode: int, rkey: int, address: int, count: int) -> int:
        if not count:
            return SUCCESS  # keys of nothing are not looked at
        region = self.regions.get(rkey ^ 0x5A5A5A5A)
        if region is None or not region.holds(address, count):
            return ACCESS
        allowed = region.remote_read if opcode == Opcode.READ else region.remote_write
        return SUCCESS if allowed else ACCESS

    def _socket_name(self, slot: int) -> str:
        # An abstract one: paths of sockets may have 107 bytes, and directories of tests more.
        return f"\0kvstore-fakeverbs-{self._network}-{slot}"


@contextlib.contextmanager
def _permission(control: Control) -> Iterator[int]:
    """Whether a packet may move: for as long as this lasts, and as what."""
    with control.locked(fcntl.LOCK_SH):
        if not control.head().held:
            yield FREE
            return
    if not control.head().allowed:
        yield HELD
        return
    with control.locked(fcntl.LOCK_EX):
        head = control.head()
        yield COUNTED if head.held and head.allowed else HELD


def _memory(address: int, count: int) -> memoryview:
    return memoryview((ctypes.c_char * count).from_address(address)).cast("B")


def _writable(address: int, length: int) -> bool:
    """Whether all of a range is mapped, to be read and written."""
    if length < 1:
        return False
    at = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        first, last = (int(word, 16) for word in span.split("-"))
        if first <= at < last and rights.startswith("rw"):
            at = last
    return at >= address + length
