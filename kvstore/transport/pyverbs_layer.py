"""The system's own verbs, by the optional package pyverbs.

Rules, each paid for by others with a crash or a hang:

- Objects of pyverbs are closed by us, in order, and are never left to the collector of cycles:
  open rails are held by this module until they are closed, at the latest when Python ends.
- Nothing of pyverbs is called on an object that was closed: that ends the process.
- `get_cq_event` holds Python's lock while it waits: it is called only when there is an event.
- A completion queue is destroyed only when all its events are acknowledged, or it waits.
- Scatter entries and work requests of pyverbs do not give their memory back by themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import socket
import threading
from collections import deque
from typing import Any

from kvstore.transport import pyverbs_sysfs as sysfs
from kvstore.transport.pyverbs_import import Modules, code, load, no_memory, translated
from kvstore.transport.pyverbs_post import RECEIVE, ReceiveChain
from kvstore.transport.pyverbs_queue import PyQueuePair
from kvstore.transport.verbs import (
    Completion,
    DeviceInfo,
    MemoryRegion,
    NoDevice,
    PortInfo,
    QueueSetup,
    Rail,
    RailSetup,
    Verbs,
    VerbsClosed,
    VerbsError,
    VerbsForbidden,
)

# What identifies the descriptor of a completion channel in /proc/self/fd.
_EVENT_FILE = "anon_inode:[infinibandevent]"
# Another thread, of a library that we know nothing of, may open such a descriptor while we
# look for ours; then we try again.
_CHANNEL_TRIES = 16
_LINK_LAYERS = {1: "InfiniBand", 2: "Ethernet"}
_PORT_ACTIVE = 4
# What soft RoCE (rdma_rxe) says of itself; a name of a device may be any.
_SOFT_VENDOR = 0xFFFFFF

_open_lock = threading.Lock()
_open_rails: set[PyRail] = set()


class PyVerbs(Verbs):
    """The devices of this system.

    Args:
        extended: Whether to post by the extended interface where a device has it: half the
            time a request of the other one, and one doorbell a batch.
    """

    def __init__(self, extended: bool = True) -> None:
        self._extended = extended

    def devices(self) -> list[DeviceInfo]:
        modules = load()
        known = _known(modules)
        # One that is being removed has no device file any more.
        unknown = [name for name in sysfs.device_names() if sysfs.device_file(name)]
        if unknown and not known:
            raise _unreachable(unknown[0])
        found = []
        forbidden: VerbsForbidden | None = None
        for name in known:
            try:
                if not sysfs.is_iwarp(name):
                    found.append(_describe(modules, name))
            except VerbsForbidden as error:
                forbidden = error
            except VerbsError:
                if sysfs.device_file(name):
                    raise
                # It was removed while we looked.
        if forbidden is not None and not found:
            raise forbidden
        return found

    def open(self, setup: RailSetup) -> Rail:
        modules = load()
        name = setup.device
        known = _known(modules)
        if name not in known:
            if name in sysfs.device_names():
                raise _unreachable(name)
            raise NoDevice(f"no RDMA device {name!r}; there are: {', '.join(known) or 'none'}")
        if sysfs.is_iwarp(name):
            raise NoDevice(f"{name} is an iWARP device; InfiniBand or RoCE is needed")
        with _open_lock:
            rail = PyRail(modules, setup, self._extended)
            _open_rails.add(rail)
        return rail


class PyRegion(MemoryRegion):
    """Registered memory."""

    def __init__(self, rail: PyRail, region: Any, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self.lkey = int(region.lkey)
        self.rkey = int(region.rkey)
        self._rail = rail
        self._region = region

    def close(self) -> None:
        region, self._region = self._region, None
        if region is not None:
            self._rail.regions.discard(self)
            _close(region, f"{self._rail.name}: deregister {self.length} bytes")


class PyRail(Rail):
    """One port of one device.

    Attributes:
        regions, queues: What is open of it; queues by number.
        modules, context, domain, cq: Of pyverbs.
        extended: Whether new queue pairs are to have the extended interface.
        soft: Whether it is soft RoCE.
        receives: What receives are posted with.
    """

    def __init__(self, modules: Modules, setup: RailSetup, extended: bool) -> None:
        self.name = f"{setup.device}:{setup.port}"
        self.closed = False
        self.regions: set[PyRegion] = set()
        self.queues: dict[int, PyQueuePair] = {}
        self.modules = modules
        self._setup = setup
        self.extended = extended
        self.port = setup.port
        self.gid_index = setup.gid_index
        # Completions that were taken from the device and not polled.
        self._pending: deque[Completion] = deque()
        self._armed = False
        # In the order in which they are closed.
        self._parts = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._parts.close)
            self._open()
            undo.pop_all()

    def _open(self) -> None:
        modules, setup = self.modules, self._setup
        context = self._part(_open_context(modules, setup.device))
        try:
            device = context.query_device()
            if not 1 <= setup.port <= device.phys_port_cnt:
                raise NoDevice(
                    f"{setup.device} has no port {setup.port}; its ports are 1 to "
                    f"{device.phys_port_cnt}"
                )
            port = context.query_port(setup.port)
            self.gid = self._own_gid(_LINK_LAYERS.get(port.link_layer, ""))
            self.lid = int(port.lid)
            self.mtu_bytes = 128 << port.active_mtu
            self.completions_max = min(setup.completions_max, device.max_cqe)
            self.soft = device.vendor_id == _SOFT_VENDOR
            self.queue_depth_max = int(device.max_qp_wr)
            self.pieces_max = min(device.max_sge, device.max_sge_rd or device.max_sge)
            self.reads_max = min(device.max_qp_rd_atom, device.max_qp_init_rd_atom)
            self.message_bytes_max = int(port.max_msg_sz)
            self._watch = sysfs.PortWatch(setup.device, setup.port)
            self._parts.callback(self._watch.close)
            self.domain = self._part(modules.pd.PD(context))
            self._channel, self._fd = _channel(modules, context)
            self._part(self._channel)
            self.cq = self._part(
                modules.cq.CQ(context, self.completions_max, None, self._channel, 0)
            )
            self.receives = self._part(ReceiveChain(modules))
            self._arm()
        except modules.error as error:
            raise translated(f"open {self.name}", error) from error
        except OSError as error:
            raise NoDevice(f"open {self.name}: {error}") from error
        self.context = context
        self._events = select.poll()
        self._events.register(self._fd, select.POLLIN)

    # --- the interface ---------------------------------------------------------------------

    def fileno(self) -> int:
        self._check()
        return self._fd

    def register(
        self, address: int, length: int, *, remote_write: bool = False, remote_read: bool = False
    ) -> PyRegion:
        self._check()
        enums = self.modules.enums
        access = enums.IBV_ACCESS_LOCAL_WRITE
        if remote_write:
            access |= enums.IBV_ACCESS_REMOTE_WRITE
        if remote_read:
            access |= enums.IBV_ACCESS_REMOTE_READ
        what = f"{self.name}: register {length} bytes at {address:#x}"
        if length < 1 or address < 1:
            raise VerbsError(f"{what}: there is nothing")
        try:
            made = self.modules.mr.MR(self.domain, length, access, address=address)
        except self.modules.error as error:
            if code(error) == errno.ENOMEM:
                raise no_memory(what, error) from error
            raise translated(what, error) from error
        region = PyRegion(self, made, address, length)
        self.regions.add(region)
        return region

    def queue_pair(self, setup: QueueSetup) -> PyQueuePair:
        self._check()
        for name, value, value_max in (
            ("sends_max", setup.sends_max, self.queue_depth_max),
            ("receives_max", setup.receives_max, self.queue_depth_max),
            ("pieces_max", setup.pieces_max, self.pieces_max),
        ):
            if not 1 <= value <= value_max:
                raise VerbsError(f"{self.name}: {name}={value}: must be from 1 to {value_max}")
        queue = PyQueuePair(self, setup)
        self.queues[queue.number] = queue
        return queue

    def poll(self, count_max: int = 256) -> list[Completion]:
        self._check()
        pending = self._pending
        found = [pending.popleft() for _ in range(min(count_max, len(pending)))]
        try:
            self._take(found, count_max)
            if len(found) < count_max:
                self._take_events()
                if not self._armed:
                    self._arm()
                    # What completed before that makes no event.
                    self._take(found, count_max)
        except self.modules.error as error:
            raise translated(f"{self.name}: poll", error) from error
        return found

    def failed(self) -> str:
        self._check()
        return self._watch.failed()

    def close(self) -> None:
        if self.closed:
            return
        for queue in list(self.queues.values()):
            queue.close()
        for region in list(self.regions):
            region.close()
        self.closed = True
        with contextlib.suppress(self.modules.error):
            self._take_events()
        with _open_lock:
            _open_rails.discard(self)
        self._parts.close()

    # --- inside ----------------------------------------------------------------------------

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed(f"{self.name} is closed")

    def _part(self, part: Any) -> Any:
        self._parts.callback(_close, part, f"{self.name}: close {type(part).__name__}")
        return part

    def _own_gid(self, link_layer: str) -> str:
        device, port, index = self._setup.device, self._setup.port, self._setup.gid_index
        if index < 0:
            if link_layer != "InfiniBand":
                raise NoDevice(f"{self.name}: {link_layer} needs a gid, and none was chosen")
            return ""
        found = sysfs.gid(device, port, index)
        if found is None:
            there = {gid.number: gid.address for gid in sysfs.gids(device, port)}
            listed = ", ".join(f"{number} ({text})" for number, text in there.items())
            raise NoDevice(f"{self.name} has no gid {index}; it has: {listed or 'none'}")
        return found.address

    def forget(self, queue: PyQueuePair, made: Any) -> None:
        """Destroy a queue pair, and what has completed of it and was not polled."""
        self.queues.pop(queue.number, None)
        try:
            _close(made, f"{queue.name}: close")
        finally:
            # Its number will be another's. Those of others are kept.
            self._pending = deque(one for one in self._pending if one.queue != queue.number)
            taken: list[Completion] = []
            with contextlib.suppress(self.modules.error):
                self._take(taken, self.completions_max + len(self._pending))
            self._pending.extend(taken)

    def _take(self, found: list[Completion], count_max: int) -> None:
        """Completions of the device that are there, appended until there are `count_max`."""
        while len(found) < count_max:
            room = count_max - len(found)
            count, entries = self.cq.poll(room)
            for entry in entries:
                queue = self.queues.get(entry.qp_num)
                if queue is None:
                    continue  # it was destroyed
                identity, status = entry.wr_id, entry.status
                if identity & RECEIVE:
                    queue.received()
                    immediate = 0 if status else socket.ntohl(entry.imm_data)
                    found.append(Completion(queue.number, 0, status, True, immediate))
                else:
                    found.append(Completion(queue.number, identity, status, False, 0))
            if count < room:
                return

    def _take_events(self) -> None:
        """Take and acknowledge the events that are there."""
        while self._events.poll(0):
            self._channel.get_cq_event(self.cq)
            self.cq.ack_events(1)
            self._armed = False

    def _arm(self) -> None:
        """Ask for an event with the next completion."""
        self.cq.req_notify()
        self._armed = True


def _known(modules: Modules) -> list[str]:
    """Devices that both the kernel and libibverbs know."""
    try:
        devices = modules.device.get_device_list()
    except modules.error:
        return []  # a kernel without RDMA
    return sorted(device.name.decode() for device in devices)


def _unreachable(device: str) -> VerbsError:
    """Why libibverbs does not know a device that the kernel has."""
    try:
        _check_device_file(device)
    except VerbsError as error:
        return error
    return NoDevice(
        f"the kernel has the device {device}, but libibverbs has no driver for it: install "
        "ibverbs-providers (Debian, Ubuntu) or rdma-core (RHEL, Fedora)"
    )


def _check_device_file(device: str) -> None:
    """See that this user can open a device.

    Raises:
        NoDevice: The kernel offers it to nobody.
        VerbsForbidden: Says what must be changed.
    """
    path = sysfs.device_file(device)
    if path is None:
        raise NoDevice(
            f"the kernel offers no device file for {device}: load ib_uverbs (modprobe "
            "ib_uverbs), unless the device is being removed"
        )
    if not path.exists():
        raise VerbsForbidden(
            f"{device}: its device file {path} is missing: hand /dev/infiniband to the container"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        raise VerbsForbidden(
            f"{device}: {path} must be readable and writable for uid {os.geteuid()}; on some "
            "distributions that is group rdma, in a unit DeviceAllow=char-infiniband_verbs rw"
        )


def _open_context(modules: Modules, device: str) -> Any:
    """Open a device; under `_open_lock`, for its descriptor looks like that of a channel."""
    _check_device_file(device)
    try:
        return modules.device.Context(name=device)
    except modules.error as error:
        raise translated(f"open {device}", error) from error


def _describe(modules: Modules, name: str) -> DeviceInfo:
    ports = []
    with _open_lock, contextlib.ExitStack() as parts:
        context = _open_context(modules, name)
        parts.callback(_close, context, f"close {name}")
        try:
            for number in range(1, context.query_device().phys_port_cnt + 1):
                port = context.query_port(number)
                ports.append(
                    PortInfo(
                        number=number,
                        active=port.state == _PORT_ACTIVE,
                        link_layer=_LINK_LAYERS.get(port.link_layer, "unknown"),
                        lid=int(port.lid),
                        mtu_bytes=128 << port.active_mtu,
                        netdev=sysfs.netdev(name, number),
                        gids=tuple(sysfs.gids(name, number)),
                    )
                )
        except modules.error as error:
            raise translated(f"query {name}", error) from error
    return DeviceInfo(name, tuple(ports))


def _channel(modules: Modules, context: Any) -> tuple[Any, int]:
    """A completion channel and its descriptor, which pyverbs does not tell."""
    for _ in range(_CHANNEL_TRIES):
        before = _event_files()
        channel = modules.cq.CompChannel(context)
        new = _event_files() - before
        if len(new) == 1:
            fd = new.pop()
            os.set_blocking(fd, False)
            return channel, fd
        channel.close()
    raise VerbsError("the descriptor of a completion channel was not found in /proc/self/fd")


def _event_files() -> set[int]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}") == _EVENT_FILE:
                found.add(int(entry))
    return found


def _close(part: Any, what: str) -> None:
    """Close an object of pyverbs.

    Raises:
        VerbsError: The system refuses it, which nothing can be done about.
    """
    try:
        part.close()
    except Exception as error:
        raise translated(what, error) from error


@atexit.register
def _close_all() -> None:
    for rail in list(_open_rails):
        with contextlib.suppress(VerbsError):
            rail.close()
