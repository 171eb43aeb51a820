"""Regions that one client has handed over: which are taken, and what requests may name."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.buffers import PAGE_BYTES, Region
from kvstore.errors import LimitExceeded, LocalProtocolError, PermissionDenied, Unsupported
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import REGIONS_SHARED_MAX, Memory, MemoryRegion
from kvstore.protocol.strands import Strands
from kvstore.sharedregions import SharedRegions, host_bytes
from kvstore.transport.shm import SharedMapping
from tests.support.engine import key
from tests.support.workers import AtOnce, ByHand

SIZE = 4 * PAGE_BYTES
GEOMETRY = Geometry((40, 24, 100))
BLOCK = 164
KEYS = [key(number) for number in range(2)]
NAME = "memfd:handed-over"


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every descriptor is closed and every page unmapped at the end of a test."""
    before = os.listdir("/proc/self/fd")
    yield
    assert mapped() == 0
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def given_region(nothing_leaks: None) -> Iterator[Region]:
    """Memory of the client."""
    region = Region(SIZE, name="handed-over")
    yield region
    region.close()


@pytest.fixture
def shared(nothing_leaks: None) -> Iterator[SharedRegions]:
    """What the server has of it."""
    shared = SharedRegions("a client")
    yield shared
    shared.close()


def mapped() -> int:
    """How often the memory is mapped in this process, when all is done that was begun."""
    for thread in threading.enumerate():
        if thread.name == "unmap":
            thread.join()
    return Path("/proc/self/maps").read_text().count(NAME)


def strands() -> Strands:
    """Of a connection without threads."""
    return Strands(AtOnce())


def memory(*places: tuple[int, int], **region: object) -> Memory:
    """A request that names region 5."""
    values = {"keys": (5,), "size_bytes": SIZE, **region}
    packed = b"".join(struct.pack("<IQ", *place) for place in places)
    return Memory(regions=(MemoryRegion(**values),), places=packed)  # type: ignore[arg-type]


def test_a_region_is_mapped_until_it_is_taken_back(
    shared: SharedRegions, given_region: Region
) -> None:
    region = shared.share(5, SIZE, os.dup(given_region.fd))
    region.view[:4] = b"both"
    assert bytes(given_region.view[:4]) == b"both"
    assert (len(shared), shared.shared_bytes, mapped()) == (1, SIZE, 2)
    shared.unshare(5).close()
    assert (len(shared), shared.shared_bytes, mapped()) == (0, 0, 1)


def test_numbers_are_used_once_at_a_time(shared: SharedRegions, given_region: Region) -> None:
    shared.share(5, SIZE, os.dup(given_region.fd))
    with pytest.raises(LocalProtocolError, match="SHARE of region 5, which is shared already"):
        shared.share(5, SIZE, os.dup(given_region.fd))
    assert (len(shared), shared.shared_bytes, mapped()) == (1, SIZE, 2)
    shared.unshare(5).close()
    with pytest.raises(LocalProtocolError, match="UNSHARE of region 5, which is not shared"):
        shared.unshare(5).close()
    shared.share(5, SIZE, os.dup(given_region.fd))


def test_what_is_refused_counts_nothing(shared: SharedRegions, given_region: Region) -> None:
    with pytest.raises(LimitExceeded, match="were promised"):
        shared.share(5, SIZE + 1, os.dup(given_region.fd))
    with pytest.raises(Unsupported, match="is no memfd"):
        shared.share(5, SIZE, os.open("/dev/zero", os.O_RDWR))
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(PermissionDenied, match="of a client is not sealed"):
        shared.share(5, SIZE, fd)
    assert (len(shared), shared.shared_bytes, mapped()) == (0, 0, 1)


def test_a_session_shares_no_more_than_it_may(given_region: Region) -> None:
    shared = SharedRegions("a client", 2 * SIZE)
    for number in (1, 2):
        shared.share(number, SIZE, os.dup(given_region.fd))
    with pytest.raises(LimitExceeded, match=f"region 3 of 1 bytes beside {2 * SIZE}"):
        shared.share(3, 1, os.dup(given_region.fd))
    shared.unshare(1).close()
    shared.share(3, 1, os.dup(given_region.fd))
    shared.close()
    assert (len(shared), shared.shared_bytes) == (0, 0)


def test_regions_of_a_session_that_ends_are_unmapped_beside_the_loop(
    shared: SharedRegions, given_region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    by: list[threading.Thread] = []
    real = SharedMapping.close

    def close(region: SharedMapping) -> None:
        by.append(threading.current_thread())
        real(region)

    monkeypatch.setattr(SharedMapping, "close", close)
    for number in range(3):
        shared.share(number, SIZE, os.dup(given_region.fd))
    shared.close()
    assert mapped() == 1
    assert len(by) == 3
    assert threading.current_thread() not in by


def test_no_session_has_more_than_the_host(shared: SharedRegions) -> None:
    # A memfd may claim any size: its pages come when they are touched.
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with pytest.raises(LimitExceeded, match="one session shares"):
        shared.share(5, host_bytes() + 1, fd)


def test_regions_of_a_session_are_counted(shared: SharedRegions, given_region: Region) -> None:
    for number in range(REGIONS_SHARED_MAX):
        shared.share(number, 1, os.dup(given_region.fd))
    with pytest.raises(LimitExceeded, match=f"more than {REGIONS_SHARED_MAX} regions"):
        shared.share(REGIONS_SHARED_MAX, 1, os.dup(given_region.fd))


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": (6,)},
        {"keys": (5, 5)},
        {"address": 1},
        {"size_bytes": SIZE + 1},
    ],
)
def test_requests_name_what_was_handed_over(
    shared: SharedRegions, given_region: Region, wrong: dict[str, object]
) -> None:
    shared.share(5, SIZE, os.dup(given_region.fd))
    pieces = PieceMap(GEOMETRY, 1)
    told = memory((0, 0), **wrong)
    with pytest.raises(LocalProtocolError, match="must name a shared region"):
        shared.sink(told, bytes(32), KEYS[:1], pieces, strands())
    with pytest.raises(LocalProtocolError, match="must name a shared region"):
        shared.puller(told, GEOMETRY, 1, strands())


def test_places_outside_are_refused(shared: SharedRegions, given_region: Region) -> None:
    shared.share(5, SIZE, os.dup(given_region.fd))
    told = memory((0, SIZE - BLOCK + 1))
    with pytest.raises(LimitExceeded, match="lie outside"):
        shared.sink(told, bytes(32), KEYS[:1], PieceMap(GEOMETRY, 1), strands())
    with pytest.raises(LimitExceeded, match="lie outside"):
        shared.puller(told, GEOMETRY, 1, strands())
    with pytest.raises(LimitExceeded, match="lie outside"):
        # Within the region, and outside of what the request names of it.
        shared.puller(memory((0, 0), size_bytes=BLOCK - 1), GEOMETRY, 1, strands())


def test_a_put_is_taken_from_where_it_was_said_to_lie(
    shared: SharedRegions, given_region: Region
) -> None:
    shared.share(5, SIZE, os.dup(given_region.fd))
    worker = ByHand()
    puller = shared.puller(memory((0, 8), (0, 1000)), GEOMETRY, 2, Strands(worker))
    given_region.view[8 : 8 + BLOCK] = bytes([1]) * BLOCK
    given_region.view[1000 : 1000 + BLOCK] = bytes([2]) * BLOCK
    pulled: list[int] = []
    puller.on_pulled = pulled.append
    targets = [bytearray(BLOCK), bytearray(BLOCK)]
    for index in (1, 0):
        puller.pull(index, memoryview(targets[index]))
    assert not puller.idle
    worker.finish()
    assert puller.idle
    assert pulled == [1, 0]
    assert targets == [bytes([1]) * BLOCK, bytes([2]) * BLOCK]


@pytest.mark.parametrize("way", ["unshare", "close"])
def test_memory_in_use_stays_mapped_and_no_longer(
    shared: SharedRegions, given_region: Region, way: str
) -> None:
    shared.share(5, SIZE, os.dup(given_region.fd))
    puller = shared.puller(memory((0, 0)), GEOMETRY, 1, strands())
    if way == "unshare":
        shared.unshare(5).close()
    else:
        shared.close()
    assert mapped() == 2
    del puller
    assert mapped() == 1
