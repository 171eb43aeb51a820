"""Which ports of which devices are used, and by which gid. Pure.

A gid names a port to its peers. A RoCE port has several for each of its IP addresses; what
tells them apart is how packets look: RoCE v2 is UDP and is routed, v1 stays on its Ethernet.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TypeAlias

from kvstore.transport.rdma_options import GID_INDEX_MAX, RdmaOptions, parse_device
from kvstore.transport.verbs import (
    Completion,
    DeviceInfo,
    Gid,
    MemoryRegion,
    NoDevice,
    PortInfo,
    QueuePair,
    QueueSetup,
    Rail,
    RailSetup,
    VerbsError,
)

# 64 bytes each on most devices: 4 MiB of locked memory a rail, and 128 sessions of a server.
COMPLETIONS_MAX = 65536

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def choose_rails(
    devices: Sequence[DeviceInfo], options: RdmaOptions, local_address: str | None = None
) -> list[RailSetup]:
    """The rails of this process, in their order; raises and takes as `place_rails`."""
    placed = place_rails(devices, options, local_address)
    return [setup for setup in placed if isinstance(setup, RailSetup)]


def place_rails(
    devices: Sequence[DeviceInfo], options: RdmaOptions, local_address: str | None = None
) -> list[RailSetup | NoDevice]:
    """The rails of this process, each in its place.

    Those that an operator names keep their places, whatever is the matter with one of them: rail
    i of one end talks to rail i of the other.

    Args:
        devices: Those there are.
        local_address: Our IP address towards the peers: where no devices are named the port that
            has it comes first, by this address, and then the others.

    Returns:
        How a rail is used, or why a named one cannot be.

    Raises:
        NoDevice: None can be used; says which there are.
    """
    near = _address(local_address or "")
    placed: list[RailSetup | NoDevice]
    if options.devices:
        named = _named(devices, options)
        unknown = [one for one in named if isinstance(one, NoDevice)]
        if len(unknown) == len(named):
            raise unknown[0]
        placed = [
            one if isinstance(one, NoDevice) else _setup(*one, options.gid_index, near)
            for one in named
        ]
    else:
        found = [
            (_is_near(port, options.gid_index, near), _setup(device, port, options.gid_index, near))
            for device in sorted(devices, key=lambda one: _natural(one.name))
            for port in sorted(device.ports)
        ]
        found.sort(key=lambda one: not one[0])  # stable
        placed = [setup for _, setup in found if isinstance(setup, RailSetup)]
    placed = placed[: options.rails_max]
    if not any(isinstance(one, RailSetup) for one in placed):
        wanted = f" of {', '.join(options.devices)}" if options.devices else ""
        gid_text = f" with gid {options.gid_index}" if options.gid_index >= 0 else ""
        raise NoDevice(f"no RDMA port{wanted} is up{gid_text}; there are: {_described(devices)}")
    return placed


def _setup(
    device: DeviceInfo, port: PortInfo, gid_index: int, near: IpAddress | None
) -> RailSetup | NoDevice:
    """How a port is used, or why not."""
    gid = _choose_gid(port, gid_index, near)
    if not port.active:
        return NoDevice(f"{device.name}:{port.number}: the port is down")
    if gid is not None or (port.link_layer == "InfiniBand" and gid_index < 0):
        index = -1 if gid is None else gid.number
        return RailSetup(device.name, port.number, index, COMPLETIONS_MAX)
    return NoDevice(f"{device.name}:{port.number}: no gid that can be used")


def _is_near(port: PortInfo, gid_index: int, near: IpAddress | None) -> bool:
    gid = _choose_gid(port, gid_index, near)
    return gid is not None and near is not None and _address(gid.address) == near


def _named(
    devices: Sequence[DeviceInfo], options: RdmaOptions
) -> list[tuple[DeviceInfo, PortInfo] | NoDevice]:
    """Ports that an operator names, in order; or that there is no such."""
    there = [(device, port) for device in devices for port in sorted(device.ports)]
    chosen: list[tuple[DeviceInfo, PortInfo] | NoDevice] = []
    for text in options.devices:
        name, number = parse_device(text)
        named = [
            (device, port)
            for device, port in there
            if device.name == name and number in (0, port.number)
        ]
        if not named:
            described = _described(devices)
            chosen.append(NoDevice(f"no RDMA device or port {text!r}; there are: {described}"))
        chosen += [one for one in named if one not in chosen]
    return chosen


def _choose_gid(port: PortInfo, index: int, near: IpAddress | None) -> Gid | None:
    gids = [
        gid for gid in port.gids if gid.address not in ("", "::") and gid.number <= GID_INDEX_MAX
    ]
    if index >= 0:
        return next((gid for gid in gids if gid.number == index), None)
    gids.sort(key=lambda gid: (near is None or _address(gid.address) != near, _rank(gid)))
    return gids[0] if gids else None


def _rank(gid: Gid) -> tuple[int, int]:
    """The lower, the better."""
    kinds = {"RoCE v2": 0, "RoCE v1": 3, "IB": 4}
    rank = kinds.get(gid.kind, 5)
    if gid.kind == "RoCE v2" and not gid.is_ipv4:
        rank += 2 if gid.address.lower().startswith("fe80:") else 1
    return rank, gid.number


class AbsentRail(Rail):
    """Keeps the place of a rail that cannot be used."""

    mtu_bytes = 0
    completions_max = pieces_max = reads_max = message_bytes_max = 0

    def __init__(self, name: str, why: VerbsError) -> None:
        self.name = name
        self.gid = ""
        self.closed = False
        self._why = why

    def fileno(self) -> int:
        raise self._why

    def register(
        self, address: int, length: int, *, remote_write: bool = False, remote_read: bool = False
    ) -> MemoryRegion:
        raise self._why

    def queue_pair(self, setup: QueueSetup) -> QueuePair:
        raise self._why

    def poll(self, count_max: int = 256) -> list[Completion]:
        raise self._why

    def failed(self) -> str:
        return str(self._why)

    def close(self) -> None:
        self.closed = True


def _address(text: str) -> IpAddress | None:
    """An IP address; one of version 4 within one of version 6 is the one of version 4."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts mlx5_2 before mlx5_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _described(devices: Sequence[DeviceInfo]) -> str:
    """All ports, for people."""
    return (
        ", ".join(
            f"{device.name}:{port.number} ({'up' if port.active else 'down'}, {port.link_layer},"
            f" {len(port.gids)} gids)"
            for device in devices
            for port in device.ports
        )
        or "none"
    )


__all__ = ["COMPLETIONS_MAX", "AbsentRail", "choose_rails", "place_rails"]
