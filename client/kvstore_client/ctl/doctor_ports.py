"""What must be so of the ports that RDMA is to use: facts in, findings out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.rdma_rails import choose_rails
from kvstore.transport.verbs import DeviceInfo, Gid, NoDevice, PortInfo, RailSetup
from kvstore_client.ctl.doctor_findings import Finding, Verdict
from kvstore_client.ctl.doctor_rdma_facts import Library, PortState, RdmaFacts, rails_of

# The largest packet of RDMA, and what an interface must let pass for it: the kernel counts 96
# bytes for headers (`iboe_get_mtu` of its rdma/ib_addr.h).
MTU_BYTES_MAX = 4096
NETDEV_MTU_BYTES = 4200

_ETHERNET = "Ethernet"
# As sysfs says it of a port.
_INITIALIZING = "INIT"


def check_ports(facts: RdmaFacts) -> Iterator[Finding]:
    """For each port: whether it is up, by which gid it would be used, and its mtu."""
    ports = [(device, port) for device in facts.devices for port in device.ports]
    any_active = any(port.active for _, port in ports)
    named = {text.partition(":")[0] for text in facts.options.devices}
    states = {state.name: state for state in facts.states}
    for device, port in ports:
        if named and device.name not in named:
            continue
        label = f"{device.name}:{port.number}"
        state = states.get(label, PortState(label))
        link = port.link_layer + (f", {port.netdev}" if port.netdev else "")
        if not port.active:
            bad = bool(named) or not any_active
            yield Finding(
                f"port {label}",
                Verdict.FAILED if bad else Verdict.WARNING,
                f"{state.state or 'not active'} ({link})",
                _wake(port, state),
                values={"netdev": port.netdev, "link_layer": port.link_layer},
            )
            continue
        yield Finding(
            f"port {label}",
            Verdict.OK,
            f"active ({link})",
            values={"netdev": port.netdev, "link_layer": port.link_layer},
        )
        yield _check_gid(device.name, port, facts)
        yield _check_mtu(label, port, state)


def _wake(port: PortInfo, state: PortState) -> str:
    if port.link_layer != _ETHERNET:
        if state.state == _INITIALIZING:
            return "the network has no subnet manager: systemctl start opensm, on one host of it"
        return "look at the cable and at the switch: ibstat"
    netdev = port.netdev or "INTERFACE"
    return f"ip link set {netdev} up; if it is, look at the cable: ethtool {netdev}"


def _check_gid(device: str, port: PortInfo, facts: RdmaFacts) -> Finding:
    name = f"gid {device}:{port.number}"
    alone = DeviceInfo(device, (port,))
    options = RdmaOptions(gid_index=facts.options.gid_index)
    netdev = port.netdev or "INTERFACE"
    address = f"ip address add ADDRESS/LENGTH dev {netdev}"
    try:
        (setup,) = choose_rails([alone], options, facts.local_address or None)
    except NoDevice:
        there = ", ".join(f"{gid.number} ({gid.address}, {gid.kind})" for gid in port.gids)
        if facts.options.gid_index >= 0:
            found = (
                f"gid_index={facts.options.gid_index} is not there; there are: {there or 'none'}"
            )
            return Finding(name, Verdict.FAILED, found, "leave gid_index out, or name one of these")
        return Finding(name, Verdict.FAILED, f"{netdev} has no address", address)
    if setup.gid_index < 0:
        return Finding(
            name, Verdict.OK, "none is needed: peers go by the lid", values={"index": -1}
        )
    gid = next(gid for gid in port.gids if gid.number == setup.gid_index)
    found = f"index {gid.number}: {gid.address}, {gid.kind or 'kind unknown'}"
    values = {"index": gid.number, "gid": gid.address, "kind": gid.kind}
    verdict, remedy = Verdict.OK, ""
    if port.link_layer == _ETHERNET:
        doubt, remedy = _doubt(gid, address)
        if doubt:
            verdict, found = Verdict.WARNING, f"{found}: {doubt}"
    return Finding(name, verdict, found, remedy, values=values)


def _doubt(gid: Gid, address: str) -> tuple[str, str]:
    """What speaks against a gid of Ethernet, and the remedy."""
    if gid.kind == "RoCE v1":
        return (
            "version 1 is not routed, and fails with a peer that uses version 2",
            "enable RoCE v2 at the adapter (its vendor's tool), or use another port",
        )
    if gid.address.lower().startswith("fe80:"):
        return "it reaches its own Ethernet alone", address
    return "", ""


def _check_mtu(label: str, port: PortInfo, state: PortState) -> Finding:
    name = f"mtu {label}"
    values = {"mtu_bytes": port.mtu_bytes, "netdev_mtu_bytes": state.netdev_mtu_bytes}
    if not port.mtu_bytes:
        return Finding(name, Verdict.NOT_CHECKED, "not known without pyverbs", values=values)
    found = f"{port.mtu_bytes} bytes"
    if port.mtu_bytes >= MTU_BYTES_MAX:
        return Finding(name, Verdict.OK, found, values=values)
    if port.link_layer != _ETHERNET:
        found += ", as the subnet manager has set it"
        return Finding(name, Verdict.OK, found, values=values)
    if state.netdev_mtu_bytes >= NETDEV_MTU_BYTES:
        found += f", the most that the device does ({port.netdev} has {state.netdev_mtu_bytes})"
        return Finding(name, Verdict.OK, found, values=values)
    netdev = port.netdev or "INTERFACE"
    has = f"{netdev} has {state.netdev_mtu_bytes}" if state.netdev_mtu_bytes else f"by {netdev}"
    return Finding(
        name,
        Verdict.WARNING,
        f"{found}, since {has}: more packets and interrupts than with {MTU_BYTES_MAX}",
        f"ip link set {netdev} mtu {NETDEV_MTU_BYTES}, on all hosts, where the switches let it"
        " pass",
        values=values,
    )


def check_rails(facts: RdmaFacts) -> Iterator[Finding]:
    """Which ports a connection would use."""
    if facts.idle or not facts.devices:
        return
    rails, error = rails_of(facts)
    if not rails:
        yield Finding("rails", Verdict.FAILED, error, "see the ports and gids above")
        return
    names = [f"{rail.device}:{rail.port}" for rail in rails]
    found, verdict, remedy = ", ".join(names), Verdict.OK, ""
    if facts.library.state is not Library.LOADS:
        found, verdict = f"{found}, as soon as pyverbs loads", Verdict.NOT_CHECKED
    elif facts.local_address and not _has_address(facts, rails[0]):
        verdict = Verdict.WARNING
        found = (
            f"{found}; the peer is reached from {facts.local_address}, which is no address of"
            " these ports: whether they reach it, the transfer shows"
        )
        remedy = "name the peer by its address in the network of the RDMA ports"
    yield Finding("rails", verdict, found, remedy, values={"rails": names})


def _has_address(facts: RdmaFacts, rail: RailSetup) -> bool:
    if facts.local_address.startswith("127.") or facts.local_address == "::1":
        return True  # the peer is here: any port will do
    for device in facts.devices:
        for port in device.ports:
            if (device.name, port.number) == (rail.device, rail.port):
                if port.link_layer != _ETHERNET:
                    return True  # IP over InfiniBand has addresses of its own
                own = re.sub(r"%.*", "", facts.local_address.lower())
                texts = {gid.address.lower().removeprefix("::ffff:") for gid in port.gids}
                return own.removeprefix("::ffff:") in texts
    return False


__all__ = ["MTU_BYTES_MAX", "NETDEV_MTU_BYTES", "check_ports", "check_rails"]
