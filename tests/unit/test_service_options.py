"""Checks that daemon and agent share. Their values are tested through the two commands, too."""

from __future__ import annotations

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.messages import Channel, Hello, Role, decode, encode
from kvstore.protocol import hello_message
from kvstore.service.options import (
    NODE_ID_BYTES_MAX,
    check_drain_s,
    check_endpoints,
    check_log_level,
    check_node_id,
    check_pool_name,
    default_node_id,
    parse_memory_bytes,
    parse_number,
)


def test_endpoints_keep_their_order() -> None:
    texts = ["tcp://b:2", "tcp://a:1", "unix:///s"]
    found = check_endpoints(texts, "--x", ("tcp", "unix"), 3)
    assert [str(endpoint) for endpoint in found] == texts
    assert check_endpoints([], "--x", ("tcp",), 1) == ()


@pytest.mark.parametrize(
    ("texts", "value", "remedy"),
    [
        (["a:1"], "a:1", "must be one of tcp://HOST:PORT"),
        (["unix:///s"], "unix:///s", "scheme must be one of tcp"),
        (["tcp://a:1", "tcp://A:1"], "tcp://A:1", "must be given once"),
        (["tcp://a:1", "tcp://b:1", "tcp://c:1"], "tcp://c:1", "at most 2 may be given"),
    ],
)
def test_refuses_endpoints(texts: list[str], value: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_endpoints(texts, "--x", ("tcp",), 2)
    assert (caught.value.option, caught.value.value) == ("--x", value)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("uri", "node_id"),
    [
        ("tcp://127.0.0.1:7451", "host:7451"),
        ("unix:///run/kv.sock", "host:/run/kv.sock"),
        ("tcp://127.0.0.1:0", "host:pid9"),
    ],
)
def test_processes_of_one_host_have_different_names(uri: str, node_id: str) -> None:
    assert default_node_id("host", 9, parse_endpoint(uri)) == node_id


def test_a_node_id_as_long_as_may_be_is_one_that_peers_take() -> None:
    node_id = check_node_id("n" * NODE_ID_BYTES_MAX, "--node-id")
    hello = hello_message(node_id, Role.CLIENT, bytes(16), Channel.DATA)
    assert decode(encode(hello), Hello) == hello


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "\x7f", "é" * 129])
def test_refuses_node_ids(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_node_id(text, "--node-id")
    assert (caught.value.option, caught.value.value) == ("--node-id", text)


def test_names_of_pools() -> None:
    assert check_pool_name("llama3-70b", "--x", "llama3-70b=1") == "llama3-70b"
    with pytest.raises(ConfigError) as caught:
        check_pool_name("a b", "--x", "a b=1")
    assert (caught.value.option, caught.value.value) == ("--x", "a b=1")


def test_sizes_of_memory() -> None:
    assert parse_memory_bytes("1k", "--memory", 1024, 2048) == 1024
    assert parse_memory_bytes("2k", "--memory", 1024, 2048) == 2048
    for text in ("1023", "2049"):
        with pytest.raises(ConfigError) as caught:
            parse_memory_bytes(text, "--memory", 1024, 2048)
        assert str(caught.value) == f"--memory={text}: must be 1KiB to 2KiB"


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "-1", "3600.1"])
def test_refuses_times(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_drain_s(parse_number(text), "--drain", text)
    assert str(caught.value) == f"--drain={text}: must be 0 to 3600 seconds"


def test_times() -> None:
    assert check_drain_s(parse_number("0"), "--drain", "0") == 0
    assert check_drain_s(parse_number("0.5"), "--drain", "0.5") == 0.5


def test_log_levels() -> None:
    assert check_log_level("debug", "--log-level") == "debug"
    with pytest.raises(ConfigError):
        check_log_level("loud", "--log-level")
