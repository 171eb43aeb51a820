"""Which ports are used, in which order, and by which gid."""

from __future__ import annotations

import pytest

from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.rdma_rails import COMPLETIONS_MAX, choose_rails, place_rails
from kvstore.transport.verbs import DeviceInfo, Gid, NoDevice, PortInfo, RailSetup

LOCAL = Gid(0, "fe80::1", "RoCE v2")
V1 = Gid(1, "::ffff:10.0.0.1", "RoCE v1")
V2 = Gid(3, "::ffff:10.0.0.1", "RoCE v2")
SIX = Gid(5, "fd77::1", "RoCE v2")
IB = Gid(0, "fe80::506b:4b03:1", "IB")
NONE = Gid(7, "::", "RoCE v2")


def port(*gids: Gid, number: int = 1, active: bool = True, link: str = "Ethernet") -> PortInfo:
    """A port with these gids."""
    return PortInfo(number, active, link, 4, 4096, "eth0", gids)


def chosen(
    *devices: DeviceInfo, local_address: str | None = None, **options: object
) -> list[tuple[str, int, int]]:
    """Device, port and gid of each rail."""
    rails = choose_rails(devices, RdmaOptions(**options), local_address)  # type: ignore[arg-type]
    assert all(rail.completions_max == COMPLETIONS_MAX for rail in rails)
    return [rail[:3] for rail in rails]


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        ((LOCAL, V1, V2, SIX, NONE), 3),
        ((LOCAL, V1, SIX), 5),
        ((V1, LOCAL, NONE), 0),
        ((V1, IB._replace(number=9)), 1),
        ((NONE, IB), 0),
        ((NONE, SIX._replace(kind="", number=2)), 2),
        ((SIX._replace(number=8), SIX), 5),
    ],
)
def test_best_gid_is_found(gids: tuple[Gid, ...], index: int) -> None:
    assert chosen(DeviceInfo("a", (port(*gids),))) == [("a", 1, index)]


def test_infiniband_needs_no_gid_and_ethernet_does() -> None:
    devices = (
        DeviceInfo("ib0", (port(NONE, link="InfiniBand"),)),
        DeviceInfo("eth0", (port(NONE),)),
        DeviceInfo("ib1", (port(IB, link="InfiniBand"),)),
    )
    assert chosen(*devices) == [("ib0", 1, -1), ("ib1", 1, 0)]


def test_ports_are_sorted_as_people_count_and_those_that_are_down_are_left_out() -> None:
    devices = [
        DeviceInfo("mlx5_10", (port(V2),)),
        DeviceInfo("mlx5_2", (port(V2, number=2), port(V2, number=1))),
        DeviceInfo("mlx5_1", (port(V2, active=False),)),
    ]
    expected = [("mlx5_2", 1, 3), ("mlx5_2", 2, 3), ("mlx5_10", 1, 3)]
    assert chosen(*devices) == expected
    assert chosen(*reversed(devices)) == expected
    assert chosen(*devices, rails_max=2) == expected[:2]


def test_named_devices_come_in_their_order() -> None:
    devices = (
        DeviceInfo("a", (port(V2), port(V2, number=2))),
        DeviceInfo("b", (port(V2),)),
        DeviceInfo("c", (port(V2, active=False),)),
    )
    assert chosen(*devices, devices=("b", "a:2")) == [("b", 1, 3), ("a", 2, 3)]
    assert chosen(*devices, devices=("c", "a:2", "a")) == [("a", 2, 3), ("a", 1, 3)]
    # It is as it was named, whichever of them the peer is reached by.
    two = ("b", "a:2")
    assert chosen(*devices, devices=two, local_address="10.0.0.1") == [("b", 1, 3), ("a", 2, 3)]
    for text in ("nope", "b:2"):
        with pytest.raises(NoDevice, match=f"no RDMA device or port '{text}'; there are: a:1"):
            chosen(*devices, devices=(text,))
    with pytest.raises(NoDevice, match=r"no RDMA port of c is up; there are: .*c:1 \(down"):
        chosen(*devices, devices=("c",))


def test_named_devices_keep_their_places() -> None:
    devices = (
        DeviceInfo("a", (port(V2),)),
        DeviceInfo("b", (port(V2, active=False),)),
        DeviceInfo("c", (port(LOCAL._replace(address="::")),)),
    )
    options = RdmaOptions(devices=("b", "nope", "c", "a"))
    *absent, last = place_rails(devices, options)
    assert last == RailSetup("a", 1, 3, COMPLETIONS_MAX)
    for error, text in zip(absent, ("b:1: the port is down", "'nope'", "c:1: no gid"), strict=True):
        assert isinstance(error, NoDevice)
        assert text in str(error)
    with pytest.raises(NoDevice, match="no RDMA port of b, nope is up"):
        place_rails(devices, RdmaOptions(devices=("b", "nope")))
    assert place_rails(devices, RdmaOptions()) == [last]


def test_given_gid_is_taken_where_it_is() -> None:
    devices = (
        DeviceInfo("a", (port(LOCAL, V2),)),
        DeviceInfo("b", (port(LOCAL, SIX),)),
        DeviceInfo("ib", (port(link="InfiniBand"),)),
    )
    assert chosen(*devices, gid_index=5) == [("b", 1, 5)]
    assert chosen(*devices, gid_index=0) == [("a", 1, 0), ("b", 1, 0)]
    with pytest.raises(NoDevice, match="is up with gid 9"):
        chosen(*devices, gid_index=9)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.2", [("b", 1, 4), ("a", 1, 3)]),
        ("10.0.0.1", [("a", 1, 3), ("b", 1, 4)]),
        ("::ffff:10.0.0.2", [("b", 1, 4), ("a", 1, 3)]),
        ("fd77::2", [("b", 1, 6), ("a", 1, 3)]),
        ("fe80::1%eth0", [("a", 1, 0), ("b", 1, 4)]),
        ("10.0.0.9", [("a", 1, 3), ("b", 1, 4)]),
        ("host.example", [("a", 1, 3), ("b", 1, 4)]),
        ("", [("a", 1, 3), ("b", 1, 4)]),
    ],
)
def test_port_that_the_peer_is_reached_by_comes_first(
    address: str, expected: list[tuple[str, int, int]]
) -> None:
    devices = (
        DeviceInfo("a", (port(LOCAL, V1, V2, SIX),)),
        DeviceInfo(
            "b", (port(Gid(4, "::ffff:10.0.0.2", "RoCE v2"), Gid(6, "fd77::2", "RoCE v2")),)
        ),
    )
    assert chosen(*devices, local_address=address) == expected


def test_no_device_at_all() -> None:
    with pytest.raises(NoDevice, match="no RDMA port is up; there are: none"):
        chosen()
