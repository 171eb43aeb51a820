"""What an operator may say about RDMA, and the checks of it. Pure.

What is left out is found: devices, gid and mtu by `kvstore.transport.rdma_rails`.
"""

from __future__ import annotations

import msgspec

from kvstore.errors import ConfigError
from kvstore.memorymessages import RAILS_MAX
from kvstore.transport.verbs import QueueTuning

MTUS = (256, 512, 1024, 2048, 4096)
# The address of a peer has 8 bits for it: `sgid_index` of `ibv_global_route`. Tables may be longer.
GID_INDEX_MAX = 255
# An hour stands for "never", and a mistake in the unit is seen.
STALL_S_MAX = 3600.0


class RdmaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How this process uses RDMA.

    Attributes:
        devices: "device" or "device:port", in the order in which they are rails; empty for all
            ports that are up.
        gid_index: Entry of the gid table, the same on all ports; -1 to find one.
        mtu_bytes: The largest packet; 0 for what the port has, which both sides then bring
            down to the smaller one.
        service_level: Which lanes and buffers switches use (InfiniBand), or the priority of
            frames (RoCE with VLANs).
        traffic_class: The byte of the IP header of RoCE v2: DSCP * 4. 0 is best effort; where
            a lossless class was set up for RDMA, its number.
        timeout: A packet that was not acknowledged is sent again after 4.096 us * 2**timeout:
            67 ms by default, far above what a switch can hold back.
        retry_count: How often that is done: 0.5 s by default until a peer counts as gone. 7
            means for ever on some devices and is not allowed.
        rnr_retry: How often news is sent again for which the peer had no receive. 7 is for
            ever, which is right here: `stall_s` ends it.
        min_rnr_timer: How long the peer waits then, a code of the InfiniBand specification: 12
            is 0.64 ms, in which many receives are posted again.
        stall_s: When nothing completes for so long while something should, the queue pair is
            given up, whatever the device still hopes for. Above the 0.5 s of `retry_count`, so
            that the device says first what is wrong; below the deadlines of most requests.
        rails_max: Ports that are used at most.
    """

    devices: tuple[str, ...] = ()
    gid_index: int = -1
    mtu_bytes: int = 0
    service_level: int = 0
    traffic_class: int = 0
    timeout: int = 14
    retry_count: int = 6
    rnr_retry: int = 7
    min_rnr_timer: int = 12
    stall_s: float = 2.0
    rails_max: int = RAILS_MAX

    def tuning(self, reads_max: int) -> QueueTuning:
        """What a queue pair is told, on a device that has so many READs under way."""
        return QueueTuning(
            service_level=self.service_level,
            traffic_class=self.traffic_class,
            timeout=self.timeout,
            retry_count=self.retry_count,
            rnr_retry=self.rnr_retry,
            min_rnr_timer=self.min_rnr_timer,
            reads_max=reads_max,
        )


def parse_device(text: str) -> tuple[str, int]:
    """Name and port of a device; port 0 for all of its ports.

    Raises:
        ConfigError: It is neither "device" nor "device:port".
    """
    name, colon, port = text.partition(":")
    if not name or (colon and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 255)):
        raise ConfigError("devices", text, "must be a device or device:port, as in mlx5_0:1")
    return name, int(port or 0)


def check_rdma_options(options: RdmaOptions) -> RdmaOptions:
    """The options, if they can be.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    for text in options.devices:
        parse_device(text)
        if options.devices.count(text) > 1:
            raise ConfigError("devices", text, "must be given once")
    for name, least, most in (
        ("gid_index", -1, GID_INDEX_MAX),
        ("service_level", 0, 15),
        ("traffic_class", 0, 255),
        ("timeout", 1, 31),
        ("retry_count", 0, 6),
        ("rnr_retry", 0, 7),
        ("min_rnr_timer", 0, 31),
        ("rails_max", 1, RAILS_MAX),
    ):
        value = getattr(options, name)
        if not least <= value <= most:
            raise ConfigError(name, value, f"must be a whole number from {least} to {most}")
    if options.mtu_bytes not in (0, *MTUS):
        raise ConfigError(
            "mtu_bytes", options.mtu_bytes, f"must be 0 (the port's) or one of {MTUS}"
        )
    if not 0 < options.stall_s <= STALL_S_MAX:
        raise ConfigError(
            "stall_s", options.stall_s, f"must be above 0 and at most {STALL_S_MAX:g}"
        )
    return options


__all__ = ["GID_INDEX_MAX", "MTUS", "RdmaOptions", "check_rdma_options", "parse_device"]
