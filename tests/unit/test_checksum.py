"""Layer checksums: other bytes, another key, layer or namespace all give another one."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from kvstore.checksum import (
    CHECKSUM_BYTES,
    block_seed,
    layer_checksum,
    layer_checksums,
    short_checksum,
)

NAMESPACE = bytes(range(32))
KEY = bytes(range(100, 132))
LAYER = bytes(range(256)) * 3


def test_checksums_are_those_of_xxhash() -> None:
    # XXH3-64 and XXH32 of "" with seed 0, from the test vectors of the reference code.
    assert layer_checksum(b"", 0, 0) == 0x2D06800538D394C2
    assert short_checksum(b"") == 0x02CC5D05
    assert block_seed(b"", b"") == 0x2D06800538D394C2


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, "u1")])
def test_any_buffer_will_do(kind: type) -> None:
    assert layer_checksum(kind(LAYER), 5, 1) == layer_checksum(LAYER, 5, 1)


def test_what_differs_has_another_checksum() -> None:
    seed = block_seed(NAMESPACE, KEY)
    damaged = bytearray(LAYER)
    damaged[500] ^= 1
    seen = {
        layer_checksum(LAYER, seed, 0),
        layer_checksum(damaged, seed, 0),
        layer_checksum(LAYER[:-1], seed, 0),
        layer_checksum(LAYER, seed, 1),
        layer_checksum(LAYER, block_seed(NAMESPACE, KEY[:-1] + b"\0"), 0),
        layer_checksum(LAYER, block_seed(NAMESPACE[:-1] + b"\0", KEY), 0),
    }
    assert len(seen) == 6


def test_several_layers_are_packed_as_they_travel() -> None:
    layers, seed = [b"a", b"bc", b"def"], block_seed(NAMESPACE, KEY)
    packed = layer_checksums(layers, seed, 4)
    assert len(packed) == 3 * CHECKSUM_BYTES
    assert struct.unpack("<3Q", packed) == tuple(
        layer_checksum(layer, seed, index) for index, layer in enumerate(layers, 4)
    )
    assert layer_checksums([], seed) == b""


def test_the_largest_seed_wraps() -> None:
    last = (1 << 64) - 1
    assert layer_checksum(LAYER, last, 1) == layer_checksum(LAYER, 0, 0)
    assert layer_checksums([LAYER], last, 1) == layer_checksum(LAYER, 0, 0).to_bytes(8, "little")
