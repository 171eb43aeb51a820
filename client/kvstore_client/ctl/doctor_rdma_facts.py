"""What `kvctl doctor` knows of RDMA on this host. Pure."""

from __future__ import annotations

import enum
from typing import NamedTuple

from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.rdma_rails import choose_rails
from kvstore.transport.verbs import DeviceInfo, NoDevice, RailSetup


class Library(enum.StrEnum):
    """How pyverbs is there."""

    LOADS = "loads"
    MISSING = "missing"
    OTHER_RELEASE = "other release"
    NO_LIBIBVERBS = "no libibverbs"
    OTHER_PYTHON = "other python"


class LibraryFacts(NamedTuple):
    """What is known of pyverbs.

    Attributes:
        state: How it is there.
        said: What Python said when it did not load.
        python: This Python's version, as "3.11".
        environment: The virtual environment that it runs in, "" for none.
        elsewhere: Where the distribution has it and this Python does not look, "" for nowhere.
        elsewhere_python: Version of the Python that it is built for there, "" if unknown.
    """

    state: Library
    said: str = ""
    python: str = "3.11"
    environment: str = ""
    elsewhere: str = ""
    elsewhere_python: str = ""


class DeviceFile(NamedTuple):
    """By what programs reach a device of the kernel.

    Attributes:
        device: Name of the device.
        path: Of the file; "" if the kernel offers none.
        there: Whether there is one.
        open: Whether this user may read and write it.
        iwarp: Whether the device speaks iWARP, which is not used.
    """

    device: str
    path: str
    there: bool
    open: bool
    iwarp: bool = False


class PortState(NamedTuple):
    """What sysfs says of a port.

    Attributes:
        name: "device:port".
        state: As "ACTIVE" or "DOWN"; "" if it does not say.
        netdev_mtu_bytes: Of its network interface; 0 if unknown.
    """

    name: str
    state: str = ""
    netdev_mtu_bytes: int = 0


class MemlockFacts(NamedTuple):
    """The limit on locked memory.

    Attributes:
        soft_bytes, hard_bytes: RLIMIT_MEMLOCK; None for no limit.
        exempt: Whether this process may lock any (CAP_IPC_LOCK).
        memory_bytes: What is to be registered.
    """

    soft_bytes: int | None
    hard_bytes: int | None
    exempt: bool
    memory_bytes: int


class RdmaFacts(NamedTuple):
    """All about RDMA on this host.

    Attributes:
        wanted: Whether the operator has asked for RDMA.
        library: See there.
        files: One a device that the kernel has.
        devices: What libibverbs says, or without it the kernel.
        devices_error: Why libibverbs says nothing, "" if it does.
        states: Of ports.
        options: What the operator has said of RDMA.
        local_address: Ours towards the peer, "" if there is none.
        memlock: See there.
    """

    wanted: bool
    library: LibraryFacts
    files: tuple[DeviceFile, ...]
    devices: tuple[DeviceInfo, ...]
    devices_error: str
    states: tuple[PortState, ...]
    options: RdmaOptions
    local_address: str
    memlock: MemlockFacts

    @property
    def idle(self) -> bool:
        """Whether there is nothing here that could do RDMA, and nobody wants it."""
        return not (self.wanted or self.files or self.devices)


class Chosen(NamedTuple):
    """Rails that are used, or why there are none."""

    rails: tuple[RailSetup, ...]
    error: str


def library_state(said: str | None) -> Library:
    """How pyverbs is there, by what the import of it said.

    Args:
        said: The error; "" if it loads, None if there is no such package.
    """
    if said is None:
        return Library.MISSING
    if not said:
        return Library.LOADS
    if "IBVERBS_PRIVATE" in said:
        return Library.OTHER_RELEASE
    return Library.NO_LIBIBVERBS if "libibverbs" in said else Library.OTHER_PYTHON


def rails_of(facts: RdmaFacts) -> Chosen:
    """The rails that a connection would use."""
    try:
        near = facts.local_address or None
        return Chosen(tuple(choose_rails(facts.devices, facts.options, near)), "")
    except NoDevice as error:
        return Chosen((), str(error))


__all__ = [
    "Chosen",
    "DeviceFile",
    "Library",
    "LibraryFacts",
    "MemlockFacts",
    "PortState",
    "RdmaFacts",
    "library_state",
    "rails_of",
]
