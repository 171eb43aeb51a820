"""Shaped links for tests: skipped where the machine has none, and bulk streams over them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore_bench.shaped import MBIT, Link, Node, NodePlan, ShapedNetwork, ShapingUnavailable

BULK = "kvstore_bench.shaped.bulk"
BULK_TIMEOUT_S = 60.0


@cache
def _missing() -> str:
    try:
        with ShapedNetwork([NodePlan("probe", {"probe": 100 * MBIT})]):
            return ""
    except ShapingUnavailable as error:
        return str(error)


def require_shaping() -> None:
    """Skip the test, with the reason, where links cannot be shaped."""
    if _missing():
        pytest.skip(_missing())


class Bulk(NamedTuple):
    """How one stream went: bytes and seconds at its receiver, and what links carried meanwhile.

    Attributes:
        sent_bytes: By the counter of the sender's end.
        received_bytes: By the counter of the receiver's end.
    """

    size_bytes: int
    seconds: float
    sent_bytes: int
    received_bytes: int

    def share(self, rate_Bps: float) -> float:
        """Of a rate, what the receiver's link carried."""
        return self.received_bytes / self.seconds / rate_Bps


class BulkStream:
    """One TCP stream from one node to another, under way."""

    def __init__(self, source: Node, target: Node, network: str, port: int = 5001) -> None:
        self.links: tuple[Link, Link] = (source.links[network], target.links[network])
        self._source, self._target = source, target
        self._where = f"{target.address(network)}:{port}"

    async def start(self, size_bytes: int) -> BulkStream:
        """Begin to send that many bytes."""
        self._before = [link.counters() for link in self.links]
        self._lines: list[str] = []
        self._receiver = await self._target.serve(BULK, ["receive", self._where], self._lines)
        self._sent: list[str] = []
        arguments = ["send", self._where, str(size_bytes)]
        self._sender = await self._source.start(BULK, arguments, self._sent.append)
        return self

    def received_bytes(self) -> int:
        """What the receiver's link has carried towards it so far."""
        return self.links[1].counters().received_bytes - self._before[1].received_bytes

    async def end(self) -> Bulk:
        """Wait until all has arrived."""
        await self._source.answer_of(self._sender, self._sent, BULK_TIMEOUT_S)
        found = await self._target.answer_of(self._receiver, self._lines, BULK_TIMEOUT_S)
        source, target = (link.counters() for link in self.links)
        return Bulk(
            found["bytes"],
            found["seconds"],
            source.sent_bytes - self._before[0].sent_bytes,
            target.received_bytes - self._before[1].received_bytes,
        )


async def bulk(source: Node, target: Node, network: str, size_bytes: int) -> Bulk:
    """Send one stream and wait for it."""
    return await (await BulkStream(source, target, network).start(size_bytes)).end()


def host_interfaces() -> set[str]:
    """Names of the network interfaces of this process's own namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return {line.partition(":")[0].strip() for line in lines if ":" in line}


def named_namespaces() -> set[str]:
    """Namespaces that `ip netns` would list."""
    directory = Path("/run/netns")
    return set(os.listdir(directory)) if directory.exists() else set()


def network_of(pid: int) -> str:
    """The network namespace of a process; empty if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def processes_in(networks: set[str]) -> list[int]:
    """Processes that run in one of these network namespaces."""
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if network_of(pid) in networks]
