"""What the kernel tells of RDMA devices in sysfs; see sysfs-class-infiniband in its
documentation of the ABI. Nothing here needs rights or a library, and nothing blocks."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from kvstore.transport.verbs import Gid

CLASS = Path("/sys/class/infiniband")
_VERBS_CLASS = Path("/sys/class/infiniband_verbs")
_DEVICE_FILES = Path("/dev/infiniband")

# Of a port: "4: ACTIVE".
_ACTIVE = "4:"
# Of a device: "4: RNIC" is iWARP, whose connections are made by the kernel alone.
_IWARP = "4:"
# The zero gid, which fills the rest of the table.
_NO_GID = bytes(16)
# Tables have up to 1,024 entries and are filled from the front: behind so many without one,
# there is none that was not made on purpose, and that can be given by its number.
_GID_GAP_MAX = 32


def device_names() -> list[str]:
    """All devices that the kernel has."""
    try:
        return sorted(os.listdir(CLASS))
    except OSError:
        return []  # it was built without, or ib_core is not loaded


def is_iwarp(device: str) -> bool:
    """Whether a device speaks iWARP."""
    return _read(CLASS / device / "node_type").startswith(_IWARP)


def device_file(device: str) -> Path | None:
    """The file by which programs reach a device; None while the kernel offers none."""
    entry = _verbs_entry(device)
    return None if entry is None else _DEVICE_FILES / entry.name


def gids(device: str, port: int) -> list[Gid]:
    """A port's gids, those that are all zero left out."""
    found: list[Gid] = []
    index = 0
    while index < (found[-1].number if found else 0) + _GID_GAP_MAX:
        entry = gid(device, port, index)
        if entry is not None:
            found.append(entry)
        index += 1
    return found


def gid(device: str, port: int, index: int) -> Gid | None:
    """One entry of a port's gid table, None if there is none or it is all zero."""
    directory = CLASS / device / "ports" / str(port)
    text = _read(directory / "gids" / str(index))
    value = bytes.fromhex(text.replace(":", ""))
    if not text or value == _NO_GID:
        return None
    kind = _read(directory / "gid_attrs" / "types" / str(index))
    return Gid(index, gid_text(value), kind)


def netdev(device: str, port: int) -> str:
    """The network interface of a port's first gid, "" if it has none."""
    return _read(CLASS / device / "ports" / str(port) / "gid_attrs" / "ndevs" / "0")


def gid_text(value: bytes) -> str:
    """A gid as text."""
    return socket.inet_ntop(socket.AF_INET6, value)


def gid_groups(text: str) -> str:
    """A gid with nothing left out, as pyverbs wants it.

    Raises:
        ValueError: It is none.
    """
    try:
        value = socket.inet_pton(socket.AF_INET6, text).hex()
    except OSError as error:
        raise ValueError(f"{text!r} is no gid") from error
    return ":".join(value[at : at + 4] for at in range(0, len(value), 4))


class PortWatch:
    """The state of one port, through files that stay open.

    They belong to this very device: if it is removed, they answer no more, even when another
    one has its name already. Some drivers first wait until nobody uses the device, which works
    until then: of those, the file of the verbs is gone before that of the port.

    Raises:
        OSError: The device is gone.
    """

    def __init__(self, device: str, port: int) -> None:
        self._name = f"{device}:{port}"
        self._fds: list[int] = []
        entry = _verbs_entry(device)
        if entry is None:
            raise FileNotFoundError(errno.ENODEV, os.strerror(errno.ENODEV), device)
        try:
            for path in (entry / "ibdev", CLASS / device / "ports" / str(port) / "state"):
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            raise

    def failed(self) -> str:
        """Why the port is of no use, "" while it is."""
        try:
            _, state = (os.pread(fd, 64, 0).decode().strip() for fd in self._fds)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return f"{self._name}: the device was removed"
            return f"{self._name}: its state cannot be read: {error}"
        return "" if state.startswith(_ACTIVE) else f"{self._name}: the port is {state}"

    def close(self) -> None:
        """Let go of the files."""
        while self._fds:
            os.close(self._fds.pop())


def _verbs_entry(device: str) -> Path | None:
    """Where sysfs has what programs reach a device by."""
    try:
        entries = sorted(os.listdir(_VERBS_CLASS))
    except OSError:
        return None
    found = (_VERBS_CLASS / entry for entry in entries)
    return next((path for path in found if _read(path / "ibdev") == device), None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
