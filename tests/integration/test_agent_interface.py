"""Interfaces of this host: whose address is whose, and that their counters count."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

from kvstore.errors import ConfigError
from kvstore_client.agent import interface
from kvstore_client.agent.interface import InterfaceCounter, interface_of
from tests.support.tree import ROOT

SENT_BYTES = 64_000

# Run in a network namespace of its own, with as many interfaces as need several reads.
PROGRAM = """
import subprocess
from kvstore_client.agent.interface import InterfaceCounter, interface_of

def ip(*words):
    subprocess.run(["ip", *words], check=True)

for number in range(25):
    ip("link", "add", "name", f"a{number}", "type", "veth", "peer", "name", f"b{number}")
ip("address", "add", "10.9.0.1/24", "dev", "a7")
ip("address", "add", "10.9.0.2/24", "dev", "a7")
ip("address", "add", "10.8.0.1", "peer", "10.8.0.2", "dev", "b7")
print(interface_of("10.9.0.1"), interface_of("10.9.0.2"), interface_of("10.8.0.1"))
counters = [InterfaceCounter(name) for name in ("lo", "a0", "b23", "a24")]
print(*(counter.tx_bytes() for counter in counters))
ip("link", "delete", "a24")
print(*(counter.tx_bytes() for counter in counters))
"""


def test_addresses_of_loopback_belong_to_it() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "localhost"):
        assert interface_of(host) == "lo"


def test_ipv6_is_found_with_and_without_brackets() -> None:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 on loopback here: {error}")
    assert interface_of("::1") == interface_of("[::1]") == "lo"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("0.0.0.0", "is every interface; name the one"),
        ("[::]", "is every interface; name the one"),
        # From a range for documentation, RFC 5737.
        ("203.0.113.77", "no interface of this host has this address"),
        (f"{'a' * 64}.example", "cannot be found: .*label"),
    ],
)
def test_address_of_no_single_interface_is_named(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^interface={re.escape(host)}: {said}"):
        interface_of(host)


def test_counter_counts_what_is_sent() -> None:
    counter = InterfaceCounter("lo")
    before = counter.tx_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        near.sendall(bytes(SENT_BYTES))
        left = SENT_BYTES
        while left:
            left -= len(far.recv(left))
        near.close()
        far.close()
    after = counter.tx_bytes()
    assert before is not None
    assert after is not None
    assert after - before >= SENT_BYTES
    counter.close()
    counter.close()
    assert counter.tx_bytes() is None


def test_short_reads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = InterfaceCounter("lo")
    whole = counter.tx_bytes()
    monkeypatch.setattr(interface, "READ_BYTES", 7)
    parts = counter.tx_bytes()
    counter.close()
    assert whole is not None
    assert parts is not None
    assert parts >= whole


def test_interface_that_is_not_there_is_named_and_those_that_are() -> None:
    before = set(os.listdir("/proc/self/fd"))
    # The beginning or the end of another name is none.
    for name in ("l", "o", "nowhere"):
        with pytest.raises(ConfigError, match=rf"^interface={name}: there is none .*\blo\b"):
            InterfaceCounter(name)
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.slow
def test_namespace_with_many_interfaces() -> None:
    """Second addresses, links between two points, several reads, an interface that goes."""
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        probe = subprocess.run(
            [*inside, "ip", "link", "add", "name", "one", "type", "veth"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        pytest.skip(f"second addresses and many interfaces are not tested: {error}")
    if probe.returncode:
        pytest.skip(f"second addresses and many interfaces are not tested: {probe.stderr.strip()}")
    done = subprocess.run(
        [*inside, sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a7 a7 b7", "0 0 0 0", "0 0 0 None"]
