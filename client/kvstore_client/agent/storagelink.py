"""What an agent reports of its node's storage link, which no listener of its own sees."""

from __future__ import annotations

from kvstore.loadreport import LinkLoad
from kvstore.rates import CapacityEstimator, RateEstimator
from kvstore_client.selector import PathMeter
from kvstore_client.selector.estimates import STORAGE_LINK
from kvstore_client.selector.gain import GainMeter


class StorageMeter(PathMeter):
    """The meter of the path direct, which counts what has come besides.

    Attributes:
        arrived_bytes: All that has come from daemons since the beginning.
    """

    __slots__ = ("arrived_bytes",)

    def __init__(self, gain: GainMeter) -> None:
        super().__init__(gain)
        self.arrived_bytes = 0

    def arrived(self, now: float, size_bytes: int) -> None:
        self.arrived_bytes += size_bytes
        super().arrived(now, size_bytes)


class StorageLink:
    """Queue, rate and capacity of the link that blocks come by.

    Args:
        meter: Is told of all that is asked for and comes by it.
        now: Seconds of a monotonic clock.
    """

    def __init__(self, meter: StorageMeter, now: float) -> None:
        self._meter = meter
        self._rate = RateEstimator()
        self._capacity = CapacityEstimator()
        self._sampled_at = now
        self._sampled_bytes = 0
        self._busy = False

    def sample(self, now: float) -> LinkLoad:
        """The load at this moment; called for each report."""
        meter = self._meter
        elapsed_s, self._sampled_at = now - self._sampled_at, now
        came_bytes = meter.arrived_bytes - self._sampled_bytes
        self._sampled_bytes = meter.arrived_bytes
        busy = meter.inflight_bytes > 0
        self._rate.add(now, came_bytes)
        # Bytes that were awaited at both ends of the time are taken to have been throughout.
        self._capacity.add(elapsed_s, came_bytes, self._busy and busy)
        self._busy = busy
        rate_Bps, capacity_Bps = self._rate.rate_Bps(now), self._capacity.capacity_Bps
        return LinkLoad(
            name=STORAGE_LINK,
            # What is seen can be carried, also where the link is never busy for a whole window.
            capacity_Bps=round(max(capacity_Bps, rate_Bps)) if capacity_Bps else 0,
            sent_Bps=round(rate_Bps),
            queued_bytes=meter.inflight_bytes,
        )


__all__ = ["StorageLink", "StorageMeter"]
