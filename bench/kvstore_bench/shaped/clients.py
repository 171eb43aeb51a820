"""Clients by policy, for measurements: the selector's own policies, and all by the relay."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from kvstore.errors import KVStoreError
from kvstore.loadreport import ReportTable
from kvstore_bench.relayed import POLICY, relay_all
from kvstore_client import AsyncClient
from kvstore_client.selector import Policy

DIRECT = Policy.DIRECT.value
# No policy of the product: what a measurement of the relay alone needs.
RELAY = "relay"
POLICIES = (*(policy.value for policy in Policy), RELAY)


def relays_supported() -> bool:
    """Whether the client of this installation can use relays."""
    return "relays" in inspect.signature(AsyncClient.__init__).parameters


async def start_client(
    policy: str,
    endpoints: Sequence[str],
    relays: Sequence[str],
    node_id: str,
    reports: ReportTable | None = None,
) -> AsyncClient:
    """A client of one policy, connected to all daemons.

    Args:
        reports: Takes the load reports instead of a table of its own; for policies that choose
            no relays.

    Raises:
        KVStoreError: A daemon does not answer, or the policy needs relays and this client has
            none; with `RELAY`, the relay does not answer.
    """
    if policy != DIRECT and not relays_supported():
        raise KVStoreError(f"policy {policy}: this client knows no relays")
    options: dict[str, Any] = {}
    if policy != DIRECT:
        options["relays"] = list(relays)
        options["policy"] = POLICY if policy == RELAY else policy
    client = AsyncClient(list(endpoints), node_id=node_id, **options)
    if reports is not None:
        client.cluster.reports = reports
    await client.start()
    try:
        for endpoint, status in (await client.status()).items():
            if isinstance(status, Exception):
                raise KVStoreError(f"{endpoint}: {status}")
        if policy == RELAY:
            relay_all(client)
    except BaseException:
        await client.close()
        raise
    return client


__all__ = ["DIRECT", "POLICIES", "RELAY", "relays_supported", "start_client"]
