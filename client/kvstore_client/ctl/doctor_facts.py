"""Gathers what `kvctl doctor` judges of this host. Changes nothing, and needs no rights."""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import resource
import sys
from pathlib import Path

from kvstore.buffers import Region
from kvstore.errors import KVStoreError
from kvstore.transport import pyverbs_sysfs, verbs
from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.shm import MappedArena, host_name, read_only_copy
from kvstore.transport.verbs import DeviceInfo, PortInfo, VerbsError, VerbsMissing
from kvstore_client.ctl.doctor_rdma_facts import (
    DeviceFile,
    Library,
    LibraryFacts,
    MemlockFacts,
    PortState,
    RdmaFacts,
    library_state,
)
from kvstore_client.ctl.doctor_shared import SharedFacts

# Where distributions put packages of Python: Debian and Ubuntu; Fedora and RHEL.
_PACKAGES = (
    Path("/usr/lib/python3/dist-packages"),
    *(Path(f"/usr/lib64/python3.{minor}/site-packages") for minor in range(9, 16)),
)
# Number of the capability that RLIMIT_MEMLOCK does not bind, of linux/capability.h.
_CAP_IPC_LOCK = 14
_NETDEVS = Path("/sys/class/net")
# What memory is tried with.
_TRIAL_BYTES = mmap.PAGESIZE


def rdma_facts(
    wanted: bool, options: RdmaOptions, local_address: str, memory_bytes: int
) -> RdmaFacts:
    """What there is for RDMA.

    Args:
        wanted: Whether the operator has asked for it.
        options: What he has said of it.
        local_address: Ours towards the peer; "" for none.
        memory_bytes: What is to be registered.
    """
    files = tuple(_device_file(name) for name in pyverbs_sysfs.device_names())
    devices, missing, failure = _devices()
    library = _library(missing)
    if library.state is not Library.LOADS:
        devices = tuple(_kernel_device(file.device) for file in files if not file.iwarp)
    states = tuple(_state(device.name, port) for device in devices for port in device.ports)
    return RdmaFacts(
        wanted=wanted,
        library=library,
        files=files,
        devices=devices,
        devices_error=failure,
        states=states,
        options=options,
        local_address=local_address,
        memlock=_memlock(memory_bytes),
    )


def shared_facts(wanted: bool) -> SharedFacts:
    """What there is for shared memory.

    Args:
        wanted: Whether the operator has asked for it.
    """
    create_error = protect_error = ""
    writable_again = False
    try:
        with_seals = Region(_TRIAL_BYTES, "kvctl-doctor")
    except OSError as error:
        create_error = str(error)
    else:
        try:
            copy = read_only_copy(with_seals)
            writable_again = _writable(copy)
            MappedArena.adopt(copy, _TRIAL_BYTES, "ourselves").close()
        except KVStoreError as error:
            protect_error = str(error)
        finally:
            with_seals.close()
    return SharedFacts(
        wanted, create_error, protect_error, writable_again, host_name(), os.geteuid()
    )


# --- RDMA ------------------------------------------------------------------------------------


def _devices() -> tuple[tuple[DeviceInfo, ...], VerbsMissing | None, str]:
    """What libibverbs says; why it is not there; why it says nothing."""
    try:
        return tuple(verbs.system_verbs().devices()), None, ""
    except VerbsMissing as error:
        return (), error, ""
    except VerbsError as error:
        return (), None, str(error)


def _library(missing: VerbsMissing | None) -> LibraryFacts:
    version = ".".join(map(str, sys.version_info[:2]))
    if missing is None:
        return LibraryFacts(Library.LOADS, python=version)
    said: str | None = str(missing.__cause__ or missing)
    if importlib.util.find_spec("pyverbs") is None:
        said = None
    elsewhere, built_for = _elsewhere() if said is None else ("", "")
    return LibraryFacts(
        state=library_state(said),
        said=said or "",
        python=version,
        environment=sys.prefix if sys.prefix != sys.base_prefix else "",
        elsewhere=elsewhere,
        elsewhere_python=built_for,
    )


def _elsewhere() -> tuple[str, str]:
    """Where the distribution has pyverbs, and for which Python."""
    for packages in _PACKAGES:
        found = packages / "pyverbs"
        try:
            names = os.listdir(found)
        except OSError:
            continue
        tags = {tag[1] for name in names if (tag := re.search(r"\.cpython-3(\d+)", name))}
        return str(found), f"3.{min(tags, key=int)}" if len(tags) == 1 else ""
    return "", ""


def _device_file(device: str) -> DeviceFile:
    path = pyverbs_sysfs.device_file(device)
    return DeviceFile(
        device=device,
        path=str(path or ""),
        there=path is not None and path.exists(),
        open=path is not None and os.access(path, os.R_OK | os.W_OK),
        iwarp=pyverbs_sysfs.is_iwarp(device),
    )


def _kernel_device(device: str) -> DeviceInfo:
    """A device as sysfs has it, where libibverbs says nothing; it does not tell the mtu."""
    directory = pyverbs_sysfs.CLASS / device / "ports"
    try:
        numbers = sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    except OSError:
        numbers = []  # it was removed meanwhile
    ports = tuple(
        PortInfo(
            number=number,
            active=_state_text(device, number) == "ACTIVE",
            link_layer=_read(directory / str(number) / "link_layer") or "unknown",
            lid=0,
            mtu_bytes=0,
            netdev=pyverbs_sysfs.netdev(device, number),
            gids=tuple(pyverbs_sysfs.gids(device, number)),
        )
        for number in numbers
    )
    return DeviceInfo(device, ports)


def _state(device: str, port: PortInfo) -> PortState:
    mtu = _read(_NETDEVS / port.netdev / "mtu") if port.netdev else ""
    return PortState(
        name=f"{device}:{port.number}",
        state=_state_text(device, port.number),
        netdev_mtu_bytes=int(mtu) if mtu.isdigit() else 0,
    )


def _state_text(device: str, port: int) -> str:
    """As "ACTIVE", out of "4: ACTIVE"; "" if it does not say."""
    text = _read(pyverbs_sysfs.CLASS / device / "ports" / str(port) / "state")
    return text.partition(":")[2].strip()


def _memlock(memory_bytes: int) -> MemlockFacts:
    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(Path("/proc/self/status")), re.M)
    # Of a user namespace of its own (containers without root) it counts for nothing.
    outermost = _read(Path("/proc/self/uid_map")).split() == ["0", "0", str((1 << 32) - 1)]
    exempt = bool(outermost and effective and int(effective[1], 16) >> _CAP_IPC_LOCK & 1)
    return MemlockFacts(soft, hard, exempt, memory_bytes)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# --- shared memory ---------------------------------------------------------------------------


def _writable(fd: int) -> bool:
    try:
        mmap.mmap(fd, _TRIAL_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
    except OSError:
        return False
    return True


__all__ = ["rdma_facts", "shared_facts"]
