"""The library that inference engines link: KV-cache blocks at one or many daemons."""

from __future__ import annotations

from kvstore.errors import (
    Busy,
    ConfigError,
    KVStoreError,
    LayoutMismatch,
    LimitExceeded,
    LocalProtocolError,
    PermissionDenied,
    ProtocolError,
    RefusedError,
    TransportError,
    TransportTimeout,
    UnknownNamespace,
)
from kvstore.layout import Layout
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    AckLevel,
    FetchOutcome,
    GenerationInfo,
    Order,
    PoolInfo,
    PutOutcome,
    ServedBy,
    Status,
    Tier,
)
from kvstore_client.agent.agent import Agent
from kvstore_client.agent.options import AgentOptions
from kvstore_client.aio import AsyncClient
from kvstore_client.client import Client
from kvstore_client.handles import (
    AsyncFetchHandle,
    AsyncPutHandle,
    Claimed,
    FetchHandle,
    FetchResult,
    Lease,
    LookupResult,
    PutHandle,
    PutResult,
    Run,
)
from kvstore_client.memory import Region
from kvstore_client.namespaces import Namespace
from kvstore_client.views import Views

__all__ = [
    "AckLevel",
    "Agent",
    "AgentOptions",
    "AsyncClient",
    "AsyncFetchHandle",
    "AsyncPutHandle",
    "Busy",
    "Claimed",
    "Client",
    "ConfigError",
    "FetchHandle",
    "FetchOutcome",
    "FetchResult",
    "GenerationInfo",
    "KVStoreError",
    "Layout",
    "LayoutMismatch",
    "Lease",
    "LimitExceeded",
    "LoadReport",
    "LocalProtocolError",
    "LookupResult",
    "Namespace",
    "Order",
    "PermissionDenied",
    "PoolInfo",
    "ProtocolError",
    "PutHandle",
    "PutOutcome",
    "PutResult",
    "RefusedError",
    "Region",
    "Run",
    "ServedBy",
    "Status",
    "Tier",
    "TransportError",
    "TransportTimeout",
    "UnknownNamespace",
    "Views",
]
