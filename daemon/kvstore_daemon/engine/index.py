"""Which block lies where: compact columns, one entry a slot. Pure.

A block's *slot* is the number of its extent (`kvstore.allocator`), so that
place and neighbours cost nothing more. What a block needs beyond its extent is kept in
columns indexed by slot, and each namespace has one table from key to slot
(`kvstore_daemon.engine.keytable`): a Python object a block would cost as much as all of it
together, and make every full garbage collection walk through millions.

::

    slot state    keys[slot]   pins[slot]   in slots of its namespace
    vacant        None         0            no     a hole, or no extent
    reserved      None         1            no     a put is writing it
    published     the key      >= 0         yes
    doomed        None         >= 1         no     deleted; readers still hold it

A *pin* is held by a transport that still sends the block, a lease, or a put.
"""

from __future__ import annotations

from array import array

from kvstore.allocator import END
from kvstore_daemon.engine.keytable import KeyTable


class BlockIndex:
    """Columns over slots. Attributes are for reading on hot paths; methods change them.

    Attributes:
        keys: Key of a published block, else None. The tables of all namespaces look into it.
        checksums: Packed layer checksums of a published or doomed block, else None. Each
            stored version has an object of its own: identity tells two versions apart.
        pins: How many hold the block where it is.
        namespace_numbers: Which namespace an occupied slot belongs to.
        queued: 1 if the pool's eviction policy knows the block.
        published_count, reserved_count: Slots in that state.
        doomed: Slots in that state; few, so a set costs less than a column.
    """

    def __init__(self) -> None:
        self.keys: list[bytes | None] = []
        self.checksums: list[bytes | None] = []
        self.pins: list[int] = []
        self.namespace_numbers = array("H")
        self.queued = bytearray()
        self.published_count = 0
        self.reserved_count = 0
        self.doomed: set[int] = set()
        self._grow(END)

    def reserve(self, slot: int, namespace_number: int) -> None:
        """A vacant slot is about to be written; the writer holds one pin."""
        if slot >= len(self.keys):
            self._grow(slot)
        assert not self.pins[slot]
        assert self.keys[slot] is None
        self.pins[slot] = 1
        self.namespace_numbers[slot] = namespace_number
        self.reserved_count += 1

    def publish(self, slot: int, key: bytes, checksums: bytes, slots: KeyTable) -> int:
        """A reserved slot holds verified bytes now: requests may find it. The pin stays.

        Returns:
            0; or the slot that holds the key already, and nothing has changed.
        """
        known = slots.insert(key, slot)
        if known:
            return known
        self.keys[slot] = key
        self.checksums[slot] = checksums
        self.reserved_count -= 1
        self.published_count += 1
        return 0

    def withdraw(self, slot: int) -> bool:
        """A published block is found no more: the caller took it out of its namespace's table.

        Returns:
            Whether the slot can be vacated at once; else it is doomed until its last pin goes.
        """
        assert self.keys[slot] is not None
        self.keys[slot] = None
        self.published_count -= 1
        if self.pins[slot]:
            self.doomed.add(slot)
            return False
        return True

    def vacate(self, slot: int) -> None:
        """Nothing of a withdrawn block is left; nobody holds it."""
        assert self.keys[slot] is None
        assert not self.pins[slot]
        assert not self.queued[slot]
        self.checksums[slot] = None
        self.doomed.discard(slot)

    def abandon(self, slot: int) -> None:
        """A reserved slot is vacant again: its writer gave up."""
        assert self.keys[slot] is None
        assert self.pins[slot] == 1
        self.pins[slot] = 0
        self.reserved_count -= 1

    def _grow(self, slot: int) -> None:
        count = slot + 1 - len(self.keys)
        self.keys.extend([None] * count)
        self.checksums.extend([None] * count)
        self.pins.extend([0] * count)
        self.namespace_numbers.extend([0] * count)
        self.queued.extend(bytes(count))
