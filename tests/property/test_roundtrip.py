"""Whatever can be said arrives as it was said: every message, every layout, every header."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvstore.errors import LocalProtocolError, RemoteProtocolError
from kvstore.framing import FrameReader
from kvstore.layout import (
    Geometry,
    Layout,
    PieceMap,
    check_layout,
    differing_field,
    generation_id,
    namespace_id,
)
from kvstore.messages import REPLIES, REQUESTS, decode, encode
from kvstore.transfer import slice_memory
from kvstore.wire import (
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    Flags,
    FrameType,
    decode_header,
    encode_header,
)
from tests.support.frames import frame

texts = st.text(max_size=20)
layouts = st.builds(
    Layout,
    model_id=texts,
    dtype=texts,
    block_tokens=st.integers(1, 1 << 60),
    layer_bytes=st.lists(st.integers(1, 4096), min_size=1, max_size=8).map(tuple),
    weights_digest=texts,
    tp_rank=st.integers(0, 3),
    tp_size=st.integers(4, 1 << 40),
    pp_rank=st.integers(0, 3),
    pp_size=st.integers(4, 1 << 40),
    attention_layout=texts,
    hash_algorithm=texts,
    hash_seed=texts,
    extras=st.dictionaries(texts, texts, max_size=4).map(lambda d: tuple(sorted(d.items()))),
)


def values_of(type: Any) -> st.SearchStrategy[Any]:
    """Values that a field of a message may have, from its annotation."""
    return _values(msgspec.inspect.type_info(type))


def _values(info: Any) -> st.SearchStrategy[Any]:
    kinds = msgspec.inspect
    if isinstance(info, kinds.Metadata):
        return _values(info.type)
    if isinstance(info, kinds.StructType):
        if info.cls is Layout:
            return layouts
        return st.builds(info.cls, **{f.name: _values(f.type) for f in info.fields})
    if isinstance(info, kinds.UnionType):
        return st.one_of(*map(_values, info.types))
    if isinstance(info, kinds.NoneType):
        return st.none()
    if isinstance(info, kinds.EnumType):
        return st.sampled_from(info.cls)
    if isinstance(info, kinds.BoolType):
        return st.booleans()
    if isinstance(info, kinds.FloatType):
        return st.floats(allow_nan=False)
    if isinstance(info, kinds.IntType):
        low = info.ge if info.ge is not None else -(1 << 63)
        return st.integers(low, info.le if info.le is not None else (1 << 64) - 1)
    if isinstance(info, kinds.StrType):
        return st.text(min_size=info.min_length or 0, max_size=min(info.max_length or 30, 30))
    if isinstance(info, kinds.BytesType):
        most = min(info.max_length or 100, 100)
        return st.binary(min_size=info.min_length or 0, max_size=most)
    if isinstance(info, kinds.ListType | kinds.VarTupleType):
        items = st.lists(
            _values(info.item_type),
            min_size=info.min_length or 0,
            max_size=min(info.max_length or 5, 5),
        )
        return items.map(tuple) if isinstance(info, kinds.VarTupleType) else items
    if isinstance(info, kinds.TupleType):
        return st.tuples(*map(_values, info.item_types))
    assert isinstance(info, kinds.DictType), info
    return st.dictionaries(_values(info.key_type), _values(info.value_type), max_size=5)


MESSAGE_TYPES = sorted({*REQUESTS.values(), *REPLIES.values()}, key=lambda type: type.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("type", MESSAGE_TYPES, ids=lambda type: type.__name__)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_messages(type: Any, data: st.DataObject) -> None:
    message = data.draw(values_of(type))
    [whole] = FrameReader(lambda header: []).feed(frame(FrameType.PING, 1, message))
    assert decode(whole.metadata, type) == message


@given(
    type=st.sampled_from(FrameType),
    request_id=st.integers(0, (1 << 64) - 1),
    metadata=st.binary(max_size=100),
    payload_length=st.integers(0, PAYLOAD_BYTES_MAX),
    piece=st.integers(0, (1 << 32) - 1),
    piece_offset=st.integers(0, (1 << 32) - 1),
    flags=st.sampled_from(Flags),
)
def test_headers(
    type: FrameType,
    request_id: int,
    metadata: bytes,
    payload_length: int,
    piece: int,
    piece_offset: int,
    flags: int,
) -> None:
    place = (payload_length, piece, piece_offset) if type is FrameType.DATA else (0, 0, 0)
    if flags > Flags.REPLY and (type is not FrameType.DATA or not flags & Flags.PLACED):
        with pytest.raises(RemoteProtocolError, match="only DATA is placed"):
            decode_header(encode_header(type, request_id, metadata, *place, flags))
        return
    header = decode_header(encode_header(type, request_id, metadata, *place, flags))
    assert header[:4] == (type, flags, request_id, len(metadata))
    assert header[4:7] == place


@given(layouts)
def test_layouts(layout: Layout) -> None:
    check_layout(layout)
    copy = decode(encode(layout), Layout)
    assert copy == layout
    assert namespace_id("pool", copy) == namespace_id("pool", layout)
    assert differing_field(copy, layout) is None


@given(layouts, layouts)
def test_layouts_differ_when_their_generations_do(one: Layout, other: Layout) -> None:
    same = generation_id("pool", one) == generation_id("pool", other)
    field = differing_field(one, other)
    assert (field is None) == same
    assert field == differing_field(other, one)
    if field is not None:
        assert getattr(one, field) != getattr(other, field)
    assert (namespace_id("pool", one) == namespace_id("pool", other)) == (one == other)


@given(st.builds(msgspec.structs.replace, layouts, layer_bytes=st.tuples(st.integers())))
def test_a_layout_is_possible_or_refused(layout: Layout) -> None:
    try:
        check_layout(layout)
    except LocalProtocolError:
        assert not 1 <= layout.layer_bytes[0] <= 256 << 20
    else:
        assert 1 <= layout.layer_bytes[0] <= 256 << 20


@given(data=st.data())
def test_pieces_and_views_cover_a_request_exactly_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    geometry = Geometry(sizes)
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first + 1, len(sizes)))
    pieces = PieceMap(geometry, 1, first, last, data.draw(st.integers(0, 7)))
    scattered = [bytearray(size) for size in sizes[first:last]]
    for _, _, start, size in pieces.group_ranges:
        offset = 0
        while offset < size:
            length = data.draw(st.integers(1, size - offset))
            views = slice_memory(
                [memoryview(layer) for layer in scattered], geometry, first, start + offset, length
            )
            assert sum(map(len, views)) == length
            for view in views:
                assert set(view) == {0}, "written twice"
                view[:] = b"\1" * len(view)
            offset += length
    assert b"".join(scattered) == b"\1" * pieces.span_bytes


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError):
        frame(FrameType.LOOKUP, 1, bytes(METADATA_BYTES_MAX + 1))
