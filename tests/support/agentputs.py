"""An agent's pool, a storage that decides when it is told to, and puts between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from kvstore.checksum import block_seed, layer_checksums
from kvstore.messages import AckLevel, PutOutcome, Retain
from kvstore_client import Namespace
from kvstore_client.agent.memory import PAGE_BYTES, BlockPool, HeldBlock
from kvstore_client.agent.puts import OfferPut, StoragePut
from kvstore_client.agent.retention import Retentions
from kvstore_client.jobs import PutJob
from kvstore_client.placement import PlacedKeys
from tests.support.engine import content, key, layout

SPACE = Namespace("pool", layout(PAGE_BYTES, PAGE_BYTES))
SIZE = 2 * PAGE_BYTES
ALL = range(2)
MANY_BYTES = 1 << 30

STORED, EXISTS, CONFLICT = PutOutcome.STORED, PutOutcome.EXISTS, PutOutcome.CONFLICT
FULL, TIMEOUT = PutOutcome.FULL, PutOutcome.TIMEOUT
CORRUPT, UNAVAILABLE = PutOutcome.CORRUPT, PutOutcome.UNAVAILABLE


def block_bytes(number: int, version: int = 0) -> bytes:
    """What belongs into a block."""
    return content(key(number), SIZE, version)


def sums(number: int, version: int = 0, layers: range = ALL) -> bytes:
    """Its checksums."""
    data, offsets = block_bytes(number, version), SPACE.geometry.offsets
    views = [data[a:b] for a, b in pairwise(offsets[layers.start : layers.stop + 1])]
    return layer_checksums(views, block_seed(SPACE.id, key(number)), layers.start)


class Storage:
    """Takes puts, and decides on them when it is told to.

    Attributes:
        jobs: Those that are under way.
        got: Bytes that each key was put with, in order.
    """

    def __init__(self) -> None:
        self.jobs: list[PutJob] = []
        self.got: list[tuple[bytes, bytes]] = []
        self.acks: list[AckLevel] = []
        self.reading = True
        self.refuses = False

    def begin_put(self, job: PutJob, ack: AckLevel) -> None:
        """A put comes from the agent."""
        self.acks.append(ack)
        if self.refuses:
            job.time_out()
            return
        for name, memory in zip(job.keys, job.memory, strict=True):
            assert isinstance(memory, memoryview)
            self.got.append((name, bytes(memory)))
        self.jobs.append(job)
        job.borrow("run", lambda: None)

    def decide(self, *outcomes: PutOutcome, at: int = 0, let_go: bool = True) -> PutJob:
        """End a put; all blocks are stored if nothing else is said."""
        job = self.jobs.pop(at)
        for index, outcome in enumerate(outcomes or [STORED] * len(job.keys)):
            job.block_done(index, outcome)
        job.time_out()
        if let_go:
            job.let_go()
        return job

    @property
    def numbers(self) -> list[list[int]]:
        """Blocks of the puts under way."""
        known = {key(number): number for number in range(100)}
        return [[known[name] for name in job.keys] for job in self.jobs]


class Bed:
    """A pool of some blocks, storage, and what streams tell their server."""

    def __init__(self, blocks: int = 40) -> None:
        self.now = 100.0
        self.pool = BlockPool(memoryview(bytearray(blocks * SIZE)))
        self.kept = Retentions(self.pool)
        self.storage = Storage()
        self.counters: Counter[str] = Counter()
        self.told = 0

    def _tell(self) -> None:
        self.told += 1

    def put(self, *numbers: int, version: int = 0, deadline_s: float = 5.0) -> StoragePut:
        chain = PlacedKeys([key(n) for n in numbers], [(len(numbers), b"head of the extent")])
        stream = StoragePut(
            self.pool,
            self.storage,
            SPACE,
            chain,
            b"".join(sums(n, version) for n in numbers),
            AckLevel.SYNCED,
            lambda: self.now,
            deadline_s,
            self.counters,
        )
        stream.on_decided = self._tell
        return stream

    def offer(
        self,
        *numbers: int,
        version: int = 0,
        layers: range = ALL,
        verify: bool = True,
        retain: Retain | None = None,
    ) -> OfferPut:
        stream = OfferPut(
            self.pool,
            self.kept,
            SPACE,
            [key(n) for n in numbers],
            layers,
            b"".join(sums(n, version, layers) for n in numbers),
            lambda: self.now,
            10.0,
            retain,
            verify,
            self.counters,
        )
        stream.on_decided = self._tell
        return stream

    def find(self, number: int) -> HeldBlock | None:
        return self.pool.find(SPACE.id, key(number))

    def known(self, number: int) -> HeldBlock:
        block = self.find(number)
        assert block is not None
        return block

    def hold(self, number: int, version: int = 0, layers: range = ALL) -> HeldBlock:
        """A block in the pool, as a fill leaves it."""
        block = self.pool.reserve(SPACE, key(number))
        assert block is not None
        self.pool.pin(block)
        offsets = SPACE.geometry.offsets
        part = slice(offsets[layers.start], offsets[layers.stop])
        block.view[part] = block_bytes(number, version)[part]
        block.learn(layers.start, sums(number, version, layers))
        block.arrived(layers.start, layers.stop)
        self.pool.unpin(block)
        return block

    def check(self, pinned: int = 0) -> None:
        self.pool.check()
        self.kept.check()
        assert self.pool.pinned_count == pinned


def receive(
    stream: StoragePut | OfferPut,
    numbers: Sequence[int],
    *indices: int,
    version: int = 0,
    layers: range = ALL,
    damaged: bool = False,
) -> None:
    offsets = SPACE.geometry.offsets
    for index in indices:
        data = bytearray(block_bytes(numbers[index], version))
        data[offsets[layers.start]] ^= damaged
        target = stream.target(index)
        assert target is not None
        target[:] = data[offsets[layers.start] : offsets[layers.stop]]
        stream.received(index)
        assert stream.target(index) is None


def outcomes(stream: StoragePut | OfferPut) -> list[PutOutcome]:
    assert stream.finished
    return [PutOutcome(number) for number in stream.outcomes()]
