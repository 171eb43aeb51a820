"""Blocks that arrive and blocks that leave, frame by frame."""

from __future__ import annotations

import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kvstore.errors import LocalProtocolError, RemoteProtocolError
from kvstore.layout import Geometry
from kvstore.messages import Done, FetchOutcome, PutOutcome, Want
from kvstore.transfer import PENDING, PutTransfer, as_memory, check_memory, slice_memory
from kvstore.wire import FrameType, Header
from tests.support.engine import key
from tests.support.frames import FetchCall, Store

HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT
LAYERS = (40, 24, 100)
BLOCK = sum(LAYERS)
KEYS = [key(number) for number in range(4)]


@pytest.fixture
def store() -> Store:
    made = Store(*LAYERS)
    made.fill(*KEYS)
    return made


def header(piece: int, offset: int, length: int) -> Header:
    return Header(FrameType.DATA, 0, 1, 0, length, piece, offset, 0)


def no_scratch(length: int) -> list[memoryview]:
    raise AssertionError("nothing goes to scratch here")


def scratch(length: int) -> list[memoryview]:
    return [memoryview(bytearray(length))]


def arrive(
    call: FetchCall,
    piece: int,
    offset: int,
    data: bytes,
    checksums: bytes = b"",
    failed: tuple[int, ...] = (),
    scratch: Callable[[int], list[memoryview]] = no_scratch,
) -> None:
    """One DATA frame, as a reader takes it."""
    place = header(piece, offset, len(data))
    views = call.transfer.route(place, scratch) if data else []
    assert sum(map(len, views)) == len(data)
    at = 0
    for view in views:
        view[:] = data[at : at + len(view)]
        at += len(view)
    call.transfer.data(place, checksums, failed)


def done(call: FetchCall, *outcomes: int, **fields: Any) -> None:
    call.transfer.done(Done(outcomes=bytes(outcomes), **fields))


# --- fetches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scattered", [False, True])
def test_one_frame_may_hold_many_blocks(store: Store, scattered: bool) -> None:
    call = FetchCall(store.geometry, KEYS, scattered=scattered)
    data = b"".join(map(store.block, KEYS))
    arrive(call, 0, 0, data, b"".join(map(store.checksums, KEYS)))
    assert call.check() == [HIT] * 4
    assert call.arrived == [(index, 0) for index in range(4)]
    assert call.transfer.received_bytes == len(data)
    done(call, 0, 0, 0, 0, tiers=b"\1\1\1\1")
    assert call.failed == []


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("step", [1, 39, 64, 163])
def test_a_block_may_come_in_many_frames(store: Store, step: int, scattered: bool) -> None:
    call = FetchCall(store.geometry, KEYS[:1], scattered=scattered)
    block = store.block(KEYS[0])
    for at in range(0, BLOCK, step):
        assert call.arrived == []
        arrive(call, 0, at, block[at : at + step], b"" if at else store.checksums(KEYS[0]))
    assert call.check() == [HIT]


@pytest.mark.parametrize("scattered", [False, True])
def test_layers_come_group_by_group(store: Store, scattered: bool) -> None:
    call = FetchCall(store.geometry, KEYS[:2], (1, 3), 1, scattered)
    for group, layer in enumerate((1, 2)):
        first, last = store.geometry.offsets[layer : layer + 2]
        for index in range(2):
            part = store.checksums(KEYS[index])[8 * layer : 8 * layer + 8]
            block = store.block(KEYS[index])
            arrive(call, group * 2 + index, 0, block[first:last], part)
    assert call.arrived == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert call.check() == [HIT, HIT]


@pytest.mark.parametrize("in_front", [0, 1, 39])
def test_no_group_comes_before_all_of_the_one_in_front_of_it(store: Store, in_front: int) -> None:
    call = FetchCall(store.geometry, KEYS[:1], group_layers=1)
    block, sums = store.block(KEYS[0]), store.checksums(KEYS[0])
    if in_front:
        arrive(call, 0, 0, block[:in_front], sums[:8])
    with pytest.raises(RemoteProtocolError, match="DATA for group 1 of key 0 before all of"):
        arrive(call, 1, 0, block[40:64], sums[8:16])
    assert call.arrived == []


def test_blocks_that_fail_are_skipped(store: Store) -> None:
    call = FetchCall(store.geometry, KEYS)
    arrive(call, 1, 0, store.block(KEYS[1]), store.checksums(KEYS[1]), failed=(0,))
    arrive(call, 0, 0, b"", failed=(2,))
    assert call.failed == [(0, MISS), (2, MISS)]
    assert call.check() == [MISS, HIT, MISS, None]
    done(call, 1, 0, 1, 3)
    assert call.check() == [MISS, HIT, MISS, FetchOutcome.TIMEOUT]
    assert call.failed[2:] == [(3, FetchOutcome.TIMEOUT)]


def test_a_damaged_block_harms_no_other(store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:3])
    data = bytearray(b"".join(map(store.block, KEYS[:3])))
    data[BLOCK + 50] ^= 1
    arrive(call, 0, 0, bytes(data), b"".join(map(store.checksums, KEYS[:3])))
    assert call.check() == [HIT, CORRUPT, HIT]
    assert call.transfer.corrupt == [1]
    done(call, 0, 0, 0)  # the server cannot know
    assert call.check() == [HIT, CORRUPT, HIT]
    assert call.failed == [(1, CORRUPT)]


def test_the_right_bytes_of_another_block_are_corrupt(store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:2])
    swapped = KEYS[1::-1]
    data, sums = map(store.block, swapped), map(store.checksums, swapped)
    arrive(call, 0, 0, b"".join(data), b"".join(sums))
    assert call.check() == [CORRUPT, CORRUPT]


def test_layers_in_each_others_place_are_corrupt() -> None:
    store = Store(64, 64)
    call = FetchCall(store.geometry, KEYS[:1])
    block, sums = store.block(KEYS[0]), store.checksums(KEYS[0])
    arrive(call, 0, 0, block[64:] + block[:64], sums[8:] + sums[:8])
    assert call.check() == [CORRUPT]


def test_after_a_corrupt_group_the_rest_of_a_block_goes_to_scratch(store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:1], group_layers=1)
    arrive(call, 0, 0, bytes(40), store.checksums(KEYS[0])[:8])
    assert call.check() == [CORRUPT]
    arrive(call, 1, 0, b"x" * 24, bytes(8), scratch=scratch)
    assert call.data(0) == bytes(BLOCK)
    assert call.arrived == []
    assert call.transfer.corrupt == [0]


@pytest.mark.parametrize(
    ("piece", "offset", "length", "complaint"),
    [
        (4, 0, 1, "piece 4, the request has 4"),
        (1 << 32, 0, 1, "the request has 4"),
        (3, 0, BLOCK + 1, "piece 4, the request has 4"),
        (2, 1, 1, "byte 1 of piece 2, expected byte 0 of 164"),
        (0, 0, 1, "byte 0 of piece 0, expected byte 10 of 164"),
        (0, 9, 1, "byte 9 of piece 0, expected byte 10 of 164"),
        (0, 11, 1, "byte 11 of piece 0, expected byte 10 of 164"),
        (1, 0, 1, "byte 0 of piece 1, expected byte 164 of 164"),
        (1, BLOCK, 1, "byte 164 of piece 1, expected byte 164 of 164"),
        (0, 10, BLOCK, "byte 0 of piece 1, expected byte 164 of 164"),
    ],
)
def test_data_out_of_place_is_refused(
    store: Store, piece: int, offset: int, length: int, complaint: str
) -> None:
    call = FetchCall(store.geometry, KEYS)
    arrive(call, 1, 0, store.block(KEYS[1]), store.checksums(KEYS[1]))
    arrive(call, 0, 0, store.block(KEYS[0])[:10], store.checksums(KEYS[0]))
    before = [call.data(index) for index in range(4)]
    with pytest.raises(RemoteProtocolError, match=complaint):
        call.transfer.route(header(piece, offset, length), no_scratch)
    assert [call.data(index) for index in range(4)] == before
    assert call.check() == [None, HIT, None, None]


@pytest.mark.parametrize("length", [0, 8, 23, 25, 32, 48])
def test_checksums_must_be_those_of_the_pieces_that_begin(store: Store, length: int) -> None:
    call = FetchCall(store.geometry, KEYS[:2])
    sums = (store.checksums(KEYS[0]) + bytes(24))[:length]
    with pytest.raises(RemoteProtocolError, match=f"{length} bytes of checksums, expected 24"):
        arrive(call, 0, 0, store.block(KEYS[0]), sums)
    assert call.transfer.corrupt == []


@pytest.mark.parametrize("index", [-1, 4, 1 << 63])
def test_a_failure_must_be_of_a_key_of_the_request(store: Store, index: int) -> None:
    call = FetchCall(store.geometry, KEYS)
    with pytest.raises(RemoteProtocolError, match="the request has 4"):
        arrive(call, 0, 0, b"", failed=(index,))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"outcomes": b""}, "0 outcomes for 2 keys"),
        ({"outcomes": b"\1\1\1"}, "3 outcomes for 2 keys"),
        ({"outcomes": b"\1\5"}, "2 outcomes for 2 keys"),
        ({"outcomes": bytes([1, PENDING])}, "2 outcomes for 2 keys"),
        ({"outcomes": b"\1\0"}, "HIT for key 1, but bytes are missing"),
        ({"outcomes": b"\1\1", "tiers": b"\1"}, "1 tiers for 2 keys"),
        ({"outcomes": b"\1\1", "tiers": b"\1\x63"}, "2 tiers for 2 keys"),
    ],
)
def test_a_done_that_cannot_be_is_refused(
    store: Store, fields: dict[str, Any], complaint: str
) -> None:
    call = FetchCall(store.geometry, KEYS[:2])
    with pytest.raises(RemoteProtocolError, match=complaint):
        call.transfer.done(Done(**fields))


def test_what_was_verified_stays_a_hit(store: Store) -> None:
    call = FetchCall(store.geometry, KEYS[:1])
    arrive(call, 0, 0, store.block(KEYS[0]), store.checksums(KEYS[0]))
    arrive(call, 0, 0, b"", failed=(0,))
    done(call, 1)
    call.transfer.fail_rest(FetchOutcome.TIMEOUT)
    assert call.check() == [HIT]
    assert call.failed == []


@pytest.mark.parametrize("outcome", FetchOutcome)
def test_an_abandoned_fetch_writes_nothing_and_has_no_hits(
    store: Store, outcome: FetchOutcome
) -> None:
    call = FetchCall(store.geometry, KEYS[:2])
    arrive(call, 0, 0, store.block(KEYS[0])[:50], store.checksums(KEYS[0]))
    call.transfer.abandon()
    assert call.transfer.abandoned
    before = call.data(0)
    arrive(call, 0, 50, store.block(KEYS[0])[50:], scratch=scratch)
    arrive(call, 1, 0, store.block(KEYS[1]), store.checksums(KEYS[1]), scratch=scratch)
    assert (call.data(0), call.data(1)) == (before, bytes(BLOCK))
    done(call, outcome, outcome)
    assert call.check() == [outcome or FetchOutcome.UNAVAILABLE] * 2
    assert call.arrived == []


# --- puts ------------------------------------------------------------------------------------


def put_of(store: Store, count: int, scattered: bool = False) -> PutTransfer:
    blocks = [memoryview(store.block(key)) for key in KEYS[:count]]
    offsets = store.geometry.offsets
    memory: Any = blocks
    if scattered:
        memory = [[block[a:b] for a, b in pairwise(offsets)] for block in blocks]
    return PutTransfer(store.geometry, memory)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("bytes_max", [1, 50, BLOCK, BLOCK + 1, 1 << 20])
def test_what_is_wanted_leaves_in_order(store: Store, bytes_max: int, scattered: bool) -> None:
    transfer = put_of(store, 4, scattered)
    assert transfer.next_chunk() is None
    transfer.want(Want(indices=(3, 0, 1)))
    assert transfer.queued_bytes == 3 * BLOCK
    taken, out = {0: b"", 1: b"", 2: b"", 3: b""}, []
    while (chunk := transfer.next_chunk(bytes_max)) is not None:
        assert len(b"".join(chunk.buffers)) == chunk.length <= bytes_max
        piece, offset, data = chunk.piece, chunk.piece_offset, b"".join(chunk.buffers)
        while data:
            assert len(taken[piece]) == offset
            taken[piece] += data[: BLOCK - offset]
            data, piece, offset = data[BLOCK - offset :], piece + 1, 0
        out.append(chunk)
        assert transfer.queued_bytes + transfer.sent_bytes == 3 * BLOCK
        assert not transfer.idle
    assert taken == {0: store.block(KEYS[0]), 1: store.block(KEYS[1]), 2: b"", 3: taken[3]}
    assert taken[3] == store.block(KEYS[3])
    for chunk in out:
        assert not transfer.idle
        chunk.release()
    assert transfer.idle
    if bytes_max == 1 << 20:
        assert [chunk.piece for chunk in out] == [3, 0]


@pytest.mark.parametrize("indices", [(4,), (-1,), (1,), (0, 0), (1 << 63,)])
def test_only_announced_blocks_can_be_wanted_and_once(
    store: Store, indices: tuple[int, ...]
) -> None:
    transfer = put_of(store, 4)
    transfer.want(Want(indices=(1, 2)))
    with pytest.raises(RemoteProtocolError, match=r"WANT for block -?\d+ of 4"):
        transfer.want(Want(indices=indices))


def test_a_stopped_put_gives_out_nothing(store: Store) -> None:
    transfer = put_of(store, 4)
    idle: list[int] = []
    transfer.on_idle = lambda: idle.append(1)
    transfer.want(Want(indices=(0, 1)))
    chunk = transfer.next_chunk(50)
    assert chunk is not None
    transfer.stop()
    transfer.want(Want(indices=(2, 3)))  # was on its way
    assert transfer.next_chunk() is None
    assert transfer.queued_bytes == 0
    assert not transfer.idle
    chunk.release()
    assert transfer.idle
    assert idle == [1]


def test_outcomes_of_a_put_are_checked(store: Store) -> None:
    transfer = put_of(store, 2)
    for wrong in (b"", b"\0", b"\0\0\0", b"\0\7", b"\0\xff"):
        with pytest.raises(RemoteProtocolError, match="outcomes for 2 blocks"):
            transfer.done(wrong)
    assert transfer.outcomes == bytes([PENDING] * 2)
    transfer.done(b"\1\6")
    transfer.fail_rest(PutOutcome.TIMEOUT)
    transfer.done(b"\2\2")
    assert transfer.outcomes == b"\1\6"
    late = put_of(store, 2)
    late.fail_rest(PutOutcome.TIMEOUT)
    assert late.outcomes == bytes([PutOutcome.TIMEOUT] * 2)


def test_a_frame_of_tiny_layers_is_bounded_in_buffers() -> None:
    layers = (1,) * 1024
    store = Store(*layers)
    keys = [key(number) for number in range(40)]
    memory = [[memoryview(bytes(1))] * 1024 for _ in keys]
    transfer = PutTransfer(store.geometry, memory)  # type: ignore[arg-type]
    transfer.want(Want(indices=tuple(range(40))))
    sizes = []
    while (chunk := transfer.next_chunk()) is not None:
        sizes.append(len(chunk.buffers))
    assert sum(sizes) == 40 * 1024
    assert max(sizes) < 512 + 1024


# --- memory of callers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(16),
        lambda: memoryview(bytearray(20))[2:18],
        lambda: array.array("d", [0.0, 0.0]),
        lambda: np.zeros((2, 4), np.float16),
        lambda: np.zeros(2, ">f8"),
        lambda: np.zeros(4, "V4"),
        lambda: np.zeros((1, 2, 4, 2), np.int8),
    ],
)
def test_any_contiguous_buffer_is_memory(make: Callable[[], Any]) -> None:
    buffer = make()
    view = as_memory(buffer, "into", 16, writable=True)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, 16)
    view[:] = b"x" * 16
    assert bytes(memoryview(buffer)) == b"x" * 16


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: "text", "into: str offers no buffer"),
        (lambda: None, "into: NoneType offers no buffer"),
        (lambda: [1, 2], "into: list offers no buffer"),
        (lambda: np.zeros(2, "M8[s]"), "into: ndarray offers no buffer"),
        (lambda: np.zeros((4, 8), "u1")[:, ::2], "into: the buffer is not contiguous"),
        (lambda: np.zeros((2, 8), "u1", order="F"), "into: the buffer is not contiguous"),
        (lambda: bytes(16), "into: the buffer is read-only"),
        (lambda: bytearray(15), "into: 15 bytes, expected 16"),
        (lambda: bytearray(17), "into: 17 bytes, expected 16"),
    ],
)
def test_what_is_no_memory_is_refused(make: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        as_memory(make(), "into", 16, writable=True)


@pytest.mark.parametrize("make", [bytearray, lambda: np.empty((0, BLOCK), "u1"), list])
def test_no_blocks_have_no_memory(make: Callable[[], Any]) -> None:
    assert check_memory(make(), 0, LAYERS, "into", writable=True) == []


def test_memory_that_is_only_read_may_be_constant() -> None:
    assert as_memory(b"x" * 16, "blocks", 16, writable=False) == b"x" * 16


def test_callers_give_memory_in_three_forms() -> None:
    whole = np.arange(2 * BLOCK, dtype=np.uint16).view(np.uint8).reshape(2, 2, BLOCK)[0]
    views = check_memory(whole, 2, LAYERS, "into", writable=True)
    assert [bytes(view) for view in views] == [bytes(whole[0]), bytes(whole[1])]
    blocks = [bytearray(BLOCK), bytearray(BLOCK)]
    views = check_memory(blocks, 2, LAYERS, "into", writable=True)
    assert [view.obj for view in views] == blocks  # type: ignore[union-attr]
    layers = [[bytearray(size) for size in LAYERS] for _ in range(2)]
    views = check_memory(layers, 2, LAYERS, "into", writable=True)
    assert [[layer.obj for layer in block] for block in views] == layers


@pytest.mark.parametrize(
    ("memory", "complaint"),
    [
        (bytearray(2 * BLOCK - 1), "into: 327 bytes, expected 328"),
        ([bytearray(BLOCK)], "into: 1 buffers for 2 blocks"),
        ([bytearray(BLOCK), bytearray(BLOCK - 1)], r"into\[1\]: 163 bytes, expected 164"),
        ([bytearray(BLOCK), [bytearray(40)]], r"into\[1\]: 1 layer buffers, expected 3"),
        (
            [[bytearray(40), bytearray(25), bytearray(99)], bytearray(BLOCK)],
            r"into\[0\]\[1\]: 25 bytes, expected 24",
        ),
    ],
)
def test_memory_of_a_wrong_size_is_named(memory: object, complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        check_memory(memory, 2, LAYERS, "into", writable=True)


@pytest.mark.parametrize("layer_first", [0, 1, 2])
def test_views_of_any_part_of_a_block(layer_first: int) -> None:
    geometry = Geometry(LAYERS)
    block = bytes(range(BLOCK))
    begin = geometry.offsets[layer_first]
    contiguous = memoryview(block)[begin:]
    scattered = [memoryview(block)[a:b] for a, b in pairwise(geometry.offsets)][layer_first:]
    for start in range(begin, BLOCK):
        for length in range(1, BLOCK - start + 1):
            expected = block[start : start + length]
            for memory in (contiguous, scattered):
                views = slice_memory(memory, geometry, layer_first, start, length)
                assert b"".join(views) == expected
