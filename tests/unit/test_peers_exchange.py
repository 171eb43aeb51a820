"""Replies that are known in advance: received into place, whatever pieces they come in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peers.base import PeerFailed
from peers.exchange import BUFFERS_MAX, Reply, send_all
from peers.memcached import reply_to_get
from peers.redis import MGET_KEYS, command, groups

FIXED = [b"*2\r\n$4\r\n", b"\r\n$4\r\n", b"\r\n"]
WHOLE = b"*2\r\n$4\r\nabcd\r\n$4\r\nefgh\r\n"


class Far:
    """A socket whose other end takes and gives so many bytes at a time."""

    def __init__(self, gives: bytes = b"", step: int = 1 << 20, hangs_up: bool = False) -> None:
        self.taken = b""
        self.calls: list[int] = []
        self._left = gives
        self._step = step
        self._hangs_up = hangs_up

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        self.calls.append(len(parts))
        joined = b"".join(parts)[: self._step]
        self.taken += joined
        return len(joined)

    def recvmsg_into(self, parts: Sequence[memoryview]) -> tuple[int, list[object], int, object]:
        self.calls.append(len(parts))
        if not self._left and not self._hangs_up:
            raise BlockingIOError
        given = self._left[: min(self._step, sum(map(len, parts)))]
        self._left = self._left[len(given) :]
        rest = given
        for part in parts:
            piece, rest = rest[: len(part)], rest[len(part) :]
            part[: len(piece)] = piece
        return len(given), [], 0, None


def received(far: Far) -> list[bytes]:
    values = [bytearray(4), bytearray(4)]
    Reply(FIXED).receive(far, list(map(memoryview, values)))  # type: ignore[arg-type]
    return list(map(bytes, values))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 9, 1000])
def test_values_land_where_they_belong_in_whatever_pieces_they_come(step: int) -> None:
    assert received(Far(WHOLE, step)) == [b"abcd", b"efgh"]


def test_a_reply_may_be_received_again() -> None:
    far, values = Far(2 * WHOLE, 7), [memoryview(bytearray(4)), memoryview(bytearray(4))]
    reply = Reply(FIXED)
    for _ in range(2):
        reply.receive(far, values)  # type: ignore[arg-type]
        assert bytes(values[1]) == b"efgh"


@pytest.mark.parametrize(
    ("gives", "why"),
    [
        (WHOLE.replace(b"*2", b"*3"), "another reply"),
        (b"*2\r\n$-1\r\n$-1\r\n", r"nothing for 30 s; .* b'\*2.*-1"),
        (WHOLE[:-1], "nothing for 30 s"),
    ],
)
def test_another_reply_is_refused_and_shown(gives: bytes, why: str) -> None:
    with pytest.raises(PeerFailed, match=why):
        received(Far(gives, 4))


def test_a_server_that_hangs_up_is_refused() -> None:
    with pytest.raises(PeerFailed, match="hung up"):
        received(Far(WHOLE[:10], 4, hangs_up=True))


@pytest.mark.parametrize("step", [1, 4, 7, 10_000])
def test_parts_are_sent_in_their_order_and_whole(step: int) -> None:
    parts = [b"abc", memoryview(b"defgh"), b"", b"ij"]
    far = Far(step=step)
    send_all(far, parts)  # type: ignore[arg-type]
    assert far.taken == b"abcdefghij"


def test_no_call_has_more_buffers_than_the_system_takes() -> None:
    far = Far()
    send_all(far, [b"x"] * (2 * BUFFERS_MAX + 1))  # type: ignore[arg-type]
    assert far.calls == [BUFFERS_MAX, BUFFERS_MAX, 1]
    assert len(far.taken) == 2 * BUFFERS_MAX + 1


def test_a_command_of_redis_has_the_lengths_of_its_words() -> None:
    assert command("MGET", "ab", "c") == b"*3\r\n$4\r\nMGET\r\n$2\r\nab\r\n$1\r\nc\r\n"


def test_keys_of_an_mget_are_limited_and_complete() -> None:
    keys = list(range(2 * MGET_KEYS + 3))
    assert [len(group) for group in groups(keys)] == [MGET_KEYS, MGET_KEYS, 3]
    assert [key for group in groups(keys) for key in group] == keys


def test_the_reply_of_memcached_has_a_head_for_each_key() -> None:
    far = Far(b"VALUE a 0 4\r\nabcd\r\nVALUE b 0 4\r\nefgh\r\nEND\r\n", 5)
    values = [memoryview(bytearray(4)), memoryview(bytearray(4))]
    reply_to_get(["a", "b"], 4).receive(far, values)  # type: ignore[arg-type]
    assert list(map(bytes, values)) == [b"abcd", b"efgh"]
