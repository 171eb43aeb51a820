"""What makes bytes interchangeable: layouts, pools, namespaces, keys and block geometry.

Rule 1: every input that changes the bytes of a block is a field of `Layout`. Two engines
whose layouts agree may exchange blocks; two whose layouts differ never meet, because
`namespace_id` covers the whole layout and keys live in a namespace.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import msgspec

from kvstore.errors import LocalProtocolError

# A 16-byte key is the shortest that makes accidental collisions hopeless (2**-64 at four
# billion keys); 64 bytes hold a SHA-512 or a SHA-256 with an engine's own suffix.
KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 64

# 256 tokens of the largest common model (504 KiB a token) are 126 MiB; twice that is room.
BLOCK_BYTES_MAX = 256 * 1024 * 1024
# More layers than any published model has; bounds the checksums that travel with a block.
LAYERS_MAX = 1024
POOL_NAME_BYTES_MAX = 128
# All texts of a layout together, several times what engines put there. A server keeps layouts
# for as long as it has namespaces of them, and repeats them in replies.
LAYOUT_TEXT_MAX = 4096
LAYOUT_EXTRAS_MAX = 64
NAMESPACE_ID_BYTES = 32

_NAMESPACE_PREFIX = b"kvstore namespace 1\n"
_GENERATION_PREFIX = b"kvstore generation 1\n"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must agree before two engines may read each other's blocks.

    Attributes:
        model_id: Name of the model as the engine knows it.
        weights_digest: Digest of the weights, so that a roll-out opens a new generation.
        dtype: Logical dtype of the KV ("bfloat16", "float8_e4m3"), not of the container.
        block_tokens: Tokens in a block.
        layer_bytes: Bytes of each layer block (K and V together), in layer order.
        tp_rank, tp_size: Tensor parallelism. KV that is the same on all ranks (MLA)
            uses rank 0 of size 1.
        pp_rank, pp_size: Pipeline parallelism.
        attention_layout: The engine's physical order inside a layer block ("NHD", ...).
        hash_algorithm, hash_seed: How the engine makes its keys.
        extras: Anything else that changes bytes (LoRA, ISA, KV group), as (name, value)
            pairs sorted by name.
    """

    model_id: str
    dtype: str
    block_tokens: int
    layer_bytes: tuple[int, ...]
    weights_digest: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attention_layout: str = ""
    hash_algorithm: str = "sha256"
    hash_seed: str = ""
    extras: tuple[tuple[str, str], ...] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block: all layers."""
        return sum(self.layer_bytes)


def check_layout(layout: Layout) -> None:
    """Refuse a layout that no block can have.

    Raises:
        LocalProtocolError: Names the field, its value and what is allowed.
    """
    if not layout.layer_bytes or len(layout.layer_bytes) > LAYERS_MAX:
        raise LocalProtocolError(
            f"layer_bytes has {len(layout.layer_bytes)} layers, allowed are 1 to {LAYERS_MAX}"
        )
    if min(layout.layer_bytes) < 1 or layout.block_bytes > BLOCK_BYTES_MAX:
        raise LocalProtocolError(
            f"layer_bytes: a layer of {min(layout.layer_bytes)} bytes in a block of"
            f" {layout.block_bytes}; a layer has at least 1 and a block at most {BLOCK_BYTES_MAX}"
        )
    if layout.block_tokens < 1:
        raise LocalProtocolError(f"block_tokens={layout.block_tokens}: must be at least 1")
    for axis in ("tp", "pp"):
        rank, size = getattr(layout, f"{axis}_rank"), getattr(layout, f"{axis}_size")
        if not 0 <= rank < size:
            raise LocalProtocolError(
                f"{axis}_rank={rank}: must be 0 to {axis}_size - 1 = {size - 1}"
            )
    names = [name for name, _ in layout.extras]
    if len(names) > LAYOUT_EXTRAS_MAX:
        raise LocalProtocolError(f"{len(names)} extras, at most {LAYOUT_EXTRAS_MAX} are allowed")
    texts = [value for value in msgspec.structs.astuple(layout) if isinstance(value, str)]
    text_length = sum(map(len, itertools.chain(texts, *layout.extras)))
    if text_length > LAYOUT_TEXT_MAX:
        raise LocalProtocolError(
            f"{text_length} characters of text in a layout, at most {LAYOUT_TEXT_MAX} are allowed"
        )
    if names != sorted(set(names)):
        raise LocalProtocolError(f"extras={names}: names must be sorted and unique")


def check_pool(pool: str) -> None:
    """Refuse a pool name that is empty, too long or would need quoting in a metric or a shell."""
    if (
        not pool
        or len(pool) > POOL_NAME_BYTES_MAX
        or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in pool)
    ):
        raise LocalProtocolError(
            f"pool {pool!r}: 1 to {POOL_NAME_BYTES_MAX} letters, digits, '-', '_' or '.'"
        )


def check_keys(keys: Sequence[bytes]) -> None:
    """Refuse keys that are not bytes of 16 to 64 each."""
    for key in keys:
        if type(key) is not bytes or not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
            size = len(key) if isinstance(key, bytes | bytearray | memoryview) else type(key)
            raise LocalProtocolError(
                f"key of {size}: must be bytes of length {KEY_BYTES_MIN} to {KEY_BYTES_MAX}"
            )


def _digest(prefix: bytes, pool: str, fields: dict[str, object]) -> bytes:
    # Canonical JSON: sorted names and no white space, so that any language gets the same id.
    body = msgspec.json.encode({"layout": fields, "pool": pool}, order="deterministic")
    return hashlib.sha256(prefix + body).digest()


def namespace_id(pool: str, layout: Layout) -> bytes:
    """SHA-256 over pool and layout with ranks: the 32 bytes in which keys live."""
    return _digest(_NAMESPACE_PREFIX, pool, msgspec.to_builtins(layout))


def generation_fields(layout: Layout) -> dict[str, object]:
    """The layout without what differs between the ranks of one engine.

    Pipeline stages hold different layers, so with them the layer sizes are a matter of rank.
    """
    fields: dict[str, object] = msgspec.to_builtins(layout)
    del fields["tp_rank"], fields["pp_rank"]
    if layout.pp_size > 1:
        del fields["layer_bytes"]
    return fields


def generation_id(pool: str, layout: Layout) -> bytes:
    """The 32 bytes that name one generation of a pool: one for each layout, ranks aside."""
    return _digest(_GENERATION_PREFIX, pool, generation_fields(layout))


def differing_field(ours: Layout, theirs: Layout) -> str | None:
    """The first field, ranks aside, in which two layouts differ; None if they agree."""
    mine, other = generation_fields(ours), generation_fields(theirs)
    # Layer sizes count only where both layouts have one pipeline stage; else `pp_size` tells.
    for name in ours.__struct_fields__:
        if name in mine and name in other and mine[name] != other[name]:
            return name
    return None


class Geometry:
    """Where the layers of a block lie: `[layer, tokens, bytes]`, contiguous.

    Attributes:
        layer_bytes: Bytes of each layer block.
        layer_count: Number of layers.
        offsets: `offsets[n]` is the first byte of layer n; `offsets[layer_count]` is the size.
        block_bytes: Bytes of a whole block.
    """

    __slots__ = ("block_bytes", "layer_bytes", "layer_count", "offsets")

    def __init__(self, layer_bytes: Sequence[int]) -> None:
        self.layer_bytes = tuple(layer_bytes)
        self.layer_count = len(self.layer_bytes)
        self.offsets = tuple(itertools.accumulate(self.layer_bytes, initial=0))
        self.block_bytes = self.offsets[-1]


class PieceMap:
    """How a fetch cuts the asked-for layers of its blocks into *pieces*, and in which order.

    A piece is a contiguous range of layers of one block; DATA frames name pieces by their
    number, so that both ends compute the same places without sending them.

    ::

        order=block   piece k             = block k, layers [first, last)
        order=layer   piece g * keys + k  = block k, layers of group g
                      (all blocks of the first group travel before the second group starts)

    A put is the case order=block with all layers.

    Args:
        geometry: Geometry of the blocks.
        key_count: Number of blocks in the request.
        layer_first, layer_last: Layers asked for, `[layer_first, layer_last)`.
        group_layers: Layers in a group; 0 means order=block (one group of all).
    """

    __slots__ = (
        "geometry",
        "group_count",
        "group_ranges",
        "key_count",
        "layer_first",
        "layer_last",
        "piece_count",
        "span_bytes",
    )

    def __init__(
        self,
        geometry: Geometry,
        key_count: int,
        layer_first: int = 0,
        layer_last: int | None = None,
        group_layers: int = 0,
    ) -> None:
        last = geometry.layer_count if layer_last is None else layer_last
        if not 0 <= layer_first < last <= geometry.layer_count:
            raise LocalProtocolError(
                f"layers [{layer_first}, {last}): must be a non-empty range within"
                f" [0, {geometry.layer_count})"
            )
        self.geometry = geometry
        self.key_count = key_count
        self.layer_first = layer_first
        self.layer_last = last
        step = group_layers or last - layer_first
        #: (first layer, last layer, first byte in the block, size in bytes) of each group
        self.group_ranges = tuple(
            (
                first,
                min(first + step, last),
                geometry.offsets[first],
                geometry.offsets[min(first + step, last)] - geometry.offsets[first],
            )
            for first in range(layer_first, last, step)
        )
        self.group_count = len(self.group_ranges)
        self.piece_count = self.group_count * key_count
        #: Bytes asked for of each block.
        self.span_bytes = geometry.offsets[last] - geometry.offsets[layer_first]
