"""Registered memory: regions that other processes can share, and pieces leased out of them.

First touch of a page costs more than sending it, so that memory on the data path is mapped
and touched once, when the process starts, and never given back while it runs.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import LocalProtocolError

PAGE_BYTES = 4096
# Zeroing memory saturates the memory controllers of one socket with about this many cores.
TOUCH_THREADS_MAX = 16
# A unit of progress: 10 to 50 ms of work, so that a start-up of minutes is seen to move.
TOUCH_SLICE_BYTES = 64 * 1024 * 1024


class MappedMemory:
    """A mapping that is closed at once, or when the last who reads in it is done.

    Ownership: whoever has a slice of `view` borrows it, and the memory stays mapped until the
    last slice is gone, so that closing never pulls memory from under a reader.

    Args:
        mapping: Owned from now on.
        what: Name of it, for errors.
    """

    def __init__(self, mapping: mmap.mmap, what: str) -> None:
        self.size_bytes = len(mapping)
        self._what = what
        self._mapping = mapping
        self._view: memoryview | None = memoryview(mapping)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._view is None

    @property
    def view(self) -> memoryview:
        """All of the memory. Slices of it keep the memory alive."""
        if self._view is None:
            raise LocalProtocolError(f"{self._what} is closed")
        return self._view

    def close(self) -> None:
        """Give the memory back: at once, or when the last borrowed slice of it is gone.

        Harmless when called again.
        """
        if self._view is None:
            return
        view, self._view = self._view, None
        try:
            view.release()
            self._mapping.close()
        except BufferError:
            # Slices are out. They hold the mapping, which unmaps itself after the last.
            pass


class Region(MappedMemory):
    """One shared mapping of anonymous memory, backed by a memfd.

    Ownership: as of `MappedMemory`; `view` is writable. `close` gives the file descriptor back
    at once.

    The size is sealed: no process that was handed the descriptor can truncate it and make
    our next access fail.

    Args:
        size_bytes: At least 1; rounded up to whole pages by the system.
        name: What the memory is called in /proc/<pid>/maps.

    Raises:
        LocalProtocolError: `size_bytes` is below 1.
        OSError: The system has no descriptor or address space left.
    """

    def __init__(self, size_bytes: int, name: str = "kvstore") -> None:
        if size_bytes < 1:
            raise LocalProtocolError(f"a region of {size_bytes} bytes: must be at least 1")
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(self._fd, size_bytes, mmap.MAP_SHARED)
        except BaseException:
            os.close(self._fd)
            raise
        super().__init__(mapping, "this region")

    @property
    def fd(self) -> int:
        """The memfd, to be sent to another process; it stays ours."""
        if self._view is None:
            raise LocalProtocolError("this region is closed")
        return self._fd

    def touch(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        thread_count: int | None = None,
    ) -> None:
        """Fault in all pages, in parallel. Contents stay as they are.

        Nobody else may write to the region meanwhile.

        Args:
            on_progress: Called on this thread with (bytes done, bytes in all) after each slice.
            thread_count: Default: one a core, at most `TOUCH_THREADS_MAX`.
        """
        pages = np.frombuffer(self.view, dtype=np.uint8)
        try:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # the kernel was built without them, or does not want them for shared memory
        threads = thread_count or min(len(os.sched_getaffinity(0)), TOUCH_THREADS_MAX)
        with ThreadPoolExecutor(threads, thread_name_prefix="touch") as executor:
            futures = {
                executor.submit(_touch_pages, pages[at : at + TOUCH_SLICE_BYTES]): min(
                    TOUCH_SLICE_BYTES, self.size_bytes - at
                )
                for at in range(0, self.size_bytes, TOUCH_SLICE_BYTES)
            }
            done_bytes = 0
            for future in as_completed(futures):
                future.result()
                done_bytes += futures[future]
                if on_progress is not None:
                    on_progress(done_bytes, self.size_bytes)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def _touch_pages(pages: NDArray[np.uint8]) -> None:
    # A write of what is there already: numpy lets other threads run meanwhile.
    first_bytes = pages[::PAGE_BYTES]
    np.bitwise_or(first_bytes, 0, out=first_bytes)


class Buffer:
    """A piece of a region, leased to one owner until `release`.

    Attributes:
        view: Its memory, writable. Valid until `release`; the owner must let go of every
            slice of it before, because the next owner writes there.
        owner: Who has it.
    """

    __slots__ = ("_index", "_pool", "owner", "view")

    def __init__(self, pool: BufferPool, index: int, view: memoryview, owner: object) -> None:
        self._pool = pool
        self._index = index
        self.view = view
        self.owner = owner

    def release(self) -> None:
        """Give the piece back.

        Raises:
            LocalProtocolError: It was given back before; or a system call is still under way
                in its view, and then it stays leased.
        """
        self._pool._give_back(self, self._index)


class BufferPool:
    """Fixed-size pieces of a region, each leased to one owner at a time.

    Ownership: the pool borrows the region and must be dropped before it is closed. Not
    thread-safe: one thread leases and releases.

    Args:
        region: Where the pieces are cut from, beginning at its first byte.
        buffer_bytes: Size of a piece. What is left at the end of the region stays unused.
    """

    def __init__(self, region: Region, buffer_bytes: int) -> None:
        if not 0 < buffer_bytes <= region.size_bytes:
            raise LocalProtocolError(
                f"buffers of {buffer_bytes} bytes from a region of {region.size_bytes}"
            )
        self.buffer_bytes = buffer_bytes
        self.buffer_count = region.size_bytes // buffer_bytes
        self._region = region
        # The piece given back last is leased next: it is the one that caches still hold.
        self._free = list(range(self.buffer_count - 1, -1, -1))
        self._leased: dict[int, Buffer] = {}

    @property
    def in_use_count(self) -> int:
        """Pieces that are leased."""
        return len(self._leased)

    @property
    def free_count(self) -> int:
        """Pieces that are not."""
        return len(self._free)

    def lease(self, owner: object) -> Buffer | None:
        """A free piece, or None when all are leased. Its bytes are whatever was there."""
        if not self._free:
            return None
        index = self._free.pop()
        start = index * self.buffer_bytes
        buffer = Buffer(self, index, self._region.view[start : start + self.buffer_bytes], owner)
        self._leased[index] = buffer
        return buffer

    def owner_gone(self, owner: object) -> int:
        """Give back all that an owner has; returns how many pieces."""
        buffers = [buffer for buffer in self._leased.values() if buffer.owner is owner]
        for buffer in buffers:
            buffer.release()
        return len(buffers)

    def _give_back(self, buffer: Buffer, index: int) -> None:
        if self._leased.get(index) is not buffer:
            raise LocalProtocolError(f"buffer {index} was released before")
        try:
            buffer.view.release()
        except BufferError as error:
            raise LocalProtocolError(f"buffer {index} is still in use: {error}") from error
        del self._leased[index]
        self._free.append(index)
