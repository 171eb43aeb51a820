"""Which blocks go which way: a request and what is known of the paths make a plan.

Pure: reports, own meters, `now` and random draws come in, a plan goes out.
"""

from __future__ import annotations

from kvstore_client.selector.choice import DRAWS, Selector
from kvstore_client.selector.estimates import STORAGE_LINK
from kvstore_client.selector.inflight import Daemon, Inflight, PathMeter
from kvstore_client.selector.plans import Plan, PlannedRun, Policy, Request, Span

__all__ = [
    "DRAWS",
    "STORAGE_LINK",
    "Daemon",
    "Inflight",
    "PathMeter",
    "Plan",
    "PlannedRun",
    "Policy",
    "Request",
    "Selector",
    "Span",
]
