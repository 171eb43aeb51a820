"""The agent's pool, and who waits for something in it: for room, or for a block to appear."""

from __future__ import annotations

from collections.abc import Callable

from kvstore_client.agent.memory import BlockPool, HeldBlock
from kvstore_client.namespaces import Namespace


class WatchedPool(BlockPool):
    """A pool that tells many of room, and some of blocks that are made.

    Args:
        memory: As of `BlockPool`.
    """

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self.on_room = self._tell_waiting
        self._room: dict[object, Callable[[], None]] = {}
        self._expected: dict[tuple[bytes, bytes], dict[object, Callable[[HeldBlock], None]]] = {}

    @property
    def waiting_count(self) -> int:
        """Who waits for room, and keys that somebody waits for."""
        return len(self._room) + len(self._expected)

    def reserve(self, namespace: Namespace, key: bytes) -> HeldBlock | None:
        block = super().reserve(namespace, key)
        if self._expected and block is not None:
            waiting = self._expected.pop((namespace.id, key), None)
            if waiting is not None:
                self.pin(block)  # or one of them might let it go before the others have it
                for tell in waiting.values():
                    tell(block)
                # No news of room, as in the reservation itself.
                self._unpin(block)
                return None if block.dropped else block
        return block

    def wait_for_room(self, who: object, tell: Callable[[], None]) -> None:
        """Be told once when a reservation that has failed may succeed; those who have waited
        longest are told first."""
        self._room[who] = tell

    def expect(
        self, namespace_id: bytes, key: bytes, who: object, tell: Callable[[HeldBlock], None]
    ) -> None:
        """Be told once when somebody reserves the block of a key."""
        self._expected.setdefault((namespace_id, key), {})[who] = tell

    def expect_no_more(self, namespace_id: bytes, key: bytes, who: object) -> None:
        """Take back `expect`."""
        waiting = self._expected.get((namespace_id, key))
        if waiting is not None:
            waiting.pop(who, None)
            if not waiting:
                del self._expected[namespace_id, key]

    def forget(self, who: object) -> None:
        """Take back `wait_for_room`."""
        self._room.pop(who, None)

    def _tell_waiting(self) -> None:
        waiting, self._room = self._room, {}
        for who in list(waiting):
            tell = waiting.pop(who)
            tell()


__all__ = ["WatchedPool"]
