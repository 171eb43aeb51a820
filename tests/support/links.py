"""A client of one daemon, and what tests do to the link between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvstore.errors import TransportError
from kvstore_client import AsyncClient, Namespace
from kvstore_client.breaker import CircuitBreaker
from kvstore_client.link import PeerLink
from tests.support.cluster import MIB, Node, connected, serve, until


@asynccontextmanager
async def on_one_host(
    tmp_path: Path, transport: str = "shm", **options: Any
) -> AsyncIterator[tuple[Node, AsyncClient]]:
    """A daemon in the test's process, and a client at its unix socket.

    Args:
        options: Of the daemon.
    """
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB, **options) as (node,),
        connected([node], transport=transport) as client,
    ):
        yield node, client


def link_of(client: AsyncClient) -> PeerLink:
    """The link to the only daemon."""
    (link,) = client.cluster._links
    return link


def cut(client: AsyncClient) -> None:
    """The client takes its link down; it comes up again by itself."""
    link_of(client)._take_down(TransportError("cut by the test"))


async def reconnected(client: AsyncClient, count: int = 1) -> None:
    """Return when links have come up again so often."""
    await until(lambda: client.cluster.counters["reconnects"] >= count, "a new session")


async def up_again(client: AsyncClient, namespace: Namespace) -> None:
    """Return when requests can be sent again."""
    link = link_of(client)
    await until(lambda: link.up and link.refusal(namespace) is None, "the link is up")
    # What breakers say of it is another matter, and other tests'.
    link.breaker = CircuitBreaker()
