"""Which counters matter of a daemon and of an agent, and what they are called for people. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.units import format_size_bytes


class CounterRow(NamedTuple):
    """One counter of several nodes.

    Attributes:
        label: What it is called on the screen.
        name: What the nodes call it.
        show: Makes a figure readable.
    """

    label: str
    name: str
    show: Callable[[int], str] = str


def daemon_rows(every: Sequence[Mapping[str, int]]) -> Iterator[CounterRow]:
    """What a daemon has found, taken and let go.

    Args:
        every: The counters of each node: they name causes that are not known here.
    """
    yield CounterRow("lookup: keys", "lookup_keys")
    yield CounterRow("lookup: hits", "lookup_hits")
    yield from _fetched()
    yield CounterRow("fetch: bytes", "fetch_bytes", format_size_bytes)
    yield from _put()
    yield CounterRow("put: bytes", "put_bytes", format_size_bytes)
    yield CounterRow("evicted: all", "blocks_evicted")
    yield from _causes(every, "evicted", "blocks_evicted_")
    yield CounterRow("deleted blocks", "blocks_deleted")
    yield CounterRow("checksum failures: readers' reports", "requests_corrupt_report")
    yield CounterRow("checksum failures: stored copies", "blocks_corrupt")
    yield CounterRow("checksum failures: arriving puts", "put_corrupt")
    yield from _refused(every)
    yield CounterRow("refused: leases", "leases_refused")
    yield from _connections()


def agent_rows(every: Sequence[Mapping[str, int]]) -> Iterator[CounterRow]:
    """What an agent has carried for others, loaded for its engines, and kept for them.

    Args:
        every: As of `daemon_rows`.
    """
    yield CounterRow("relayed: requests", "relay_requests")
    yield CounterRow("relayed: blocks", "relay_blocks")
    yield CounterRow("relayed: bytes out", "relay_bytes_out", format_size_bytes)
    yield CounterRow("relayed: refused, busy", "relay_refused_busy")
    yield CounterRow("own loads: requests", "own_requests")
    yield CounterRow("own loads: blocks", "own_blocks")
    yield CounterRow("own loads: bytes", "own_bytes", format_size_bytes)
    # What the agent has asked for itself, for whomever: each byte once.
    yield CounterRow("brought in: bytes direct", "storage_fetch_bytes_direct", format_size_bytes)
    yield CounterRow("brought in: bytes by relays", "storage_fetch_bytes_relay", format_size_bytes)
    yield CounterRow("brought in: bytes from peers", "storage_fetch_bytes_peer", format_size_bytes)
    yield CounterRow("brought in: blocks moved", "storage_blocks_moved")
    yield CounterRow("joined: blocks that were coming", "relay_joined")
    yield CounterRow("no room: blocks", "relay_no_room")
    yield CounterRow("peers: requests", "peer_requests")
    yield CounterRow("peers: blocks", "peer_blocks")
    yield CounterRow("peers: bytes out", "peer_bytes_out", format_size_bytes)
    yield CounterRow("offers for peers: bytes", "offer_bytes", format_size_bytes)
    yield CounterRow("kept for engines: claims", "claims")
    yield CounterRow("kept for engines: claims missed", "claims_missed")
    yield CounterRow("kept for engines: expired", "retentions_expired")
    yield CounterRow("kept for engines: refused", "retentions_refused")
    yield from _fetched()
    yield from _put()
    yield CounterRow("put: bytes for storage", "put_bytes", format_size_bytes)
    yield CounterRow("evicted: all", "evicted_blocks")
    yield CounterRow("checksum failures: readers' reports", "requests_corrupt_report")
    yield CounterRow("checksum failures: held copies", "blocks_corrupt")
    yield CounterRow("checksum failures: brought in", "storage_corrupt_blocks")
    yield CounterRow("checksum failures: arriving puts", "put_corrupt")
    yield from _refused(every)
    yield CounterRow("refused: readers of a pool", "readers_refused")
    yield from _connections()


def _fetched() -> Iterator[CounterRow]:
    for outcome in FetchOutcome:
        yield CounterRow(f"fetch: {outcome.name}", f"fetch_blocks_{outcome.name.lower()}")


def _put() -> Iterator[CounterRow]:
    for outcome in PutOutcome:
        yield CounterRow(f"put: {outcome.name}", f"put_blocks_{outcome.name.lower()}")


def _refused(every: Sequence[Mapping[str, int]]) -> Iterator[CounterRow]:
    yield CounterRow("refused: requests", "requests_refused")
    yield from _causes(every, "refused", "requests_refused_")


def _connections() -> Iterator[CounterRow]:
    yield CounterRow("refused: connections", "connections_refused")
    yield CounterRow("requests past their deadline", "requests_timed_out")
    yield CounterRow("requests whose client has gone", "requests_abandoned")
    yield CounterRow("connections that stalled", "connections_stalled")
    yield CounterRow("connections that broke", "connections_broken")


def _causes(every: Sequence[Mapping[str, int]], label: str, prefix: str) -> Iterator[CounterRow]:
    """Counters that split another one; nodes name the causes."""
    names = {name for found in every for name in found if name.startswith(prefix)}
    for name in sorted(names):
        yield CounterRow(f"{label}: {name.removeprefix(prefix)}", name)
