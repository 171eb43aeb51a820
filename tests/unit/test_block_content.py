"""Bytes made from keys: what differs in any way is found."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore_bench.content import BlockContent
from kvstore_bench.trace import block_key

KEYS = [block_key("test", number) for number in range(300)]


@pytest.mark.parametrize("block_bytes", [8, 4096, 3 * 1024 * 1024])
def test_what_was_filled_is_right(block_bytes: int) -> None:
    content = BlockContent(block_bytes)
    keys = KEYS[: max(2, 1024 * 1024 // block_bytes)]
    blocks = np.zeros((len(keys), block_bytes), np.uint8)
    content.fill(blocks, keys)
    assert not content.wrong(blocks, keys).any()
    # A second maker, as in another process, makes the same.
    assert not BlockContent(block_bytes).wrong(blocks, keys).any()
    assert len({block.tobytes() for block in blocks}) == len(keys)


def test_every_kind_of_wrong_is_found() -> None:
    content = BlockContent(4096)
    blocks = np.zeros((300, 4096), np.uint8)
    content.fill(blocks, KEYS)
    blocks[[5, 6]] = blocks[[6, 5]]  # another block's bytes
    blocks[17, 4095] ^= 1  # one bit, at the end
    blocks[140, 0] ^= 128  # and at the beginning
    blocks[200] = np.roll(blocks[200], 2048)  # the layers of a block exchanged
    blocks[201] = np.roll(blocks[201], 8)
    blocks[299] = 0xFF  # nothing came
    wrong = np.flatnonzero(content.wrong(blocks, KEYS))
    assert wrong.tolist() == [5, 6, 17, 140, 200, 201, 299]
