"""A namespace as its user holds it."""

from __future__ import annotations

from kvstore.layout import Geometry, Layout, check_layout, check_pool, namespace_id


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

    def __repr__(self) -> str:
        return f"<Namespace {self.pool} {self.id.hex()[:12]}>"
