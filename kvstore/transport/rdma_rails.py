"""Which ports of which devices are used, and by which gid. Pure.

A gid names a port to its peers. A RoCE port has several for each of its IP addresses; what
tells them apart is how packets look: RoCE v2 is UDP and is routed, v1 stays on its Ethernet.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from kvstore.transport.rdma_options import RdmaOptions, parse_device
from kvstore.transport.verbs import DeviceInfo, Gid, NoDevice, PortInfo, RailSetup

# 64 bytes each on most devices: 4 MiB of locked memory a rail, and 128 sessions of a server.
COMPLETIONS_MAX = 65536


def choose_rails(
    devices: Sequence[DeviceInfo], options: RdmaOptions, local_address: str | None = None
) -> list[RailSetup]:
    """The rails of this process, in their order.

    Args:
        devices: Those there are.
        local_address: Our IP address towards the peers: the port that has it comes first, by
            this address, and then the others.

    Raises:
        NoDevice: None can be used; says which there are.
    """
    found: list[tuple[bool, RailSetup]] = []
    near = _address(local_address or "")
    for device, port in _ports(devices, options):
        if not port.active:
            continue
        gid = _choose_gid(port, options.gid_index, near)
        if gid is not None or (port.link_layer == "InfiniBand" and options.gid_index < 0):
            index = -1 if gid is None else gid.number
            is_near = gid is not None and near is not None and _address(gid.address) == near
            found.append((is_near, RailSetup(device.name, port.number, index, COMPLETIONS_MAX)))
    if not found:
        wanted = f" of {', '.join(options.devices)}" if options.devices else ""
        gid_text = f" with gid {options.gid_index}" if options.gid_index >= 0 else ""
        raise NoDevice(f"no RDMA port{wanted} is up{gid_text}; there are: {_described(devices)}")
    found.sort(key=lambda one: not one[0])  # stable
    return [setup for _, setup in found[: options.rails_max]]


def _ports(
    devices: Sequence[DeviceInfo], options: RdmaOptions
) -> list[tuple[DeviceInfo, PortInfo]]:
    """Ports that may be used, in order."""
    there = [
        (device, port)
        for device in sorted(devices, key=lambda one: _natural(one.name))
        for port in sorted(device.ports)
    ]
    if not options.devices:
        return there
    chosen: list[tuple[DeviceInfo, PortInfo]] = []
    for text in options.devices:
        name, number = parse_device(text)
        named = [
            (device, port)
            for device, port in there
            if device.name == name and number in (0, port.number)
        ]
        if not named:
            raise NoDevice(f"no RDMA device or port {text!r}; there are: {_described(devices)}")
        chosen += [one for one in named if one not in chosen]
    return chosen


def _choose_gid(
    port: PortInfo,
    index: int,
    near: ipaddress.IPv4Address | ipaddress.IPv6Address | None,
) -> Gid | None:
    gids = [gid for gid in port.gids if gid.address not in ("", "::")]
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


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
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


__all__ = ["COMPLETIONS_MAX", "choose_rails"]
