"""A fetch of which layers are passed on, in parts: what came once is not asked for again."""

from __future__ import annotations

from collections import Counter

from kvstore.checksum import block_seed, layer_checksums
from kvstore.layout import Geometry
from kvstore.messages import FetchOutcome
from kvstore.transfer import PENDING, FetchTransfer
from kvstore_client.handles import FetchHandle
from kvstore_client.jobs import FillJob
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys
from tests.support.engine import content, key, layout
from tests.support.filling import data_header

SIZES = (100, 30, 70, 10, 50, 20, 90, 40, 60, 80)
GEOMETRY = Geometry(SIZES)
LAYERS = range(len(SIZES))
HIT = FetchOutcome.HIT


class Told:
    """Who is told of layers."""

    def __init__(self) -> None:
        self.layers: Counter[tuple[int, int]] = Counter()

    def checksums_known(self, index: int, layer_first: int, checksums: bytes) -> None:
        """Nothing to note."""

    def layers_arrived(self, index: int, layer_first: int, layer_last: int) -> None:
        """Layers are in their memory."""
        self.layers.update((index, layer) for layer in range(layer_first, layer_last))


class Bed:
    """A job about a few blocks, and what brings some of their layers."""

    def __init__(self, count: int, group: int) -> None:
        self.keys = [key(number) for number in range(count)]
        self.memory = [bytearray(GEOMETRY.block_bytes) for _ in self.keys]
        self.told = Told()
        self.ends: Counter[int] = Counter()
        self.namespace = Namespace("pool", layout(*SIZES))
        self.job = FillJob(
            self.namespace,
            PlacedKeys(self.keys, ()),
            [memoryview(block) for block in self.memory],
            LAYERS,
            group,
            0.0,
            60.0,
            self.told,
            True,
        )
        self.job.handle = FetchHandle(60.0, self.job.cancel, len(SIZES))
        self.job.on_block = lambda index, outcome: self.ends.update((index,))

    def begin(self, *indices: int) -> FetchTransfer:
        """Ask for the rest of some blocks."""
        first = self.job.first_missing(indices[0], 0)
        layers = range(first, len(SIZES))
        return self.job.transfer(indices, layers, self.job.block_failed)

    def bring(self, transfer: FetchTransfer, index: int, until: int, version: int = 0) -> None:
        """Layers of a block of a transfer up to a layer, of which all in front were brought."""
        pieces = transfer.pieces
        data = content(transfer.keys[index], GEOMETRY.block_bytes, version)
        seed = block_seed(self.namespace.id, transfer.keys[index])
        for group, (first, last, start, size) in enumerate(pieces.group_ranges):
            number = group * pieces.key_count + index
            end = min(size, GEOMETRY.offsets[until] - start)
            at = max(0, transfer._filled[index] - start + pieces.group_ranges[0][2])
            if at >= end:
                continue
            sums = b""
            if not at:
                layers = [
                    data[GEOMETRY.offsets[layer] : GEOMETRY.offsets[layer + 1]]
                    for layer in range(first, last)
                ]
                sums = layer_checksums(layers, seed, first)
            header = data_header(number, at, end - at)
            place = start + at
            for view in transfer.route(header, lambda size: [memoryview(bytearray(size))]):
                view[:] = data[place : place + len(view)]
                place += len(view)
            transfer.data(header, sums, ())

    def check_complete(self) -> None:
        """Each layer of each block has come once, and the job knows."""
        count = len(self.keys)
        assert list(self.job.outcomes) == [HIT] * count
        assert self.told.layers == {(index, layer): 1 for index in range(count) for layer in LAYERS}
        assert self.ends == dict.fromkeys(range(count), 1)
        assert self.job.handle.layers_ready == len(SIZES)


def test_the_rest_of_a_block_begins_with_the_layer_that_nobody_was_told_of() -> None:
    bed = Bed(2, 0)
    one = bed.begin(0, 1)
    bed.bring(one, 0, 4)
    one.abandon()
    assert [bed.job.first_missing(index, 0) for index in range(2)] == [4, 0]
    first, second = bed.begin(0), bed.begin(1)
    assert (first.pieces.layer_first, second.pieces.layer_first) == (4, 0)
    bed.bring(first, 0, len(SIZES))
    assert list(bed.job.outcomes) == [HIT, PENDING]
    bed.bring(second, 0, len(SIZES))
    bed.check_complete()
    for name, memory in zip(bed.keys, bed.memory, strict=True):
        assert memory == content(name, len(memory))


def test_groups_of_a_block_by_several_requests_in_any_order() -> None:
    bed = Bed(1, 4)  # groups end at layers 4, 8 and 10
    first, second, third = (
        bed.job.transfer([0], layers, bed.job.block_failed)
        for layers in (range(4), range(4, 8), range(8, 10))
    )
    bed.bring(third, 0, 10)
    bed.bring(second, 0, 5)
    second.abandon()
    bed.bring(second, 0, 8)  # what is still on its way
    assert [bed.job.first_missing(0, since) for since in (0, 4, 8)] == [0, 5, 10]
    assert bed.job.handle.layers_ready == 0
    bed.bring(bed.job.transfer([0], range(5, 8), bed.job.block_failed), 0, 8)
    assert list(bed.job.outcomes) == [PENDING]
    assert bed.job.handle.layers_ready == 0
    bed.bring(first, 0, 4)
    bed.check_complete()
    assert bed.memory[0] == content(bed.keys[0], len(bed.memory[0]))


def test_what_was_passed_on_is_never_written_again() -> None:
    bed = Bed(1, 0)
    one = bed.begin(0)
    bed.bring(one, 0, 4)
    one.abandon()
    bed.bring(one, 0, 7, version=1)  # what is still on its way
    passed = GEOMETRY.offsets[4]
    whole = content(bed.keys[0], GEOMETRY.block_bytes)
    assert bed.memory[0] == whole[:passed] + bytes(len(whole) - passed)
    bed.bring(bed.begin(0), 0, len(SIZES), version=1)
    other = content(bed.keys[0], GEOMETRY.block_bytes, 1)
    assert bed.memory[0] == whole[:passed] + other[passed:]


def test_groups_are_here_with_their_last_layer_whatever_requests_brought_them() -> None:
    # Groups of the job end at layers 4, 8 and 10.
    bed = Bed(2, 4)
    one = bed.begin(0, 1)
    bed.bring(one, 0, 8)
    bed.bring(one, 1, 5)
    assert bed.job.handle.layers_ready == 4
    one.abandon()
    two = bed.begin(1)
    assert [last for _, last, _, _ in two.pieces.group_ranges] == [9, 10]
    bed.bring(two, 0, 8)
    two.abandon()
    # Both begin with the same layer, and of one it is not known yet that a group is here.
    assert [bed.job.first_missing(index, 0) for index in range(2)] == [8, 8]
    three = bed.begin(0, 1)
    bed.bring(three, 0, len(SIZES))
    assert list(bed.job.outcomes) == [HIT, PENDING]
    bed.bring(three, 1, len(SIZES))
    bed.check_complete()
