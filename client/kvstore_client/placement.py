"""Which daemon owns what: rendezvous hashing of extents.

Rule: a place depends on the head key of the extent and on the names of the daemons, and on
nothing else. Not on the namespace, so that all ranks of a block lie together; not on the
order in which daemons are listed; not on health, so that a daemon that comes back finds its
blocks where clients look for them.

Highest random weight: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit
Rates", IEEE/ACM Transactions on Networking 6(1), 1998. When one of n daemons goes, its share
of 1/n moves, evenly to the others, and nothing else does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from kvstore.errors import ConfigError, LocalProtocolError

# Blocks placed together. One request serves the whole extent, so that a long prefix costs few
# round trips; and at 16 to 64 tokens a block it is small enough to spread one context of tens
# of thousands of tokens over many daemons.
EXTENT_BLOCKS = 64
# A reader tries the second owner where the first has nothing or does not answer; a third
# would cost every miss one more round trip.
OWNERS_MAX = 2


class Chain(NamedTuple):
    """Keys as a caller passes them: where blocks lie, and which of them a call is about.

    Attributes:
        keys: Keys of a prefix from its beginning.
        first: The call is about `keys[first:]`.
        linked: Whether the keys are a prefix; if not, each is an extent of its own.
    """

    keys: Sequence[bytes]
    first: int
    linked: bool

    @property
    def wanted(self) -> Sequence[bytes]:
        """Keys of the blocks that the call is about."""
        return self.keys[self.first :]

    def heads(self) -> list[tuple[int, int, bytes]]:
        """The extents of the wanted blocks: `[first, last)` of them, and the head's key."""
        keys, start, linked = self
        stop = len(keys)
        if not linked:
            return [(at - start, at - start + 1, keys[at]) for at in range(start, stop)]
        if start == stop:
            return []
        return [
            (max(start, head) - start, min(stop, head + EXTENT_BLOCKS) - start, keys[head])
            for head in range(start - start % EXTENT_BLOCKS, stop, EXTENT_BLOCKS)
        ]


class PlacedKeys(NamedTuple):
    """Keys as another node passes them on, with the heads of their extents.

    Attributes:
        wanted: The keys.
        extents: How many keys one after the other are of one extent, and the key of its head;
            without any, each key is an extent of its own.
    """

    wanted: Sequence[bytes]
    extents: Sequence[tuple[int, bytes]]

    def heads(self) -> list[tuple[int, int, bytes]]:
        """As of `Chain`.

        Raises:
            LocalProtocolError: The extents are not about as many keys as there are.
        """
        if not self.extents:
            return [(at, at + 1, key) for at, key in enumerate(self.wanted)]
        found = []
        first = 0
        for count, head in self.extents:
            found.append((first, first + count, head))
            first += count
        if first != len(self.wanted):
            raise LocalProtocolError(f"extents of {first} keys for {len(self.wanted)} keys")
        return found


class Extent(NamedTuple):
    """Consecutive blocks that lie together.

    Attributes:
        first, last: Indices into the caller's keys, `[first, last)`.
        owners: Indices of daemons, best first.
    """

    first: int
    last: int
    owners: tuple[int, ...]


class Placement:
    """Places extents on a fixed set of daemons. Immutable, any thread may use it.

    Args:
        nodes: Names of the daemons; every client must know them by the same names.

    Raises:
        ConfigError: There are no names, or one occurs twice.
    """

    __slots__ = ("_order", "_seeds")

    def __init__(self, nodes: Sequence[str]) -> None:
        if not nodes:
            raise ConfigError("endpoints", "", "at least one is needed")
        for index, node in enumerate(nodes):
            if node in nodes[:index]:
                raise ConfigError("endpoints", node, "must be listed once")
        # Equal weights are as good as impossible; sorted names decide even those the same
        # way for every client.
        self._order = sorted(range(len(nodes)), key=lambda index: nodes[index])
        self._seeds = [xxh3_64_intdigest(nodes[index].encode()) for index in self._order]

    def owners(self, head_key: bytes) -> tuple[int, ...]:
        """Indices of the daemons that own an extent, best first: two, or one if there is one.

        Args:
            head_key: Key of the first block of the extent.
        """
        weights = [xxh3_64_intdigest(head_key, seed) for seed in self._seeds]
        owners = []
        for _ in range(min(OWNERS_MAX, len(weights))):
            index = weights.index(max(weights))
            weights[index] = -1
            owners.append(self._order[index])
        return tuple(owners)

    def extents(self, chain: Chain | PlacedKeys) -> list[Extent]:
        """The extents of the blocks that a call is about; they count from the first of them."""
        return [Extent(first, last, self.owners(head)) for first, last, head in chain.heads()]


def block_owners(extents: Iterable[Extent]) -> list[tuple[int, ...]]:
    """The owners of each block, in order."""
    return [extent.owners for extent in extents for _ in range(extent.first, extent.last)]


def by_owner(
    extents: Iterable[Extent],
    rank: int,
    wanted: Callable[[int], bool] = lambda index: True,
) -> dict[int, list[int]]:
    """Indices of blocks by the daemon that owns them in this rank, ascending."""
    owned: defaultdict[int, list[int]] = defaultdict(list)
    for extent in extents:
        if rank < len(extent.owners):
            owned[extent.owners[rank]].extend(filter(wanted, range(extent.first, extent.last)))
    return {owner: indices for owner, indices in owned.items() if indices}


def extents_of(heads: Sequence[bytes], indices: Iterable[int]) -> tuple[tuple[int, bytes], ...]:
    """Some of the keys of a chain and where they lie, as a request to an agent says it.

    Args:
        heads: The head's key of each block of the chain.
        indices: Which blocks, in the order of the request.
    """
    runs: list[tuple[int, bytes]] = []
    for index in indices:
        head = heads[index]
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0] + 1, head)
        else:
            runs.append((1, head))
    return tuple(runs)


def block_heads(chain: Chain | PlacedKeys) -> list[bytes]:
    """The key of the head of each block's extent, in order."""
    return [head for first, last, head in chain.heads() for _ in range(first, last)]


def parts(items: Sequence[int], size_max: int) -> list[Sequence[int]]:
    """Consecutive parts of at most `size_max` items."""
    return [items[at : at + size_max] for at in range(0, len(items), size_max)]
