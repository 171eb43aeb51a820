"""Memory that one process hands to another: what is refused, and what a broken end leaves behind.

The daemons here are processes of their own, and the clients speak by hand.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore.memorymessages import Share
from kvstore.messages import Empty, Error, FetchOutcome, PutOutcome
from kvstore.transport.shm import F_SEAL_FUTURE_WRITE
from kvstore.transport.sockets import DESCRIPTORS_WAITING_MAX
from kvstore.wire import FrameType
from tests.support.engine import content, key, layout
from tests.support.memorypeer import (
    MemoryPeer,
    descriptors,
    in_region,
    mappings,
    marked,
    memfd,
    refused,
)
from tests.support.processes import PATIENCE_S, Daemon, daemon

LAYOUT = layout(1000, 3000, 96)
BLOCK = 4096
SIZE = 16 * BLOCK
NAMES = ("foreign", "marked", "kvstore-region")


def eventually(condition: Callable[[], object], what: str) -> None:
    """Ask again and again until it is so; fail if it never is."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        os.sched_yield()


@pytest.fixture(scope="module")
def kvstored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests of this module; each must leave it as it was."""
    path = tmp_path_factory.mktemp("shm") / "s"
    listen = ("--listen", f"unix://{path}", "--listen", "tcp://127.0.0.1:0")
    with daemon(*listen, listeners=2) as process:
        yield process


@pytest.fixture
def uri(kvstored: Daemon) -> Iterator[str]:
    """The daemon's unix socket; when the test ends nothing of it is left in the daemon."""
    (found,) = (uri for uri in kvstored.uris if uri.startswith("unix:"))
    before = descriptors(kvstored.pid)
    yield found
    eventually(lambda: descriptors(kvstored.pid) == before, "all descriptors are closed")
    eventually(lambda: not mappings(kvstored.pid, *NAMES), "all memory is unmapped")


def temporary_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return os.dup(file.fileno())


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def read_only() -> int:
    fd = memfd(SIZE)
    copy = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return copy


FOREIGN: dict[str, tuple[Callable[[], int], str]] = {
    "file": (temporary_file, "is no memfd"),
    "pipe": (pipe, "is no memfd"),
    "device": (lambda: os.open("/dev/zero", os.O_RDWR), "is no memfd"),
    "unsealed": (lambda: memfd(SIZE, 0), "not sealed against shrinking"),
    "only grow": (lambda: memfd(SIZE, fcntl.F_SEAL_GROW), "not sealed against shrinking"),
    "too small": (lambda: memfd(SIZE - 1), f"has {SIZE - 1} bytes, {SIZE} were promised"),
    "empty": (lambda: memfd(0), "has 0 bytes"),
    "read-only": (read_only, "not open for reading and writing"),
    "write-sealed": (
        lambda: memfd(SIZE, fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE),
        "sealed against writing",
    ),
}


def check_serves(peer: MemoryPeer, number: int = 1) -> None:
    """Memory that is right is taken on the same connection, and used."""
    region = marked(SIZE, 0)
    namespace = peer.open_namespace(LAYOUT)
    names = [key(number), key(number + 1)]
    blocks = [content(name, BLOCK) for name in names]
    region.view[: 2 * BLOCK] = b"".join(blocks)
    assert peer.share(number, SIZE, region.fd) == Empty()
    told = in_region(number, SIZE, 0, BLOCK)
    outcomes = set(peer.put_from(namespace, LAYOUT, names, blocks, told).outcomes)
    assert outcomes <= {PutOutcome.STORED, PutOutcome.EXISTS}
    done = peer.fetch_into(namespace, LAYOUT, names, in_region(number, SIZE, 5 * BLOCK, 3 * BLOCK))
    assert done.outcomes == bytes([FetchOutcome.HIT] * 2)
    assert bytes(region.view[5 * BLOCK : 6 * BLOCK]) == blocks[0]
    assert bytes(region.view[3 * BLOCK : 4 * BLOCK]) == blocks[1]
    assert peer.unshare(number) == Empty()
    region.close()


@pytest.mark.slow
@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_memory_is_refused_and_the_connection_goes_on(uri: str, foreign: str) -> None:
    make, words = FOREIGN[foreign]
    with MemoryPeer(uri) as peer:
        fd = make()
        assert refused(peer.share(1, SIZE, fd), words)
        os.close(fd)
        check_serves(peer)


@pytest.mark.slow
def test_more_than_the_host_has_is_refused(uri: str) -> None:
    with MemoryPeer(uri) as peer:
        fd = memfd(1 << 46)
        assert refused(peer.share(1, 1 << 46, fd), "one session shares")
        os.close(fd)
        check_serves(peer)


@pytest.mark.slow
def test_share_without_a_descriptor_is_refused(uri: str) -> None:
    with MemoryPeer(uri) as peer:
        assert refused(peer.share(1, SIZE), "SHARE without a descriptor")
        check_serves(peer)


@pytest.mark.slow
def test_share_over_tcp_is_refused(kvstored: Daemon, uri: str) -> None:
    (tcp,) = (found for found in kvstored.uris if found.startswith("tcp:"))
    with MemoryPeer(tcp) as peer:
        assert refused(peer.share(1, SIZE), "can be handed over on a unix socket")
        reply = peer.fetch_into(
            peer.open_namespace(LAYOUT), LAYOUT, [key(1)], in_region(1, SIZE, 0)
        )
        assert refused(reply, "must name a shared region")


@pytest.mark.slow
def test_memory_of_another_file_than_was_said_is_refused(uri: str) -> None:
    meant, other = marked(SIZE, 1), marked(SIZE, 2)
    share = Share(number=1, size_bytes=SIZE, inode=os.fstat(meant.fd).st_ino)
    with MemoryPeer(uri) as peer:
        peer.send_with([other.fd], FrameType.SHARE, share)
        assert refused(peer.receive().message, "another descriptor")
        peer.send_with([meant.fd], FrameType.SHARE, share)
        assert peer.receive().message == Empty()
    meant.close()
    other.close()


@pytest.mark.slow
def test_number_in_use_is_refused_and_its_memory_stays(uri: str) -> None:
    first, second = marked(SIZE, 1), marked(SIZE, 2)
    with MemoryPeer(uri) as peer:
        namespace = peer.open_namespace(LAYOUT)
        block = content(key(70), BLOCK)
        first.view[:BLOCK] = block
        assert peer.share(1, SIZE, first.fd) == Empty()
        assert refused(peer.share(1, SIZE, second.fd), "which is shared already")
        peer.put_from(namespace, LAYOUT, [key(70)], [block], in_region(1, SIZE, 0))
        peer.fetch_into(namespace, LAYOUT, [key(70)], in_region(1, SIZE, 4 * BLOCK))
    assert bytes(first.view[4 * BLOCK : 5 * BLOCK]) == block
    assert bytes(second.view) == bytes([2]) * SIZE
    first.close()
    second.close()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "good", "refused", "ping"])
def test_memory_is_never_taken_for_that_of_another_frame(uri: str, before: str) -> None:
    """The descriptor of a frame that nobody understands goes with it."""
    wrong, right = marked(SIZE, 1), marked(SIZE, 2)
    with MemoryPeer(uri) as peer:
        namespace = peer.open_namespace(LAYOUT)
        if before == "good":
            assert peer.share(7, SIZE, wrong.fd) == Empty()
        elif before == "refused":
            assert isinstance(peer.share(7, SIZE), Error)
        elif before == "ping":
            assert peer.call(FrameType.PING, Empty()) == Empty()
        peer.send_with([wrong.fd], FrameType.SHARE, b"\xc1 is no MessagePack")
        assert isinstance(peer.receive().message, Error)
        assert peer.share(1, SIZE, right.fd) == Empty()
        block = content(key(80), BLOCK)
        right.view[:BLOCK] = block
        done = peer.put_from(namespace, LAYOUT, [key(80)], [block], in_region(1, SIZE, 0))
        assert done.outcomes[0] in (PutOutcome.STORED, PutOutcome.EXISTS)
        done = peer.fetch_into(namespace, LAYOUT, [key(80)], in_region(1, SIZE, 8 * BLOCK))
        assert done.outcomes == bytes([FetchOutcome.HIT])
    assert bytes(right.view[8 * BLOCK : 9 * BLOCK]) == block
    assert bytes(wrong.view) == bytes([1]) * SIZE
    wrong.close()
    right.close()


@pytest.mark.slow
def test_frames_that_come_at_once_keep_their_descriptors_apart(uri: str) -> None:
    regions = [marked(SIZE, number) for number in range(1, 5)]
    with MemoryPeer(uri) as peer:
        namespace = peer.open_namespace(LAYOUT)
        for number, region in enumerate(regions, 1):
            told = Share(number=number, size_bytes=SIZE)
            peer.send_with([region.fd], FrameType.SHARE, told if number != 3 else b"\xc1")
        replies = [peer.receive().message for _ in regions]
        assert [isinstance(reply, Error) for reply in replies].count(True) == 1
        block = content(key(90), BLOCK)
        regions[3].view[:BLOCK] = block
        peer.put_from(namespace, LAYOUT, [key(90)], [block], in_region(4, SIZE, 0))
        for number in (1, 2, 4):
            memory = in_region(number, SIZE, number * BLOCK)
            peer.fetch_into(namespace, LAYOUT, [key(90)], memory)
    for number, region in enumerate(regions, 1):
        written = bytes(region.view[number * BLOCK : (number + 1) * BLOCK]) == block
        assert written == (number != 3)
        region.close()


@pytest.mark.slow
def test_descriptors_that_nothing_asked_for_end_the_connection_and_are_closed(uri: str) -> None:
    region = marked(SIZE, 1)
    with MemoryPeer(uri) as peer:
        assert peer.share(1, SIZE, region.fd, region.fd, region.fd) == Empty()
        peer.send_with([region.fd] * DESCRIPTORS_WAITING_MAX, FrameType.PING, Empty())
        peer.rest()  # it ends
    with MemoryPeer(uri) as peer:
        check_serves(peer)
    region.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fetch", "put"])
def test_places_that_are_not_there_are_refused(uri: str, kind: str) -> None:
    region = marked(SIZE, 1)
    wrong = {
        "outside": (in_region(1, SIZE, SIZE - BLOCK + 1), "lie outside"),
        "far outside": (in_region(1, SIZE, (1 << 64) - 1), "lie outside"),
        "more than there is": (in_region(1, SIZE + 1, 0), "not more of it than there is"),
        "unknown": (in_region(2, SIZE, 0), "must name a shared region"),
        "too many": (in_region(1, SIZE, 0, BLOCK), "of places for 1 blocks"),
    }
    with MemoryPeer(uri) as peer:
        namespace = peer.open_namespace(LAYOUT)
        assert peer.share(1, SIZE, region.fd) == Empty()
        for memory, words in wrong.values():
            if kind == "fetch":
                reply = peer.fetch_into(namespace, LAYOUT, [key(1)], memory)
            else:
                reply = peer.put_from(namespace, LAYOUT, [key(1)], [bytes(BLOCK)], memory)
            assert refused(reply, words)
        assert peer.unshare(1) == Empty()
        gone = peer.fetch_into(namespace, LAYOUT, [key(1)], in_region(1, SIZE, 0))
        assert refused(gone, "must name a shared region")
        assert refused(peer.unshare(1), "which is not shared")
        check_serves(peer)
    assert bytes(region.view) == bytes([1]) * SIZE
    region.close()


@pytest.mark.slow
def test_memory_of_one_session_is_unknown_to_another(uri: str) -> None:
    region = marked(SIZE, 1)
    with MemoryPeer(uri) as owner, MemoryPeer(uri) as other:
        assert owner.share(1, SIZE, region.fd) == Empty()
        namespace = other.open_namespace(LAYOUT)
        reply = other.fetch_into(namespace, LAYOUT, [key(1)], in_region(1, SIZE, 0))
        assert refused(reply, "must name a shared region")
    region.close()


@pytest.mark.slow
def test_refusals_are_counted(uri: str) -> None:
    with MemoryPeer(uri) as peer:
        before = peer.call(FrameType.STATUS, Empty()).counters
        for _ in range(3):
            peer.share(1, SIZE)
        after = peer.call(FrameType.STATUS, Empty()).counters
    assert after["requests_refused"] - before.get("requests_refused", 0) == 3
