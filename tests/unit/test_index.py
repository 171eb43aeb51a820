"""The columns of the index, the states of a slot, and what a block costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvstore_daemon.engine.index import BlockIndex
from kvstore_daemon.engine.keytable import KeyTable
from tests.support.tree import ROOT

# What the engine may spend on a block beside its layer checksums.
INDEX_BYTES_PER_BLOCK_MAX = 256


def test_a_slot_goes_from_reserved_to_published_to_vacant() -> None:
    index = BlockIndex()
    slots = KeyTable(index.keys)
    index.reserve(7, namespace_number=3)
    assert (index.pins[7], index.namespace_numbers[7], index.reserved_count) == (1, 3, 1)
    index.publish(7, b"key", b"checksums", slots)
    assert slots == {b"key": 7}
    assert (index.keys[7], index.checksums[7]) == (b"key", b"checksums")
    assert (index.reserved_count, index.published_count) == (0, 1)
    index.pins[7] -= 1
    slots.remove(7)
    assert index.withdraw(7)
    index.vacate(7)
    assert (index.keys[7], index.checksums[7], index.published_count) == (None, None, 0)


def test_a_pinned_block_is_doomed_until_its_pins_are_gone() -> None:
    index = BlockIndex()
    index.reserve(2, 0)
    index.publish(2, b"key", b"", KeyTable(index.keys))
    assert not index.withdraw(2)
    assert index.doomed == {2}
    with pytest.raises(AssertionError):
        index.vacate(2)
    index.pins[2] -= 1
    index.vacate(2)
    assert index.doomed == set()


def test_an_abandoned_slot_can_be_reserved_again() -> None:
    index = BlockIndex()
    index.reserve(1, 0)
    with pytest.raises(AssertionError):
        index.reserve(1, 0)
    index.abandon(1)
    index.reserve(1, 5)
    assert index.reserved_count == 1


_MEASUREMENT = """
import gc, itertools, os, sys
from kvstore_daemon.source import ArenaSource
from tests.support.engine import layout

def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

BLOCKS = int(sys.argv[1])
EVICTED = BLOCKS // 2
# One object for the checksums of all blocks: they do not count. The arena is never touched.
checksums = bytes(8)
import mmap
arena = memoryview(mmap.mmap(-1, BLOCKS * 4096))
source = ArenaSource(arena)
store = source.store
namespace = store.pools.open("pool", layout(4096))

def put(count):
    for _ in range(count):
        slot = store.reserve(namespace)
        store.publish(namespace, os.urandom(32), slot, checksums)
        store.enqueue(namespace, [slot])

before = resident_bytes()
put(BLOCKS + EVICTED)
assert len(namespace.slots) == BLOCKS
print((resident_bytes() - before) / BLOCKS)
"""


# Tables that double are filled worst a little above what made them grow: the table of keys at
# 174,763 blocks, the ghosts at 131,072 and 262,144.
@pytest.mark.slow
@pytest.mark.parametrize("blocks", [140_000, 176_000, 200_000, 270_000])
def test_a_block_costs_no_more_than_it_may(blocks: int) -> None:
    """Index, allocator and eviction queues, the remembered evicted blocks among them."""
    result = subprocess.run(
        [sys.executable, "-c", _MEASUREMENT, str(blocks)],
        env={
            "PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(result.stdout) <= INDEX_BYTES_PER_BLOCK_MAX
