"""Pools, their generations and namespaces: who may store what, and how much. Pure.

::

    pool "llama3-70b"            a quota, an eviction policy, perhaps a pin
      generation 8f3a..          one layout, ranks aside
        namespace 01c4..         rank 0: keys live here
        namespace 77d0..         rank 1
      generation c02e..          the next weights, beside the old ones

Bytes are counted as the arena spends them: whole pages, from the reservation of a block
until its memory is free again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvstore.errors import LayoutMismatch, LimitExceeded, RefusedError, UnknownNamespace
from kvstore.layout import (
    Geometry,
    Layout,
    check_layout,
    check_pool,
    differing_field,
    generation_id,
    namespace_id,
)
from kvstore.messages import GenerationInfo, NamespaceInfo, PoolInfo
from kvstore_daemon.engine.keytable import KeyTable
from kvstore_daemon.engine.policy import EvictionPolicy

# A pool is a model; a daemon that serves more models than this needs a larger constant, and
# a client that makes up names needs an end.
POOLS_MAX = 256
# 16 generations of the largest deployment (256 ranks); at 16 bits a slot the index could
# tell 65,535 apart.
NAMESPACES_MAX = 4096


class Namespace:
    """One namespace and where its keys are.

    Attributes:
        number: Names it in the index; used again when it is gone.
        slots: Key to slot of every published block.
        occupied_count: Slots in use, those that are reserved or doomed included.
        retired: It takes no new blocks and no new requests; what it holds is on its way out.
    """

    __slots__ = (
        "block_pages",
        "generation",
        "geometry",
        "id",
        "layout",
        "number",
        "occupied_count",
        "pool",
        "retired",
        "slot_bytes",
        "slots",
    )

    def __init__(
        self,
        id: bytes,
        number: int,
        generation: Generation,
        layout: Layout,
        page_bytes: int,
        slots: KeyTable,
    ) -> None:
        self.id = id
        self.number = number
        self.generation = generation
        self.pool = generation.pool
        self.layout = layout
        self.geometry = Geometry(layout.layer_bytes)
        self.block_pages = -(-self.geometry.block_bytes // page_bytes)
        self.slot_bytes = self.block_pages * page_bytes
        self.slots = slots
        self.occupied_count = 0
        self.retired = False

    @property
    def used_bytes(self) -> int:
        """Arena bytes of all its slots."""
        return self.occupied_count * self.slot_bytes

    def info(self) -> NamespaceInfo:
        """For the wire."""
        return NamespaceInfo(
            namespace=self.id,
            pool=self.pool.name,
            generation=self.generation.id,
            layout=self.layout,
            block_count=len(self.slots),
            used_bytes=self.used_bytes,
        )


class Generation:
    """One layout of a pool, ranks aside."""

    __slots__ = ("id", "layout", "namespaces", "pool")

    def __init__(self, id: bytes, pool: Pool, layout: Layout) -> None:
        self.id = id
        self.pool = pool
        self.layout = layout
        self.namespaces: dict[bytes, Namespace] = {}

    def info(self) -> GenerationInfo:
        """For the wire."""
        return GenerationInfo(
            generation=self.id,
            layout=self.layout,
            block_count=sum(len(n.slots) for n in self.namespaces.values()),
            used_bytes=sum(n.used_bytes for n in self.namespaces.values()),
        )


class Pool:
    """A named share of the store.

    Attributes:
        capacity_bytes: Quota; 0 is none.
        used_bytes: Arena bytes of its blocks. Blocks of retired generations count until
            their memory is free, so that this may exceed the sum over `generations`.
        pinned: Id of the only generation that may be opened; empty if any may.
    """

    __slots__ = ("capacity_bytes", "configured", "generations", "name", "pinned", "policy",
                 "used_bytes")  # fmt: skip

    def __init__(self, name: str, policy: EvictionPolicy) -> None:
        self.name = name
        self.policy = policy
        self.capacity_bytes = 0
        self.used_bytes = 0
        self.pinned = b""
        self.configured = False
        self.generations: dict[bytes, Generation] = {}

    def info(self) -> PoolInfo:
        """For the wire."""
        return PoolInfo(
            pool=self.name,
            generations=tuple(g.info() for g in self.generations.values()),
            capacity_bytes=self.capacity_bytes,
            used_bytes=self.used_bytes,
            pinned=self.pinned,
        )


class PoolTable:
    """All pools and namespaces of a store.

    Args:
        page_bytes: Granularity of memory.
        arena_bytes: What a pool without a quota may fill.
        make_policy: Makes the eviction policy of a new pool, given its capacity in bytes.
        keys: The index's column of keys.

    Attributes:
        by_number: Namespace of each number that is taken, retired ones included. Read only.
    """

    def __init__(
        self,
        page_bytes: int,
        arena_bytes: int,
        make_policy: Callable[[int], EvictionPolicy],
        keys: Sequence[bytes | None],
    ) -> None:
        self.by_number: dict[int, Namespace] = {}
        self._page_bytes = page_bytes
        self._arena_bytes = arena_bytes
        self._make_policy = make_policy
        self._keys = keys
        self._pools: dict[str, Pool] = {}
        self._namespaces: dict[bytes, Namespace] = {}
        self._spare_numbers: list[int] = []
        self._last_number = -1

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools.values())

    def configure(self, name: str, capacity_bytes: int = 0, pinned: bytes = b"") -> None:
        """Make a pool that stays also when it is empty."""
        check_pool(name)
        pool = self._pools.get(name) or self._add_pool(name)
        pool.configured = True
        pool.pinned = pinned
        self.set_capacity(name, capacity_bytes)

    def open(self, pool_name: str, layout: Layout) -> Namespace:
        """Find or make a namespace, and the pool and the generation that it is in.

        Raises:
            LocalProtocolError: The layout or the name of the pool is impossible.
            LayoutMismatch: The pool is pinned to another layout.
            LimitExceeded: Too many pools or namespaces, or a block larger than the arena.
        """
        check_pool(pool_name)
        check_layout(layout)
        known = self._namespaces.get(id := namespace_id(pool_name, layout))
        pool = self._pools.get(pool_name)
        generation = generation_id(pool_name, layout)
        if pool is not None and pool.pinned and pool.pinned != generation:
            raise _mismatch(pool, layout)
        if known is not None:
            return known
        if layout.block_bytes > self._arena_bytes:
            raise LimitExceeded(
                f"a block of {layout.block_bytes} bytes does not fit into an arena of"
                f" {self._arena_bytes}"
            )
        if len(self.by_number) >= NAMESPACES_MAX:
            raise LimitExceeded(
                f"{len(self.by_number)} namespaces are open, the limit is {NAMESPACES_MAX}:"
                " retire generations that are no longer used"
            )
        if pool is None:
            pool = self._add_pool(pool_name)
        owner = pool.generations.get(generation)
        if owner is None:
            owner = pool.generations[generation] = Generation(generation, pool, layout)
        slots = KeyTable(self._keys)
        namespace = Namespace(id, self._take_number(), owner, layout, self._page_bytes, slots)
        owner.namespaces[id] = namespace
        self._namespaces[id] = namespace
        self.by_number[namespace.number] = namespace
        return namespace

    def namespace(self, id: bytes) -> Namespace:
        """The open namespace with this id.

        Raises:
            UnknownNamespace: It is not open.
        """
        namespace = self._namespaces.get(id)
        if namespace is None:
            raise UnknownNamespace(f"namespace {id.hex()[:16]} is not open here")
        return namespace

    def namespaces(self, pool_name: str = "") -> list[Namespace]:
        """Open namespaces of one pool, or of all."""
        pools = [self._pools[pool_name]] if pool_name in self._pools else []
        return [
            namespace
            for pool in (pools if pool_name else self._pools.values())
            for generation in pool.generations.values()
            for namespace in generation.namespaces.values()
        ]

    def pool(self, name: str) -> Pool:
        """The pool of this name.

        Raises:
            RefusedError: There is none.
        """
        pool = self._pools.get(name)
        if pool is None:
            raise RefusedError(f"there is no pool {name!r}")
        return pool

    def pin(self, name: str, generation: bytes) -> Pool:
        """Let only one generation be opened; the others stay for those that have them open."""
        pool = self.pool(name)
        self._generation(pool, generation)
        pool.pinned = generation
        return pool

    def unpin(self, name: str) -> Pool:
        """Let any generation be opened again."""
        pool = self.pool(name)
        pool.pinned = b""
        return pool

    def set_capacity(self, name: str, capacity_bytes: int) -> Pool:
        """Give a pool a quota, or with 0 take it away."""
        pool = self.pool(name)
        pool.capacity_bytes = capacity_bytes
        pool.policy.resize(capacity_bytes or self._arena_bytes)
        return pool

    def retire(self, name: str, generation: bytes) -> list[Namespace]:
        """Drop a generation: its namespaces are not open any more.

        Returns:
            The namespaces, for the store to free their blocks and then to `forget` them.

        Raises:
            RefusedError: The pool or the generation is unknown, or the pool is pinned to it.
        """
        pool = self.pool(name)
        dropped = self._generation(pool, generation)
        if pool.pinned == generation:
            raise RefusedError(f"pool {name!r} is pinned to this generation: unpin it first")
        del pool.generations[generation]
        for namespace in dropped.namespaces.values():
            namespace.retired = True
            del self._namespaces[namespace.id]
        return list(dropped.namespaces.values())

    def forget(self, namespace: Namespace) -> None:
        """The last slot of a retired namespace is free: its number may be used again."""
        assert namespace.retired
        assert not namespace.occupied_count
        del self.by_number[namespace.number]
        self._spare_numbers.append(namespace.number)
        pool = namespace.pool
        kept = pool.generations or pool.used_bytes or pool.capacity_bytes or pool.configured
        if not kept and self._pools.get(pool.name) is pool:
            del self._pools[pool.name]

    def _generation(self, pool: Pool, generation: bytes) -> Generation:
        known = pool.generations.get(generation)
        if known is None:
            raise RefusedError(f"pool {pool.name!r} has no generation {generation.hex()[:16]}")
        return known

    def _add_pool(self, name: str) -> Pool:
        if len(self._pools) >= POOLS_MAX:
            raise LimitExceeded(f"{len(self._pools)} pools exist, the limit is {POOLS_MAX}")
        pool = self._pools[name] = Pool(name, self._make_policy(self._arena_bytes))
        return pool

    def _take_number(self) -> int:
        if self._spare_numbers:
            return self._spare_numbers.pop()
        self._last_number += 1
        return self._last_number


def _mismatch(pool: Pool, layout: Layout) -> LayoutMismatch:
    pinned = pool.generations.get(pool.pinned)
    # A pin from the configuration may name a generation that nobody has opened yet.
    field = differing_field(pinned.layout, layout) if pinned is not None else None
    return LayoutMismatch(
        f"pool {pool.name!r} is pinned to generation {pool.pinned.hex()[:16]},"
        f" the layout differs in {field or 'a field that is not known here'}",
        field or "layout",
    )
