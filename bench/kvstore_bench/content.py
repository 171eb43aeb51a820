"""The bytes of a block, made from its key: so every byte that comes back can be checked.

Block = pattern XOR word(key): the pattern is fixed random bytes as long as a block, the word the
first eight bytes of the key, repeated. The pattern tells places in a block apart, the word tells
blocks apart, so that another block's bytes, and right bytes in the wrong place, are found, and
not only torn ones. (Checksums would find those too; this does not rely on them.) XOR with a
constant runs at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
# Blocks are compared in pieces that stay in a core's cache.
_PIECE_BYTES = 512 * 1024
_PATTERN_SEED = 20_260_221

Bytes = npt.NDArray[np.uint8]


class BlockContent:
    """Makes and checks blocks of one size. Holds no state: any thread may call it.

    Args:
        block_bytes: A multiple of `WORD_BYTES`.
    """

    def __init__(self, block_bytes: int) -> None:
        assert block_bytes > 0
        assert block_bytes % WORD_BYTES == 0
        self.block_bytes = block_bytes
        words = block_bytes // WORD_BYTES
        rng = np.random.default_rng(_PATTERN_SEED)
        self._pattern = rng.integers(0, 1 << 64, words, dtype=np.uint64)
        self._piece_blocks = max(1, _PIECE_BYTES // block_bytes)

    def fill(self, blocks: Bytes, keys: Sequence[bytes]) -> None:
        """Write the blocks of `keys` into `blocks`, an array of one row a block."""
        np.bitwise_xor(self._pattern, _words(keys), out=blocks.view(np.uint64))

    def wrong(self, blocks: Bytes, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of `blocks` are not those of `keys`."""
        received, words = blocks.view(np.uint64), _words(keys)
        wrong = np.zeros(len(keys), np.bool_)
        scratch = np.empty((min(self._piece_blocks, len(keys)), len(self._pattern)), np.uint64)
        for first in range(0, len(keys), self._piece_blocks):
            piece = slice(first, min(first + self._piece_blocks, len(keys)))
            plain = np.bitwise_xor(
                received[piece], self._pattern, out=scratch[: piece.stop - piece.start]
            )
            wrong[piece] = (plain != words[piece]).any(axis=1)
        return wrong


def _words(keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """The word of each key, as a column."""
    joined = b"".join(key[:WORD_BYTES] for key in keys)
    return np.frombuffer(joined, np.uint64).reshape(-1, 1)


__all__ = ["WORD_BYTES", "BlockContent"]
