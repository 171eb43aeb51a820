"""Requests and replies whose bytes are known before they come: gather, scatter, compare.

A bare client for servers of a text protocol. Since all blocks have one size, every byte of a
reply but the values is known, and so is where each value begins: so a reply is received by
`recvmsg_into` with the values' own memory among its buffers, and nothing is copied or searched.
What was received around the values is compared with what had to come. That is the least that a
client in Python can do: what is left is the server and its protocol.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from peers.base import CALL_TIMEOUT_S, PeerFailed

# Of one call; the system takes 1,024.
BUFFERS_MAX = 512


def send_all(sock: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    """Send parts one behind the other, without joining them."""
    left = [memoryview(part) for part in parts]
    first = 0
    while first < len(left):
        sent = sock.sendmsg(left[first : first + BUFFERS_MAX])
        first = _advance(left, first, sent)


class Reply:
    """A reply: its fixed parts, and memory for the values between them.

    Args:
        fixed: What stands before each value and after the last.
    """

    def __init__(self, fixed: Sequence[bytes]) -> None:
        self._expected = fixed
        self._fixed = [bytearray(len(part)) for part in fixed]

    def receive(self, sock: socket.socket, values: Sequence[memoryview]) -> None:
        """Receive it.

        Raises:
            PeerFailed: Another reply came, or less than that.
        """
        assert len(values) == len(self._fixed) - 1
        views = [memoryview(part) for part in self._fixed]
        left: list[memoryview] = []
        for view, value in zip(views, values, strict=False):
            left += (view, value)
        left.append(views[-1])
        first = 0
        while first < len(left):
            try:
                got = sock.recvmsg_into(left[first : first + BUFFERS_MAX])[0]
            except BlockingIOError:
                raise PeerFailed(self._complaint(f"nothing for {CALL_TIMEOUT_S:.0f} s")) from None
            if not got:
                raise PeerFailed(self._complaint("the server hung up"))
            first = _advance(left, first, got)
        if any(got != part for got, part in zip(self._fixed, self._expected, strict=True)):
            raise PeerFailed(self._complaint("another reply than expected"))

    def _complaint(self, what: str) -> str:
        head = bytes(self._fixed[0])[:80]
        return f"{what}; the reply begins with {head!r}, expected {self._expected[0][:80]!r}"


def _advance(left: list[memoryview], first: int, count: int) -> int:
    """The first of `left` that is not done when `count` bytes of it are, and that one cut."""
    while first < len(left) and count >= len(left[first]):
        count -= len(left[first])
        first += 1
    if count:
        left[first] = left[first][count:]
    return first
