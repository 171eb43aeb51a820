"""Layouts, namespaces, keys, and where the pieces of a request lie."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from kvstore.errors import LocalProtocolError
from kvstore.layout import (
    BLOCK_BYTES_MAX,
    LAYERS_MAX,
    LAYOUT_EXTRAS_MAX,
    LAYOUT_TEXT_MAX,
    Geometry,
    Layout,
    PieceMap,
    check_keys,
    check_layout,
    check_pool,
    differing_field,
    generation_id,
    namespace_id,
)

LAYOUT = Layout(model_id="model", dtype="bfloat16", block_tokens=16, layer_bytes=(40, 24, 100))

#: Another value for every field.
OTHERS: dict[str, object] = {
    "model_id": "other",
    "dtype": "float16",
    "block_tokens": 32,
    "layer_bytes": (40, 24, 101),
    "weights_digest": "d",
    "tp_rank": 1,
    "tp_size": 2,
    "pp_rank": 1,
    "pp_size": 2,
    "attention_layout": "NHD",
    "hash_algorithm": "blake3",
    "hash_seed": "seed",
    "extras": (("lora", "a"),),
}


def changed(layout: Layout = LAYOUT, **values: object) -> Layout:
    return msgspec.structs.replace(layout, **values)


def test_a_block_is_as_long_as_its_layers() -> None:
    assert LAYOUT.block_bytes == 164
    check_layout(LAYOUT)


def test_the_largest_layout_is_allowed() -> None:
    layer = BLOCK_BYTES_MAX // LAYERS_MAX
    check_layout(changed(layer_bytes=(layer,) * LAYERS_MAX, model_id="m" * (LAYOUT_TEXT_MAX - 14)))
    extras = tuple((f"{number:03}", "") for number in range(LAYOUT_EXTRAS_MAX))
    check_layout(changed(tp_size=2, tp_rank=1, pp_size=3, pp_rank=2, extras=extras))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layer_bytes": ()}, "0 layers, allowed are 1 to 1024"),
        ({"layer_bytes": (1,) * (LAYERS_MAX + 1)}, "1025 layers, allowed are 1 to 1024"),
        ({"layer_bytes": (5, 0)}, "a layer of 0 bytes in a block of 5"),
        ({"layer_bytes": (5, -1)}, "a layer of -1 bytes in a block of 4"),
        ({"layer_bytes": (BLOCK_BYTES_MAX, 1)}, f"a block at most {BLOCK_BYTES_MAX}"),
        ({"block_tokens": 0}, "block_tokens=0"),
        ({"tp_rank": 1}, "tp_rank=1: must be 0 to tp_size - 1 = 0"),
        ({"tp_rank": -1}, "tp_rank=-1"),
        ({"tp_size": 0}, "tp_rank=0: must be 0 to tp_size - 1 = -1"),
        ({"pp_rank": 2, "pp_size": 2}, "pp_rank=2: must be 0 to pp_size - 1 = 1"),
        ({"extras": (("b", ""), ("a", ""))}, "sorted and unique"),
        ({"extras": (("a", "1"), ("a", "2"))}, "sorted and unique"),
        ({"extras": (("a", ""),) * (LAYOUT_EXTRAS_MAX + 1)}, "65 extras, at most 64"),
        ({"hash_seed": "s" * LAYOUT_TEXT_MAX}, "4115 characters of text in a layout"),
        ({"extras": (("a", "b" * LAYOUT_TEXT_MAX),)}, "4116 characters of text in a layout"),
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        check_layout(changed(**change))


@pytest.mark.parametrize("pool", ["llama3-70b", "a", "A_1.2", "p" * 128])
def test_pool_names_need_no_quotes(pool: str) -> None:
    check_pool(pool)


@pytest.mark.parametrize("pool", ["", "p" * 129, "a b", "a/b", "ä", "a\n", "²", 'a"'])
def test_other_pool_names_are_refused(pool: str) -> None:
    with pytest.raises(LocalProtocolError, match="1 to 128 letters"):
        check_pool(pool)


def test_keys_are_16_to_64_bytes() -> None:
    check_keys([bytes(16), bytes(64)])
    for wrong in (bytes(15), bytes(65), bytearray(16), "k" * 16, 5):
        with pytest.raises(LocalProtocolError, match="must be bytes of length 16 to 64"):
            check_keys([bytes(16), wrong])  # type: ignore[list-item]


def test_ids_are_the_same_for_ever() -> None:
    # What is stored, and what other languages compute, depends on these.
    assert namespace_id("pool", LAYOUT).hex() == NAMESPACE_HEX
    assert generation_id("pool", LAYOUT).hex() == GENERATION_HEX


NAMESPACE_HEX = "cf40d0884109ced1e04c37916967a78c1903a1e49388a5463de30a4cbc8547e5"
GENERATION_HEX = "2937296e5cd0367cb124daa845f6df249a54cbce25b51c3d5cf0e0165abb4ee3"


def test_every_field_is_part_of_the_namespace() -> None:
    assert OTHERS.keys() == set(Layout.__struct_fields__)
    ids = [namespace_id("pool", LAYOUT), namespace_id("other", LAYOUT)]
    ids += [namespace_id("pool", changed(**{name: OTHERS[name]})) for name in OTHERS]
    assert len(set(ids)) == len(ids) == 15


def test_ranks_share_a_generation_and_nothing_else_does() -> None:
    for name, value in OTHERS.items():
        same = generation_id("pool", changed(**{name: value})) == generation_id("pool", LAYOUT)
        assert same == (name in ("tp_rank", "pp_rank")), name
    stages = changed(pp_size=2)
    assert generation_id("pool", changed(stages, pp_rank=1, layer_bytes=(9,))) == generation_id(
        "pool", stages
    )


def test_the_field_that_differs_is_named() -> None:
    assert differing_field(LAYOUT, LAYOUT) is None
    for name, value in OTHERS.items():
        expected = None if name in ("tp_rank", "pp_rank") else name
        assert differing_field(LAYOUT, changed(**{name: value})) == expected
        assert differing_field(changed(**{name: value}), LAYOUT) == expected


def test_stages_of_a_pipeline_have_layers_of_their_own() -> None:
    first, second = changed(pp_size=2), changed(pp_size=2, pp_rank=1, layer_bytes=(9,))
    assert differing_field(first, second) is None
    # It is the number of stages that differs, whatever follows from that.
    assert differing_field(LAYOUT, second) == "pp_size"


def test_geometry_says_where_layers_lie() -> None:
    geometry = Geometry([40, 24, 100])
    assert geometry.offsets == (0, 40, 64, 164)
    assert (geometry.layer_count, geometry.block_bytes) == (3, 164)


def test_pieces_of_a_whole_request() -> None:
    pieces = PieceMap(Geometry([40, 24, 100]), 5)
    assert pieces.group_ranges == ((0, 3, 0, 164),)
    assert (pieces.group_count, pieces.piece_count, pieces.span_bytes) == (1, 5, 164)


def test_pieces_in_layer_order_of_some_layers() -> None:
    pieces = PieceMap(Geometry([1, 2, 4, 8, 16]), 3, 1, 4, 2)
    assert pieces.group_ranges == ((1, 3, 1, 6), (3, 4, 7, 8))
    assert (pieces.group_count, pieces.piece_count, pieces.span_bytes) == (2, 6, 14)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 2), (2, 1), (0, 4), (-1, 2), (3, 4)])
def test_layers_must_be_a_range_of_the_block(first: int, last: int) -> None:
    with pytest.raises(LocalProtocolError, match=r"non-empty range within \[0, 3\)"):
        PieceMap(Geometry([40, 24, 100]), 1, first, last)


@pytest.mark.parametrize("group", range(7))
def test_pieces_cover_what_was_asked_for_once(group: int) -> None:
    geometry = Geometry([3, 5, 7, 11, 13])
    for first, last in itertools.combinations(range(6), 2):
        pieces = PieceMap(geometry, 2, first, last, group)
        ends = [(start, start + size) for _, _, start, size in pieces.group_ranges]
        assert ends[0][0] == geometry.offsets[first]
        assert ends[-1][1] == geometry.offsets[last]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
        assert pieces.span_bytes == ends[-1][1] - ends[0][0]
