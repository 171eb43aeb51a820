"""The library that inference engines link: KV-cache blocks at one or many daemons."""

from __future__ import annotations

from kvstore.errors import (
    ConfigError,
    KVStoreError,
    LayoutMismatch,
    LocalProtocolError,
    ProtocolError,
    RefusedError,
    TransportError,
    TransportTimeout,
)
from kvstore.layout import Layout
from kvstore.messages import AckLevel, FetchOutcome, Order, PutOutcome, Tier
from kvstore_client.aio import AsyncClient
from kvstore_client.client import Client
from kvstore_client.handles import (
    AsyncFetchHandle,
    AsyncPutHandle,
    FetchHandle,
    FetchResult,
    Lease,
    LookupResult,
    PutHandle,
    PutResult,
    Run,
)
from kvstore_client.namespaces import Namespace

__all__ = [
    "AckLevel",
    "AsyncClient",
    "AsyncFetchHandle",
    "AsyncPutHandle",
    "Client",
    "ConfigError",
    "FetchHandle",
    "FetchOutcome",
    "FetchResult",
    "KVStoreError",
    "Layout",
    "LayoutMismatch",
    "Lease",
    "LocalProtocolError",
    "LookupResult",
    "Namespace",
    "Order",
    "ProtocolError",
    "PutHandle",
    "PutOutcome",
    "PutResult",
    "RefusedError",
    "Run",
    "Tier",
    "TransportError",
    "TransportTimeout",
]
