"""Endpoints: what is read, what is refused and with which words, and the way back to text."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, strategies as st

from kvstore.endpoint import UNIX_PATH_BYTES_MAX, Endpoint, parse_endpoint
from kvstore.errors import ConfigError

DEVICE = (("device", "mlx5_0"),)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://127.0.0.1:7450", Endpoint("tcp", "127.0.0.1", 7450)),
        ("tcp://0.0.0.0:0", Endpoint("tcp", "0.0.0.0", 0)),
        ("tcp://localhost:65535", Endpoint("tcp", "localhost", 65535)),
        ("tcp://Storage-1.Rack_2:1", Endpoint("tcp", "storage-1.rack_2", 1)),
        ("tcp://[::1]:7450", Endpoint("tcp", "::1", 7450)),
        ("tcp://[2001:DB8:0::1]:7450", Endpoint("tcp", "2001:db8::1", 7450)),
        ("tcp://[fe80::1%eth0]:7450", Endpoint("tcp", "fe80::1%eth0", 7450)),
        ("rdma://10.0.0.1:7450", Endpoint("rdma", "10.0.0.1", 7450)),
        ("rdma://10.0.0.1:7450?device=mlx5_0", Endpoint("rdma", "10.0.0.1", 7450, "", DEVICE)),
        ("unix:///run/kv store.sock", Endpoint("unix", path="/run/kv store.sock")),
        ("unix:///run/a?b#c%20", Endpoint("unix", path="/run/a?b#c%20")),
        ("unix://@kvstored", Endpoint("unix", path="@kvstored")),
        ("unix:///" + "a" * 106, Endpoint("unix", path="/" + "a" * 106)),
    ],
)
def test_reads(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "must be one of tcp://HOST:PORT"),
        ("127.0.0.1:7450", "must be one of"),
        ("udp://127.0.0.1:7450", "must be one of"),
        ("TCP://127.0.0.1:7450", "must be one of"),
        ("tcp://127.0.0.1", "needs a port: tcp://HOST:PORT"),
        ("tcp://[::1]", "needs a port"),
        ("tcp://127.0.0.1:", "port '' must be a number"),
        ("tcp://127.0.0.1:65536", "port '65536' must be a number from 0 to 65535"),
        ("tcp://127.0.0.1:-1", "port '-1' must be a number"),
        ("tcp://127.0.0.1:٣", "must be a number"),
        ("tcp://:7450", "host '' must be"),
        ("tcp://a b:7450", "host 'a b' must be"),
        ("tcp://user@host:7450", "must be a host name"),
        ("tcp://host/path:7450", "must be a host name"),
        ("tcp://" + "a" * 254 + ":1", "must be a host name"),
        ("tcp://1.2.3:7450", "no IPv4 address"),
        ("tcp://256.0.0.1:7450", "no IPv4 address"),
        ("tcp://::1:7450", "an IPv6 address needs brackets: [::1]"),
        ("tcp://[::g]:7450", "no IPv6 address"),
        ("tcp://[1.2.3.4]:7450", "no IPv6 address"),
        ("tcp://[fe80::1%a b]:7450", "no IPv6 address"),
        ("tcp://127.0.0.1:7450?device=mlx5_0", "option 'device': tcp endpoints take none"),
        ("rdma://127.0.0.1:7450?gid=3", "option 'gid': rdma endpoints take device"),
        ("rdma://127.0.0.1:7450?device=", "needs a value"),
        ("rdma://127.0.0.1:7450?device", "needs a value"),
        ("rdma://127.0.0.1:7450?device=a&device=b", "must be given once"),
        ("unix://relative.sock", "needs an absolute path"),
        ("unix://", "needs an absolute path"),
        ("unix:///", "needs an absolute path"),
        ("unix://@", "needs an absolute path"),
        ("unix:///a\nb", "printable"),
        ("unix:///a\0", "printable"),
        ("unix:///" + "a" * 107, "path of 108 bytes, a socket's has at most 107"),
        ("unix:///" + "ä" * 60, "path of 121 bytes"),
    ],
)
def test_refuses_and_says_what_would_be_right(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_endpoint(text, "--listen")
    assert caught.value.option == "--listen"
    assert caught.value.value == text
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.8.9.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://LOCALHOST:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://[::ffff:127.0.0.1]:1", True),
        ("rdma://127.0.0.1:1", True),
        ("unix:///run/x.sock", True),
        ("unix://@x", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://[::ffff:10.0.0.1]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://localhost.example.org:1", False),
        ("tcp://[fe80::1%eth0]:1", False),
    ],
)
def test_knows_what_only_this_host_can_reach(text: str, loopback: bool) -> None:
    assert parse_endpoint(text).is_loopback is loopback


def test_with_port_changes_the_port_alone() -> None:
    endpoint = parse_endpoint("rdma://[::1]:0?device=mlx5_0")
    assert endpoint.with_port(7450) == parse_endpoint("rdma://[::1]:7450?device=mlx5_0")
    assert endpoint.port == 0


def test_equal_endpoints_are_one_key() -> None:
    same = {parse_endpoint("tcp://[::1]:1"), parse_endpoint("tcp://[0:0::1]:1")}
    assert len(same) == 1


_NAMES = st.from_regex(
    r"[a-z]([a-z0-9_-]{0,20}[a-z0-9])?(\.[a-z][a-z0-9]{0,5}){0,3}", fullmatch=True
)
_HOSTS = st.one_of(
    _NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda address: f"[{address}]")
)
_PORTS = st.integers(0, 0xFFFF)
_DEVICES = st.text(string.ascii_letters + string.digits + "_-.:", min_size=1, max_size=20)
_PATHS = st.text(min_size=1, max_size=60).filter(
    lambda path: path.isprintable() and path != "/" and len(path.encode()) < UNIX_PATH_BYTES_MAX
)
_URIS = st.one_of(
    st.builds("tcp://{}:{}".format, _HOSTS, _PORTS),
    st.builds("rdma://{}:{}".format, _HOSTS, _PORTS),
    st.builds("rdma://{}:{}?device={}".format, _HOSTS, _PORTS, _DEVICES),
    st.builds("unix://{}{}".format, st.sampled_from("/@"), _PATHS),
)


@given(_URIS)
def test_text_of_an_endpoint_reads_as_the_same_endpoint(uri: str) -> None:
    endpoint = parse_endpoint(uri)
    assert parse_endpoint(str(endpoint)) == endpoint
    assert str(parse_endpoint(str(endpoint))) == str(endpoint)


@given(st.one_of(st.text(), st.builds("{}{}".format, _URIS, st.text(max_size=5))))
def test_any_text_is_an_endpoint_or_a_config_error(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except ConfigError:
        return
    assert parse_endpoint(str(endpoint)) == endpoint
