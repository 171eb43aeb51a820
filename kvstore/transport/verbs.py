"""The seam to RDMA verbs: what `kvstore.transport.rdma` needs of them, and nothing else.

Behind it stand the system's own verbs (`kvstore.transport.pyverbs_layer`, made of the optional
package pyverbs) and, in tests, an imitation over shared memory. The same suite runs on both.

Words: a *rail* is one port of one device with what hangs on it; a *queue pair* is the end of
one reliable connection (RC) on a rail.

Rules. Nothing here ever blocks: who waits for completions waits for `Rail.fileno` in the event
loop. Everything belongs to the loop's thread. Closing twice is harmless; any other use after
`close` raises `VerbsClosed`, never more. Whoever registers memory keeps it alive until the
region is closed.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import TransportError


class VerbsError(TransportError):
    """A verbs call failed; says which, on what, and what the system answered."""


class VerbsClosed(VerbsError):
    """Something was used after it was closed."""


class VerbsMissing(VerbsError):
    """The package pyverbs is not installed, or is of another release than libibverbs."""


class NoDevice(VerbsError):
    """There is no such device, port or gid; says which there are."""


class VerbsForbidden(VerbsError):
    """The system does not permit it: device files, or the limit on locked memory."""


class Gid(NamedTuple):
    """One entry of a port's gid table that is not all zero.

    Attributes:
        number: Where in the table.
        address: As text: "::ffff:10.0.0.1" or "fe80::…".
        kind: "RoCE v2", "RoCE v1" or "IB", as sysfs says; "" where it does not.
    """

    number: int
    address: str
    kind: str

    @property
    def is_ipv4(self) -> bool:
        """Whether it is an IPv4 address."""
        return self.address.startswith("::ffff:") and "." in self.address


class PortInfo(NamedTuple):
    """One port of a device.

    Attributes:
        active: Whether the port is up.
        link_layer: "Ethernet" or "InfiniBand".
        lid: Of InfiniBand, 0 on Ethernet.
        mtu_bytes: The active mtu: 256 to 4096.
        netdev: Its network interface, "" where that is not known.
        gids: Those that are not all zero.
    """

    number: int
    active: bool
    link_layer: str
    lid: int
    mtu_bytes: int
    netdev: str
    gids: tuple[Gid, ...]


class DeviceInfo(NamedTuple):
    """One device."""

    name: str
    ports: tuple[PortInfo, ...]


class RailSetup(NamedTuple):
    """How one rail is to be used.

    Attributes:
        device, port: Which.
        gid_index: Entry of the gid table; -1 on InfiniBand without one.
        completions_max: Completions that may wait to be polled; see `Rail.completions_max`.
    """

    device: str
    port: int
    gid_index: int
    completions_max: int = 8192


class QueueSetup(NamedTuple):
    """Limits of a queue pair.

    Attributes:
        sends_max: Work requests posted and not completed, signalled or not.
        receives_max: Receives posted and not consumed.
        pieces_max: Pieces of local memory that one work request gathers or scatters.
    """

    sends_max: int
    receives_max: int
    pieces_max: int


class QueueAddress(NamedTuple):
    """What the other end must know of a queue pair.

    Attributes:
        number: The queue pair's number (24 bits).
        psn: First packet sequence number that it sends (24 bits).
        gid: As text; "" for none.
        lid: Of InfiniBand.
        mtu_bytes: The largest it takes; both ends use the smaller one.
    """

    number: int
    psn: int
    gid: str
    lid: int
    mtu_bytes: int


class QueueTuning(NamedTuple):
    """How a connection behaves in the network.

    Attributes:
        service_level, traffic_class: What switches go by; see `kvstore.transport.marking`.
        timeout: Exponent of the time until a packet is sent again: 4.096 us * 2**timeout.
        retry_count: How often, 0 to 6. 7 is for ever with some devices, and not allowed here.
        rnr_retry: How often a receiver that is not ready is tried again; 7 is for ever.
        min_rnr_timer: Code of how long the peer is to wait then, as in the InfiniBand
            specification (12 is 0.64 ms).
        reads_max: RDMA READs under way at once.
    """

    service_level: int = 0
    traffic_class: int = 0
    timeout: int = 14
    retry_count: int = 6
    rnr_retry: int = 7
    min_rnr_timer: int = 12
    reads_max: int = 16


class Opcode(enum.IntEnum):
    """What a work request does."""

    WRITE = 0
    WRITE_WITH_IMMEDIATE = 1
    READ = 2


class Piece(NamedTuple):
    """Registered local memory, as a work request names it."""

    address: int
    length: int
    lkey: int


class Work(NamedTuple):
    """One work request.

    Attributes:
        id: Comes back in the completion, where there is one (63 bits: the devices tell by the
            last one what was a receive, which they do not say of a failure).
        opcode: See `Opcode`.
        pieces: Local memory, in order; none for a write of no bytes.
        remote_address, rkey: One contiguous range of the peer's memory.
        immediate: With WRITE_WITH_IMMEDIATE: 32 bits that consume a receive of the peer. While
            it has none, this request and all behind it wait.
        signalled: Whether its success makes a completion. Its failure always does.
    """

    id: int
    opcode: Opcode
    pieces: Sequence[Piece]
    remote_address: int
    rkey: int
    immediate: int = 0
    signalled: bool = False


class Completion(NamedTuple):
    """One work request, or one receive, has ended.

    Attributes:
        queue: Number of the queue pair.
        id: Of the work request; of a receive it means nothing.
        status: 0 is success; else one of `ibv_wc_status` (5: flushed, 10: no access at the
            peer, 12: no answer).
        received: Whether it is a receive: news of the peer.
        immediate: With a receive that succeeded.
    """

    queue: int
    id: int
    status: int
    received: bool
    immediate: int


class MemoryRegion(abc.ABC):
    """Memory that a rail's device may reach, until `close`."""

    address: int
    length: int
    lkey: int
    rkey: int

    @abc.abstractmethod
    def close(self) -> None:
        """Take the device's access back: when it returns, nothing reaches the memory."""


class QueuePair(abc.ABC):
    """One end of a reliable connection."""

    #: Its number.
    number: int
    closed: bool

    @abc.abstractmethod
    def address(self) -> QueueAddress:
        """What the peer needs for its `connect`. The psn is drawn once."""

    @abc.abstractmethod
    def connect(self, peer: QueueAddress, tuning: QueueTuning) -> None:
        """Connect to the peer's end (INIT, RTR, RTS). Both sides do it; writes of the peer are
        taken from here on.

        Raises:
            VerbsError: The system refuses one of the values.
        """

    @abc.abstractmethod
    def post(self, works: Sequence[Work]) -> None:
        """Hand work to the device, all of it with one call into it where that can be.

        Ownership: local and remote memory is the device's until the completion, of this or
        a later request on the same queue pair, or until `close`. The caller counts what is
        outstanding: never more than `sends_max`.

        Raises:
            VerbsError: The device takes it not, or not all of it: the queue pair is to be
                closed then.
        """

    @abc.abstractmethod
    def post_receives(self, count: int) -> None:
        """Take the peer's news so many times more; they carry no bytes."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Go to the error state: everything outstanding completes soon, most of it with
        status 5, and the peer reaches our memory through it no more. Harmless when it is in
        that state."""

    @abc.abstractmethod
    def close(self) -> None:
        """Destroy it: when it returns, the device touches no memory on its behalf, and no
        completion of it will be polled."""


class Rail(abc.ABC):
    """One port of one device: its protection domain and its completion queue.

    Attributes:
        name: "device:port", for people.
        gid: Our address as text, "" where there is none.
        mtu_bytes: The port's active mtu.
        completions_max: Room for completions: who makes queue pairs sees to it that no more can
            be under way on all of them together.
        pieces_max: Most pieces of a work request that the device takes.
        reads_max: Most RDMA READs under way on a queue pair.
        message_bytes_max: Most bytes of one work request.
    """

    name: str
    gid: str
    mtu_bytes: int
    completions_max: int
    pieces_max: int
    reads_max: int
    message_bytes_max: int
    closed: bool

    @abc.abstractmethod
    def fileno(self) -> int:
        """Descriptor that is readable when completions are there that `poll` has not seen."""

    @abc.abstractmethod
    def register(
        self, address: int, length: int, *, remote_write: bool = False, remote_read: bool = False
    ) -> MemoryRegion:
        """Make memory reachable for the device. It is pinned: this takes milliseconds for
        64 MiB that was touched before; not for the data path.

        Raises:
            VerbsForbidden: The limit on locked memory (RLIMIT_MEMLOCK) is too low; says it.
            VerbsError: The memory is not mapped, or read-only.
        """

    @abc.abstractmethod
    def queue_pair(self, setup: QueueSetup) -> QueuePair:
        """A new queue pair, not connected."""

    @abc.abstractmethod
    def poll(self, count_max: int = 256) -> list[Completion]:
        """Completions that are there, in order; empty if there are none.

        Called when `fileno` is readable, and again until it returns fewer than `count_max`:
        then the next completion makes `fileno` readable again. It may be called at any time.
        """

    @abc.abstractmethod
    def failed(self) -> str:
        """Why the device or the port is of no use any more (removed, port down), "" while it
        is. Never blocks."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close everything that was made of it, in the right order, and itself."""


class Verbs(abc.ABC):
    """A way to devices."""

    @abc.abstractmethod
    def devices(self) -> list[DeviceInfo]:
        """All devices, with their ports.

        Raises:
            VerbsMissing: pyverbs is not there or does not fit libibverbs; says what to install.
            VerbsForbidden: Devices are there, and none may be opened.
            NoDevice: Devices are there, and libibverbs has no driver for them.
        """

    @abc.abstractmethod
    def open(self, setup: RailSetup) -> Rail:
        """Open a rail.

        Raises:
            VerbsMissing, NoDevice, VerbsForbidden: As their names say.
        """


def system_verbs() -> Verbs:
    """The verbs of this system; pyverbs is looked for when they are used.

    Tests put an imitation in its place: look it up here each time.
    """
    from kvstore.transport.pyverbs_layer import PyVerbs

    return PyVerbs()
