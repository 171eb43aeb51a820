"""Asks a peer of `kvctl doctor`, and sends a block there and back: with a client as engines
have it, so that what is found is what they would find."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import KVStoreError, PermissionDenied
from kvstore.layout import Layout
from kvstore.messages import FetchOutcome, PutOutcome, Welcome
from kvstore.transport.shm import host_name
from kvstore_client.aio import AsyncClient
from kvstore_client.ctl.connection import open_connection, reason_text
from kvstore_client.ctl.doctor_peer import PeerFacts, TransferFacts
from kvstore_client.namespaces import Namespace

POOL = "kvctl-doctor"
# Small enough for any daemon, large enough for several packets and pieces.
LAYOUT = Layout(
    model_id="kvctl-doctor", dtype="uint8", block_tokens=1, layer_bytes=(65536, 65536, 100_000)
)
# A device tells after half a second that its peer does not answer, and after two seconds we
# give it up: that shall be seen, and not our own deadline.
STALL_S = 3.0

_LIBRARY = ("kvstore", "kvstore_client")


async def ask_peer(endpoint: Endpoint, timeout_s: float) -> PeerFacts:
    """Connect, and hear what a peer says of itself.

    Args:
        timeout_s: For connecting, and for each answer.
    """
    try:
        connection = await open_connection(endpoint, timeout_s)
        try:
            round_trip_s = await connection.ping()
        finally:
            connection.close()
    except KVStoreError as error:
        return PeerFacts(str(endpoint), reason_text(endpoint, error))
    welcome = connection.welcome
    facts = PeerFacts(
        endpoint=str(endpoint),
        node_id=welcome.node_id,
        role=str(welcome.role),
        round_trip_s=round_trip_s,
        capabilities=welcome.capabilities,
        owner_uid=_owner(endpoint),
        user_id=os.geteuid(),
    )
    return await _with_near(facts, endpoint, welcome, timeout_s)


async def _with_near(
    facts: PeerFacts, endpoint: Endpoint, welcome: Welcome, timeout_s: float
) -> PeerFacts:
    """The facts with what its socket on this host offers."""
    here = host_name()
    if endpoint.scheme == "unix" or not (here and welcome.host):
        return facts
    if welcome.host != here:
        same_machine = welcome.host.rpartition("-")[0].rpartition("-")[0] in here
        return facts._replace(other_space=same_machine)
    if not welcome.local:
        return facts
    facts = facts._replace(local=welcome.local)
    try:
        near = await open_connection(parse_endpoint(welcome.local), timeout_s)
        near.close()
    except KVStoreError as error:
        return facts._replace(near_error=str(error))
    if near.welcome.boot_id != welcome.boot_id:
        return facts._replace(near_error="another server has its path")
    return facts._replace(near_capabilities=near.welcome.capabilities)


async def transfer(
    endpoint: Endpoint, transport: str, timeout_s: float, rails: Sequence[str] = ()
) -> TransferFacts:
    """Put a block, fetch it, compare, delete it.

    Args:
        timeout_s: For connecting, and for each answer.
        rails: Names of ours, if it is to go by RDMA.
    """
    size = LAYOUT.block_bytes
    with _heard() as warnings:
        try:
            async with AsyncClient(
                str(endpoint),
                node_id=f"kvctl-{platform.node() or 'localhost'}-{os.getpid()}",
                connect_timeout_s=timeout_s,
                deadline_s=timeout_s + STALL_S,
                transport=transport,
            ) as client:
                try:
                    namespace = await client.open_namespace(POOL, LAYOUT)
                except PermissionDenied as error:
                    return TransferFacts(transport, size, refused=str(error))
                facts = await _there_and_back(client, namespace, transport)
        except (KVStoreError, OSError) as error:
            facts = TransferFacts(transport, size, error=str(error) or type(error).__name__)
    return facts._replace(rails=tuple(rails), warnings=tuple(warnings))


async def _there_and_back(
    client: AsyncClient, namespace: Namespace, transport: str
) -> TransferFacts:
    size = LAYOUT.block_bytes
    facts = TransferFacts(transport, size)
    # One at a time is enough: a key of its own keeps others' blocks, and us, apart.
    key, content = os.urandom(32), os.urandom(size)
    region = await client.allocate(2 * size)
    source, target = region.view[:size], region.view[size:]
    source[:] = content
    # The memory of what fails may stay with a peer that hangs: the end of the client sees to that.
    put = await client.put(namespace, [key], [source])
    if put.outcomes != [PutOutcome.STORED]:
        return facts._replace(error=_why("put", put.outcomes[0].name, put.errors))
    fetched = await client.fetch(namespace, [key], [target])
    deleted = await _delete(client, namespace, key)
    if fetched.outcomes != [FetchOutcome.HIT]:
        error = _why("fetch", fetched.outcomes[0].name, fetched.errors)
        return facts._replace(error=error, deleted=deleted)
    return facts._replace(
        error="" if target == content else "fetch: other bytes came than were put",
        moved_by=tuple(sorted({run.transport for run in (*put.runs, *fetched.runs)})),
        put_s=put.elapsed_s,
        fetch_s=fetched.elapsed_s,
        deleted=deleted,
    )


async def _delete(client: AsyncClient, namespace: Namespace, key: bytes) -> bool:
    try:
        return await client.delete(namespace, [key]) == [True]
    except KVStoreError:
        return False


def _why(what: str, outcome: str, errors: Sequence[Exception]) -> str:
    told = "; ".join(dict.fromkeys(str(error) or type(error).__name__ for error in errors))
    return f"{what}: {outcome}{': ' if told else ''}{told}"


async def source_address(endpoint: Endpoint) -> str:
    """Our address on the way to a peer; "" if there is none. Nothing is sent."""
    if endpoint.scheme == "unix":
        return ""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _owner(endpoint: Endpoint) -> int | None:
    """Who has made a socket: as a rule, who listens on it."""
    if endpoint.scheme != "unix" or endpoint.path.startswith("@"):
        return None
    try:
        return os.stat(endpoint.path).st_uid
    except OSError:
        return None


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the library warns of meanwhile: part of what is found, and not for the screen."""
    texts: list[str] = []

    class Ear(logging.Handler):
        """Keeps what it is told."""

        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ear = Ear(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LIBRARY]
    for logger in loggers:
        logger.addHandler(ear)
    try:
        yield texts
    finally:
        for logger in loggers:
            logger.removeHandler(ear)


__all__ = ["LAYOUT", "POOL", "ask_peer", "source_address", "transfer"]
