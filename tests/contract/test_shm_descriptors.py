"""Descriptors travel with the bytes of a unix socket: in order, bounded, and none is lost."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from kvstore.errors import TransportError, Unsupported
from kvstore.transport.sockets import DESCRIPTORS_WAITING_MAX, SocketStream


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Every descriptor is closed at the end of a test."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def streams(nothing_leaks: None) -> Iterator[tuple[SocketStream, SocketStream]]:
    """Two ends of a unix socket."""
    near, far = (SocketStream(sock, "unix", "the other end") for sock in socket.socketpair())
    near.accept_descriptors()
    far.accept_descriptors()
    yield near, far
    near.close()
    far.close()


def give(stream: SocketStream, number: int) -> None:
    """Let a memfd with a number in it go along."""
    fd = os.memfd_create("numbered", os.MFD_CLOEXEC)
    os.pwrite(fd, bytes([number]), 0)
    stream.send_descriptor(fd)
    os.close(fd)  # what is sent is a duplicate


def taken(stream: SocketStream) -> list[int]:
    """The numbers in all that wait."""
    numbers = []
    while (fd := stream.take_descriptor()) is not None:
        assert not os.get_inheritable(fd)
        numbers.append(os.pread(fd, 1, 0)[0])
        os.close(fd)
    return numbers


def drain(stream: SocketStream, into: bytearray) -> None:
    """Receive all that has come."""
    piece = bytearray(50_000)
    with contextlib.suppress(BlockingIOError):
        while count := stream.receive_into([memoryview(piece)]):
            into += piece[:count]


def test_descriptors_come_in_order_with_their_bytes(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    assert far.take_descriptor() is None
    for number in (1, 2):
        give(near, number)
    near.send([b"two"])
    give(near, 3)
    near.send([b"one"])
    received = bytearray()
    drain(far, received)
    assert received == b"twoone"
    assert taken(far) == [1, 2, 3]


def test_descriptors_are_sent_once_also_when_the_socket_is_full(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    payload = os.urandom(3_000_000)
    sent, given, partial, blocked = 0, 0, 0, 0
    received, numbers = bytearray(), []
    while sent < len(payload):
        give(near, given)
        given += 1
        try:
            count = near.send([memoryview(payload)[sent : sent + 300_000]])
            partial += count < 300_000
            sent += count
        except BlockingIOError:
            blocked += 1
            drain(far, received)
            numbers += taken(far)
    drain(far, received)
    numbers += taken(far)
    assert partial
    assert blocked
    assert received == payload
    assert numbers == list(range(given))


def test_descriptor_is_there_with_the_first_byte(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    near.send([b"before"])
    give(near, 9)
    near.send([b"frame"])
    piece = bytearray(7)
    assert far.receive_into([memoryview(piece)]) == 7
    assert piece == b"beforef"
    assert taken(far) == [9]


def test_more_than_may_wait_break_the_connection(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    for number in range(DESCRIPTORS_WAITING_MAX + 1):
        give(near, number)
        near.send([b"x"])
    with pytest.raises(TransportError, match="nothing asked for"):
        drain(far, bytearray())
    far.close()
    assert far.take_descriptor() is None


def test_descriptors_that_are_not_accepted_are_gone() -> None:
    near, far = (SocketStream(sock, "unix", "the other end") for sock in socket.socketpair())
    give(near, 1)
    near.send([b"x"])
    received = bytearray()
    drain(far, received)
    far.accept_descriptors()
    give(near, 2)
    near.send([b"y"])
    drain(far, received)
    assert received == b"xy"
    assert taken(far) == [2]
    near.close()
    far.close()


def test_more_at_once_than_may_wait_break_the_connection() -> None:
    near, sock = socket.socketpair()
    far = SocketStream(sock, "unix", "the other end")
    far.accept_descriptors()
    with near:
        socket.send_fds(near, [b"x"], [near.fileno()] * (DESCRIPTORS_WAITING_MAX + 9))
        with pytest.raises(TransportError, match="at once"):
            drain(far, bytearray())
    assert far.take_descriptor() is None
    far.close()


def test_many_given_at_once_are_sent_as_many_as_may_wait(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    for number in range(DESCRIPTORS_WAITING_MAX + 1):
        give(near, number)
    near.send([b"x"])
    drain(far, bytearray())
    assert taken(far) == list(range(DESCRIPTORS_WAITING_MAX))
    near.send([b"x"])
    drain(far, bytearray())
    assert taken(far) == [DESCRIPTORS_WAITING_MAX]


def test_close_closes_what_was_not_sent_and_what_was_not_taken(
    streams: tuple[SocketStream, SocketStream],
) -> None:
    near, far = streams
    give(near, 1)
    near.send([b"x"])
    drain(far, bytearray())
    give(near, 2)  # the fixture counts


def test_what_is_no_descriptor_is_not_sent(streams: tuple[SocketStream, SocketStream]) -> None:
    with pytest.raises(TransportError, match="Bad file descriptor"):
        streams[0].send_descriptor(999_999)


def test_peer_is_known_by_its_uid(streams: tuple[SocketStream, SocketStream]) -> None:
    assert streams[0].peer_uid() == os.getuid()
    streams[0].close()
    assert streams[0].peer_uid() is None


def test_tcp_hands_nothing_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = SocketStream(socket.create_connection(listener.getsockname()), "tcp", "peer")
        with pytest.raises(Unsupported, match="by tcp"):
            near.send_descriptor(0)
        assert near.take_descriptor() is None
        assert near.peer_uid() is None
        near.close()
