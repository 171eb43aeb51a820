"""Memory that processes of one host share: a descriptor of a memfd, checked and then mapped.

A descriptor that comes from a peer may be anything. Two things must hold before it is mapped:
it is plain memory (a memfd of normal pages; reading a mapped file can wait for its file system
for ever), and it is sealed against shrinking, or its giver could cut it off under a reader,
whom the kernel then kills with SIGBUS. Seals cannot be taken back (fcntl(2), "File Sealing").
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import Self

import numpy as np

from kvstore.buffers import PAGE_BYTES, MappedMemory, Region
from kvstore.errors import (
    Busy,
    KVStoreError,
    LimitExceeded,
    LocalProtocolError,
    PermissionDenied,
    Unsupported,
)

#: More than a host has; keeps a peer from using the address space up with one request.
SHARED_BYTES_MAX = 1 << 40

# Of linux/fcntl.h and asm-generic/mman-common.h; the standard library does not name them all.
F_SEAL_FUTURE_WRITE = 0x10
_MADV_POPULATE_WRITE = 23
# One system call's share: 10 to 50 ms.
_POPULATE_SLICE_BYTES = 64 * 1024 * 1024

_BYTE = np.dtype(np.uint8)
_byte_of = ctypes.c_char.from_buffer
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def address_of(view: memoryview) -> int:
    """Address of the first byte of a contiguous view; it is valid for as long as the memory.

    Raises:
        LocalProtocolError: The view has gaps.
    """
    try:
        return ctypes.addressof(_byte_of(view))
    except (TypeError, ValueError):
        pass  # not to be written, which costs ten times as much; or empty, or with gaps
    try:
        return int(np.frombuffer(view, _BYTE).__array_interface__["data"][0])
    except (BufferError, ValueError) as error:
        raise LocalProtocolError(f"address of a view: {error}") from error


def host_name() -> str:
    """What tells this host, and this network of it, from others; "" where the system does not
    say. Processes in containers may have the same and see other files: a path that one names
    need not be there for the other."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


def read_only_copy(region: Region) -> int:
    """A descriptor of a region's memory, to be given to who may read it; the caller owns it.

    From now on nobody can map the memory for writing anew, whatever descriptor they have; the
    region's own mapping stays writable.

    Raises:
        Unsupported: The kernel refuses the seal, or /proc is not there.
    """
    try:
        copy = os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(f"memory cannot be opened read-only: {error}") from error
    try:
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    except OSError as error:
        os.close(copy)
        raise Unsupported(f"memory cannot be sealed against writing: {error}") from error
    return copy


class SharedMapping(MappedMemory):
    """Memory of a peer, mapped here for reading and writing; made by `adopt`."""

    @classmethod
    def adopt(cls, fd: int, size_bytes: int, who: str) -> Self:
        """Map what a peer handed over. `fd` is closed, whatever happens.

        Args:
            size_bytes: How much of it.
            who: The peer, for messages.

        Raises:
            Unsupported: It is no memfd, or one of huge pages.
            PermissionDenied: It lacks the seal against shrinking, or may not be written.
            LimitExceeded: It is smaller than said, or larger than can be mapped.
        """
        try:
            seals = _check(fd, size_bytes, who)
            if seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
                raise PermissionDenied(f"memory of {who} is sealed against writing")
            if _access(fd) != os.O_RDWR:
                raise PermissionDenied(f"memory of {who} is not open for reading and writing")
            writable = mmap.PROT_READ | mmap.PROT_WRITE
            return cls(_map(fd, size_bytes, writable, who), f"memory of {who}")
        finally:
            os.close(fd)

    def populate(self) -> None:
        """Fault all pages in; contents stay. Other threads, and the peer, may go on meanwhile.

        Raises:
            Busy: The system has no memory for them.
        """
        view = self.view[:]  # keeps the mapping if it is closed meanwhile
        for at in range(0, self.size_bytes, _POPULATE_SLICE_BYTES):
            piece = view[at : at + _POPULATE_SLICE_BYTES]
            # Not by `mmap.madvise`, which lets no other thread run.
            if not _libc.madvise(address_of(piece), len(piece), _MADV_POPULATE_WRITE):
                continue
            failure = ctypes.get_errno()
            if failure != errno.EINVAL:
                reason = os.strerror(failure)
                raise Busy(f"{self._what} cannot be faulted in: {reason}")
            # A kernel before 5.14. Read only: a write back would undo one of the peer.
            np.bitwise_or.reduce(np.frombuffer(piece, _BYTE)[::PAGE_BYTES])


class MappedArena(MappedMemory):
    """Memory of a server, mapped here for reading only; made by `adopt`."""

    @classmethod
    def adopt(cls, fd: int, size_bytes: int, who: str = "the server") -> Self:
        """Map what a server handed over. `fd` is closed, whatever happens.

        Raises:
            Unsupported, LimitExceeded: As of `SharedMapping.adopt`.
            PermissionDenied: It lacks the seal against shrinking, or could be written here.
        """
        try:
            seals = _check(fd, size_bytes, who)
            sealed = seals & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)
            access = _access(fd)
            if access == os.O_WRONLY or not (sealed or access == os.O_RDONLY):
                raise PermissionDenied(f"memory of {who} is not protected against writing")
            return cls(_map(fd, size_bytes, mmap.PROT_READ, who), f"memory of {who}")
        finally:
            os.close(fd)


def _access(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def _check(fd: int, size_bytes: int, who: str) -> int:
    """The seals of a descriptor that may be mapped. Raises as `SharedMapping.adopt`."""
    if not 0 < size_bytes <= SHARED_BYTES_MAX:
        raise LimitExceeded(
            f"{size_bytes} bytes of {who}: between 1 and {SHARED_BYTES_MAX} can be shared"
        )
    try:
        # First of all: only memory answers it, and other calls may wait for a file system.
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Unsupported(f"what {who} handed over is no memfd: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise PermissionDenied(f"memory of {who} is not sealed against shrinking")
    # Huge pages come from a pool: punched out by the giver, they may be gone for good.
    if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise Unsupported(f"memory of {who} has huge pages of its own (MFD_HUGETLB)")
    found = os.fstat(fd).st_size
    if found < size_bytes:
        raise LimitExceeded(f"memory of {who} has {found} bytes, {size_bytes} were promised")
    return seals


def _map(fd: int, size_bytes: int, protection: int, who: str) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, protection)
    except OSError as error:
        refusal: type[KVStoreError] = LimitExceeded
        if isinstance(error, PermissionError):  # sealed since it was looked at
            refusal = PermissionDenied
        raise refusal(f"{size_bytes} bytes of {who} cannot be mapped: {error}") from error


__all__ = [
    "F_SEAL_FUTURE_WRITE",
    "SHARED_BYTES_MAX",
    "MappedArena",
    "SharedMapping",
    "address_of",
    "host_name",
    "read_only_copy",
]
