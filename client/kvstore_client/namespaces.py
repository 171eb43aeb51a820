"""Namespaces as their users hold them, and which of them a peer is to have open."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvstore.errors import LayoutMismatch, PermissionDenied, RefusedError
from kvstore.layout import (
    Geometry,
    Layout,
    check_layout,
    check_pool,
    generation_id,
    namespace_id,
)
from kvstore.messages import Message, Namespaces, OpenNamespace

logger = logging.getLogger(__name__)

# Whoever retires a generation that is in use is heard once a second, not once a request.
REOPEN_PAUSE_S = 1.0
# What does not change by asking again.
FINAL_REFUSALS = (LayoutMismatch, PermissionDenied)


class Namespace:
    """The blocks of one pool and one layout.

    Attributes:
        pool: The operator's name for a model's cache.
        layout: What makes bytes interchangeable.
        id: 32 bytes, SHA-256 over both.
        geometry: Where the layers of a block lie.

    Raises:
        LocalProtocolError: The pool's name or the layout is impossible.
    """

    __slots__ = ("geometry", "id", "layout", "pool")

    def __init__(self, pool: str, layout: Layout) -> None:
        check_pool(pool)
        check_layout(layout)
        self.pool = pool
        self.layout = layout
        self.id = namespace_id(pool, layout)
        self.geometry = Geometry(layout.layer_bytes)

    @property
    def generation(self) -> bytes:
        """The generation of the pool that it belongs to, as `pin_pool` takes it."""
        return generation_id(self.pool, self.layout)

    def __repr__(self) -> str:
        return f"<Namespace {self.pool} {self.id.hex()[:12]}>"


# Sends an OPEN_NAMESPACE and waits for the reply.
Ask = Callable[[OpenNamespace], Awaitable[Message]]


class WantedNamespaces:
    """What one peer is to have open, and what it refuses.

    Args:
        peer: Its name in messages.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._wanted: dict[bytes, Namespace] = {}
        self._refusals: dict[bytes, RefusedError] = {}
        self._answered: set[bytes] = set()
        self._tried_at: dict[bytes, float] = {}

    def add(self, namespace: Namespace) -> None:
        """Want a namespace from now on."""
        self._wanted[namespace.id] = namespace

    def forget(self, namespace: Namespace) -> None:
        """Want a namespace no more."""
        name = namespace.id
        self._wanted.pop(name, None)
        self._refusals.pop(name, None)
        self._tried_at.pop(name, None)
        self._answered.discard(name)

    def answered(self, namespace: Namespace) -> bool:
        """Whether the peer has ever said yes or no to a namespace."""
        return namespace.id in self._answered

    def refusal(self, namespace: Namespace) -> RefusedError | None:
        """Why the peer does not serve a namespace; None if it does, as far as is known."""
        return self._refusals.get(namespace.id)

    def may_reopen(self, namespace: Namespace, now: float) -> bool:
        """Whether to open a namespace again that the peer turned out not to have. At most one
        True a second, none for what nobody wanted, and none where the answer is known."""
        name = namespace.id
        if name not in self._wanted or isinstance(self._refusals.get(name), FINAL_REFUSALS):
            return False
        tried_at = self._tried_at.get(name)
        if tried_at is not None and now - tried_at < REOPEN_PAUSE_S:
            return False
        self._tried_at[name] = now
        return True

    async def open(self, namespace: Namespace, ask: Ask) -> None:
        """Open one.

        Raises:
            RefusedError: The peer says no, now and to every request until it is asked again.
        """
        try:
            reply = await ask(OpenNamespace(pool=namespace.pool, layout=namespace.layout))
            assert isinstance(reply, Namespaces)
            if [info.namespace for info in reply.namespaces] != [namespace.id]:
                raise RefusedError(f"{self._peer} computes another namespace id for {namespace!r}")
        except RefusedError as error:
            self._refusals[namespace.id] = error
            self._answered.add(namespace.id)
            raise
        self._refusals.pop(namespace.id, None)
        self._answered.add(namespace.id)

    async def open_all(self, ask: Ask) -> None:
        """Open all, those too that are added meanwhile, before the first request about one of
        them can be sent. Refusals are logged."""
        tried: set[bytes] = set()
        while wanted := [name for name in self._wanted.values() if name.id not in tried]:
            for namespace in wanted:
                tried.add(namespace.id)
                try:
                    await self.open(namespace, ask)
                except RefusedError as error:
                    logger.error("%s: %r: %s", self._peer, namespace, error)
