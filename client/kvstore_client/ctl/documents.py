"""What `--json` writes: names that stay, and every field present, whatever its value. Pure.

What a document holds beyond a command's own names is a load report or a status as it crosses
the wire (`kvstore.loadreport`, `kvstore.messages`), under the names that it has there.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvstore_client.ctl.panels import Node

# JSON format history:
#   1  the first
FORMAT = 1

REPORT_NAMES = """\
report: seq, interval_ms, boot_id (hexadecimal), state (STARTING, READY, DRAINING, DEGRADED),
  links [name, capacity_Bps (0: unknown), sent_Bps, queued_bytes], requesters [node_id,
  queued_bytes, inflight_requests] (all that wait), disk {queued_bytes, read_Bps,
  service_ms_p50, service_ms_p99}, buffers {free_bytes, total_bytes}, relay_queued_bytes,
  willing, node_id"""


def document(nodes: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    """The outermost object of every command."""
    return {"format": FORMAT, **fields, "nodes": list(nodes)}


def as_line(value: Mapping[str, Any]) -> str:
    """A document on one line, for those that come one after the other."""
    return json.dumps(value) + "\n"


def as_text(value: Mapping[str, Any]) -> str:
    """A document that comes alone, to be read by people too."""
    return json.dumps(value, indent=2) + "\n"


def report_of(node: Node) -> dict[str, Any] | None:
    """A node's load report, with all requesters that wait."""
    if node.report is None:
        return None
    return dict(builtins(msgspec.structs.replace(node.report, requesters=node.requesters)))


def status_of(node: Node) -> dict[str, Any]:
    """A node as `kvctl status` tells of it; null for what it did not say."""
    status = node.status
    return {
        "endpoint": node.endpoint,
        "error": node.error or None,
        "node_id": status.node_id if status else None,
        "version": status.version if status else None,
        "role": str(status.role) if status else None,
        "uptime_s": status.uptime_s if status else None,
        "report": report_of(node),
        "counters": dict(sorted(status.counters.items())) if status else None,
    }


def live_of(node: Node) -> dict[str, Any]:
    """A node as `kvctl top` tells of it; null for what is not known."""
    return {
        "endpoint": node.endpoint,
        "error": node.error or None,
        "node_id": node.node_id or None,
        "role": str(node.role) if node.role else None,
        "age_s": None if math.isinf(node.age_s) else node.age_s,
        "freshness": str(node.freshness),
        "report": report_of(node),
    }


def builtins(value: Any) -> Any:
    """A message as what JSON has; unlike on the wire, fields with default values are there."""
    if isinstance(value, msgspec.Struct):
        return {name: builtins(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [builtins(item) for item in value]
    if isinstance(value, dict):
        return {str(name): builtins(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, enum.StrEnum) else value
