"""Shared memory: what is mapped of a peer, what is refused, and what a reader cannot do."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.buffers import PAGE_BYTES, Region
from kvstore.errors import (
    Busy,
    LimitExceeded,
    LocalProtocolError,
    PermissionDenied,
    Unsupported,
)
from kvstore.transport import shm
from kvstore.transport.shm import (
    F_SEAL_FUTURE_WRITE,
    SHARED_BYTES_MAX,
    MappedArena,
    SharedMapping,
    address_of,
    read_only_copy,
)

SIZE = 4 * PAGE_BYTES
HUGE_PAGES = 0x0004  # MFD_HUGETLB; needs no such page until it is mapped


@pytest.fixture
def region() -> Iterator[Region]:
    """Memory of the giver."""
    region = Region(SIZE, name="given")
    yield region
    region.close()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every descriptor is closed at the end of a test."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def memfd(seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    fd = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, 1 << 30 if flags else SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(fd: int, flags: int) -> int:
    copy = os.open(f"/proc/self/fd/{fd}", flags)
    os.close(fd)
    return copy


def temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return os.dup(file.fileno())


FOREIGN: dict[str, Callable[[], int]] = {
    "file": temporary_file,
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "device": lambda: os.open("/dev/zero", os.O_RDWR),
    "path": lambda: reopened(memfd(), os.O_PATH),
    "huge": lambda: memfd(flags=HUGE_PAGES),
}


@pytest.mark.parametrize("kind", [SharedMapping, MappedArena])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_plain_memory_is_refused(
    kind: type[SharedMapping | MappedArena], foreign: str
) -> None:
    with pytest.raises(Unsupported, match=r"of a peer has huge pages|is no memfd"):
        kind.adopt(FOREIGN[foreign](), SIZE, "a peer")


@pytest.mark.parametrize("kind", [SharedMapping, MappedArena])
def test_memory_that_could_shrink_is_refused(kind: type[SharedMapping | MappedArena]) -> None:
    for seals in (0, fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE):
        with pytest.raises(PermissionDenied, match="not sealed against shrinking"):
            kind.adopt(memfd(seals), SIZE, "a peer")


@pytest.mark.parametrize("kind", [SharedMapping, MappedArena])
@pytest.mark.parametrize("size", [-1, 0, SIZE + 1, SHARED_BYTES_MAX + 1, 1 << 62])
def test_sizes_that_are_not_there_are_refused(
    kind: type[SharedMapping | MappedArena], size: int
) -> None:
    with pytest.raises(LimitExceeded, match=r"promised|can be shared"):
        kind.adopt(memfd(fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE), size, "a peer")


def test_memory_is_mapped_for_both(region: Region) -> None:
    shared = SharedMapping.adopt(os.dup(region.fd), SIZE, "a peer")
    shared.view[-4:] = b"here"
    region.view[:5] = b"there"
    assert (bytes(region.view[-4:]), bytes(shared.view[:5])) == (b"here", b"there")
    shared.close()


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
def test_memory_that_is_to_be_written_is_not_sealed(seal: int) -> None:
    with pytest.raises(PermissionDenied, match="sealed against writing"):
        SharedMapping.adopt(memfd(fcntl.F_SEAL_SHRINK | seal), SIZE, "a peer")


def test_memory_that_is_to_be_written_is_open_for_both(region: Region) -> None:
    for access in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(PermissionDenied, match="reading and writing"):
            SharedMapping.adopt(reopened(os.dup(region.fd), access), SIZE, "a peer")


def test_giver_cannot_take_away_what_is_mapped() -> None:
    fd = memfd()
    shared = SharedMapping.adopt(os.dup(fd), SIZE, "a peer")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE_BYTES)
    with pytest.raises(OSError, match="busy"):  # it is mapped for writing
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    os.close(fd)
    shared.view[:] = bytes([7]) * SIZE
    shared.close()


@pytest.mark.parametrize("old_kernel", [False, True])
def test_populate_faults_in_every_page_and_keeps_what_is_there(
    region: Region, monkeypatch: pytest.MonkeyPatch, old_kernel: bool
) -> None:
    if old_kernel:  # it knows no such advice
        monkeypatch.setattr(shm, "_MADV_POPULATE_WRITE", 9999)
    monkeypatch.setattr(shm, "_POPULATE_SLICE_BYTES", PAGE_BYTES)
    region.view[:4] = b"kept"
    shared = SharedMapping.adopt(os.dup(region.fd), SIZE, "a peer")
    shared.populate()
    assert os.fstat(region.fd).st_blocks * 512 >= SIZE
    assert bytes(region.view[:4]) == b"kept"
    shared.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        shared.populate()


def test_populate_says_that_there_is_no_memory(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedMapping.adopt(os.dup(region.fd), SIZE, "a peer")
    monkeypatch.setattr(shm, "address_of", lambda view: 1 << 46)  # where nothing is mapped
    with pytest.raises(Busy, match="a peer cannot be faulted in: Cannot allocate"):
        shared.populate()
    shared.close()


def test_borrowed_memory_outlives_close() -> None:
    shared = SharedMapping.adopt(memfd(), SIZE, "a peer")
    borrowed = shared.view[8:16]
    shared.close()
    shared.close()
    assert shared.closed
    borrowed[:] = b"borrowed"
    with pytest.raises(LocalProtocolError, match="closed"):
        shared.view  # noqa: B018
    del shared
    assert "memfd:foreign" in Path("/proc/self/maps").read_text()
    del borrowed


def test_reader_sees_what_the_owner_writes(region: Region) -> None:
    arena = MappedArena.adopt(read_only_copy(region), SIZE)
    os.close(read_only_copy(region))  # a second reader
    region.view[:5] = b"later"
    assert bytes(arena.view[:5]) == b"later"
    assert arena.view.readonly
    arena.close()


def test_reader_can_neither_write_nor_cut(region: Region) -> None:
    region.view[:4] = b"kept"
    copy = read_only_copy(region)
    writable = reopened(os.dup(copy), os.O_RDWR)  # that is granted, and of no use
    libc = ctypes.CDLL(None, use_errno=True)
    for fd in (copy, writable):
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE, mmap.MAP_SHARED)
        with pytest.raises(OSError, match=r"not permitted|Bad file descriptor"):
            os.pwrite(fd, b"gone", 0)
        for size in (PAGE_BYTES, SIZE + PAGE_BYTES):
            with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
                os.ftruncate(fd, size)
        hole = (0x03, ctypes.c_long(0), ctypes.c_long(SIZE))  # PUNCH_HOLE | KEEP_SIZE
        assert libc.fallocate(fd, *hole) == -1
        os.close(fd)
    assert bytes(region.view[:4]) == b"kept"


def test_reader_cannot_make_its_mapping_writable(region: Region) -> None:
    arena = MappedArena.adopt(read_only_copy(region), SIZE)
    with pytest.raises(TypeError, match="read-only"):
        arena.view[0] = 1
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(address_of(arena.view))
    both = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mprotect(address, ctypes.c_size_t(SIZE), both) == -1
    arena.close()


def test_arena_that_could_be_written_is_refused(region: Region) -> None:
    for access in (os.O_RDWR, os.O_WRONLY):
        with pytest.raises(PermissionDenied, match="not protected against writing"):
            MappedArena.adopt(reopened(os.dup(region.fd), access), SIZE)


def test_sealed_arena_may_come_open_for_writing(region: Region) -> None:
    os.close(read_only_copy(region))
    arena = MappedArena.adopt(os.dup(region.fd), SIZE)
    assert arena.view.readonly
    arena.close()


@pytest.mark.parametrize("missing", ["proc", "seal"])
def test_read_only_copy_says_what_the_system_lacks(
    region: Region, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    with monkeypatch.context() as patched:
        if missing == "proc":
            patched.setattr(os, "open", lambda path, flags: os.readlink(f"{path}/x"))
        else:
            patched.setattr(shm, "F_SEAL_FUTURE_WRITE", 1 << 20)
        with pytest.raises(Unsupported, match=r"opened read-only|sealed against writing"):
            read_only_copy(region)


def test_address_is_that_of_the_first_byte(region: Region) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(region.view))
    assert address_of(region.view) == start
    assert address_of(region.view[5:9].toreadonly()) == start + 5
    assert address_of(memoryview(bytearray(8))[4:]) % 4 == 0
    with pytest.raises(LocalProtocolError, match="contiguous"):
        address_of(region.view[::2])
