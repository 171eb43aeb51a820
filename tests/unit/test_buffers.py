"""Regions and the pieces leased out of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from pickle import PickleBuffer

import numpy as np
import pytest

from kvstore.buffers import PAGE_BYTES, BufferPool, Region
from kvstore.errors import LocalProtocolError


def mapped(name: str) -> bool:
    return f"memfd:{name}" in Path("/proc/self/maps").read_text()


def test_a_region_is_writable_memory_of_its_size() -> None:
    region = Region(3 * PAGE_BYTES + 5)
    region.view[-1] = 7
    assert len(region.view) == region.size_bytes == 3 * PAGE_BYTES + 5
    assert bytes(region.view[-2:]) == b"\0\7"
    region.close()


def test_another_process_sees_the_same_memory() -> None:
    region = Region(PAGE_BYTES)
    region.view[:5] = b"hello"
    script = "import mmap; m = mmap.mmap({}, 4096); assert m[:5] == b'hello'; m[:5] = b'world'"
    subprocess.run(
        [sys.executable, "-c", script.format(region.fd)], pass_fds=[region.fd], check=True
    )
    assert bytes(region.view[:5]) == b"world"
    region.close()


def test_nobody_can_truncate_a_region() -> None:
    region = Region(2 * PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 3 * PAGE_BYTES)
    region.close()


def test_touch_faults_in_every_page_and_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.buffers.TOUCH_SLICE_BYTES", 64 * PAGE_BYTES)
    region = Region(1000 * PAGE_BYTES + 1)
    region.view[:4] = b"kept"
    progress: list[tuple[int, int]] = []
    region.touch(lambda done, total: progress.append((done, total)), thread_count=3)
    assert os.fstat(region.fd).st_blocks * 512 >= region.size_bytes
    assert bytes(region.view[:4]) == b"kept"
    assert len(progress) == 16
    assert progress == sorted(progress)
    assert progress[-1] == (region.size_bytes, region.size_bytes)
    region.close()


def test_closing_gives_the_memory_back() -> None:
    region = Region(PAGE_BYTES, name="closed-region")
    assert mapped("closed-region")
    fd = region.fd
    region.close()
    region.close()
    assert region.closed
    assert not mapped("closed-region")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("use", ["view", "fd"])
def test_a_closed_region_refuses_use(use: str) -> None:
    region = Region(PAGE_BYTES)
    region.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        getattr(region, use)
    with pytest.raises(LocalProtocolError, match="closed"):
        region.touch()


@pytest.mark.parametrize("borrow", [lambda v: v[8:16], lambda v: np.frombuffer(v, np.uint8)[8:16]])
def test_borrowed_memory_outlives_close(borrow: object) -> None:
    region = Region(PAGE_BYTES, name="borrowed-region")
    region.view[8:16] = b"borrowed"
    borrowed = borrow(region.view)  # type: ignore[operator]
    region.close()
    assert bytes(borrowed) == b"borrowed"
    assert mapped("borrowed-region")
    del borrowed
    del region
    assert not mapped("borrowed-region")


def test_an_empty_region_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="at least 1"):
        Region(0)


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(Region(3 * 100 + 50), 100)


def test_a_pool_leases_each_piece_to_one_owner(pool: BufferPool) -> None:
    buffers = [pool.lease("me") for _ in range(3)]
    assert pool.lease("you") is None
    for number, buffer in enumerate(buffers):
        assert buffer is not None
        assert len(buffer.view) == 100
        buffer.view[:] = bytes([number]) * 100
    assert [b.view[0] for b in buffers if b is not None] == [0, 1, 2]
    assert (pool.in_use_count, pool.free_count) == (3, 0)


def test_a_released_piece_is_leased_again(pool: BufferPool) -> None:
    first = pool.lease("me")
    assert first is not None
    first.view[:4] = b"warm"
    first.release()
    assert pool.in_use_count == 0
    second = pool.lease("you")
    assert second is not None
    assert bytes(second.view[:4]) == b"warm"
    assert second.owner == "you"


def test_releasing_twice_is_an_error_also_when_the_piece_has_a_new_owner(pool: BufferPool) -> None:
    first = pool.lease("me")
    assert first is not None
    first.release()
    with pytest.raises(LocalProtocolError, match="released before"):
        first.release()
    second = pool.lease("you")
    with pytest.raises(LocalProtocolError, match="released before"):
        first.release()
    assert second is not None
    second.view[0] = 1
    with pytest.raises(ValueError, match="released memoryview"):
        first.view[0]


def test_a_piece_that_is_being_received_into_stays_leased(pool: BufferPool) -> None:
    buffer = pool.lease("me")
    assert buffer is not None
    # Holds the buffer as a receive does that is under way in another thread.
    receive = PickleBuffer(buffer.view)
    with pytest.raises(LocalProtocolError, match="still in use"):
        buffer.release()
    assert pool.in_use_count == 1
    receive.release()
    buffer.release()
    assert pool.in_use_count == 0


def test_all_pieces_of_an_owner_are_given_back(pool: BufferPool) -> None:
    kept = pool.lease("you")
    pool.lease("me")
    pool.lease("me")
    assert pool.owner_gone("me") == 2
    assert pool.owner_gone("me") == 0
    assert pool.in_use_count == 1
    assert kept is not None
    kept.release()


@pytest.mark.parametrize("size", [0, -1, 351])
def test_pieces_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(LocalProtocolError):
        BufferPool(Region(350), size)
