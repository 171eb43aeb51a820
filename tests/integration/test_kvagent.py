"""The command `kvagent` as a process: start, serve, stop, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import signal
import socket
import stat
from pathlib import Path

import pytest

from kvstore.loadreport import NodeState
from kvstore.messages import Empty, FetchOutcome, Goaway, PutOutcome, Role
from kvstore.wire import FrameType
from kvstore_client import AsyncClient
from tests.support.engine import content, key, layout
from tests.support.processes import AgentProcess, agent, daemon, failed_start
from tests.support.rawpeer import RawPeer

# Each test starts at least one process.
pytestmark = pytest.mark.slow

MIB = 1024 * 1024
LAYERS = (1000, 3000, 96)
BIG = layout(MIB)
# What the kernel keeps for a reader that does not read is small beside a fetch of this many.
BIG_COUNT = 32
RECEIVE_BUFFER_BYTES = 64 * 1024
# For agents that end before they connect.
NOBODY = "tcp://127.0.0.1:9"


def fill(peer: RawPeer) -> tuple[bytes, list[bytes]]:
    """Put blocks of 1 MiB; their namespace and keys."""
    namespace = peer.open_namespace(BIG)
    keys = [key(number) for number in range(BIG_COUNT)]
    done = peer.put(namespace, BIG, keys, [content(name, MIB) for name in keys])
    assert set(done.outcomes) == {PutOutcome.STORED}
    return namespace, keys


def refused(*options: str) -> tuple[int, list[str]]:
    return failed_start("--storage", NOBODY, *options, kind=AgentProcess)


async def put_and_fetch(uri: str) -> None:
    size, keys = sum(LAYERS), [key(number) for number in range(70)]
    blocks = [content(name, size) for name in keys]
    async with AsyncClient(uri) as client:
        namespace = await client.open_namespace("pool", layout(*LAYERS))
        stored = await client.put(namespace, keys, blocks)
        assert set(stored.outcomes) <= {PutOutcome.STORED, PutOutcome.EXISTS}
        found = await client.lookup(namespace, keys)
        assert found.prefix == len(keys)
        buffers = [bytearray(size) for _ in keys]
        handle = client.fetch(namespace, keys, buffers)
        result = await handle
        await handle.quiesced()
        assert set(result.outcomes) == {FetchOutcome.HIT}
        assert buffers == blocks


# --- serving -----------------------------------------------------------------------------------


def test_serves_other_nodes_and_the_engines_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--local", f"unix://{path}", "--node-id", "prefill-1")
    with daemon() as kvstored:
        with agent("--storage", kvstored.uri, *options, listeners=2) as kvagent:
            assert kvagent.uris[1] == f"unix://{path}"
            assert "node prefill-1, pool of 16MiB" in kvagent.log
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            # Whoever may write may connect.
            assert stat.S_IMODE(mode) == 0o660
            for uri in kvagent.uris:
                with RawPeer(uri) as peer:
                    status = peer.call(FrameType.STATUS, Empty())
                    assert (status.node_id, status.role) == ("prefill-1", Role.AGENT)
                    assert status.report.state is NodeState.READY
            asyncio.run(put_and_fetch(kvagent.uris[1]), debug=True)
        assert not path.exists()
        # What the engine has put through its agent is in storage.
        asyncio.run(put_and_fetch(kvstored.uri), debug=True)


def test_starts_without_storage_and_says_so() -> None:
    with socket.socket() as closed:
        # Bound and not listening: connecting is refused, and nobody else gets the port.
        closed.bind(("127.0.0.1", 0))
        storage = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
        with agent("--storage", storage) as kvagent, RawPeer(kvagent.uri) as peer:
            kvagent.wait_for_line(storage)
            status = peer.call(FrameType.STATUS, Empty())
            assert status.report.state is NodeState.DEGRADED


def test_the_journal_gets_no_second_time() -> None:
    with (
        daemon() as kvstored,
        agent("--storage", kvstored.uri, environment={"JOURNAL_STREAM": "8:1"}) as kvagent,
    ):
        assert f"kvagent: listening on {kvagent.uri}" in kvagent.lines


# --- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_agent(number: signal.Signals) -> None:
    with (
        daemon() as kvstored,
        agent("--storage", kvstored.uri) as kvagent,
        RawPeer(kvagent.uri) as peer,
    ):
        kvagent.signal(number)
        assert peer.receive().header.type is FrameType.GOAWAY
        assert peer.rest() == b""
        assert kvagent.wait() == 0
        assert kvagent.lines[-1].endswith("kvagent: stopped")


def test_a_signal_while_memory_is_touched_ends_the_agent() -> None:
    kvagent = AgentProcess(
        *("--storage", NOBODY, "--listen", "tcp://127.0.0.1:0", "--memory", "512MiB")
    )
    try:
        kvagent.wait_for_line("touching 512MiB")
        kvagent.signal(signal.SIGTERM)
        assert kvagent.wait() == 0
        # A machine may be fast enough to serve before the signal arrives.
        assert "kvagent: SIGTERM while starting" in kvagent.log or "stopped" in kvagent.log
    finally:
        kvagent.close()


def test_a_stop_lets_a_slow_fetch_finish(tmp_path: Path) -> None:
    local = f"unix://{tmp_path / 's'}"
    with (
        daemon("--memory", "64MiB") as kvstored,
        agent(
            *("--storage", kvstored.uri, "--listen", "none", "--local", local),
            *("--memory", "64MiB"),
        ) as kvagent,
        RawPeer(local, RECEIVE_BUFFER_BYTES) as peer,
    ):
        namespace, keys = fill(peer)
        peer.ask_for(namespace, BIG, keys)
        payload = bytearray(peer.receive().payload)
        kvagent.signal(signal.SIGTERM)
        assert "1 requests are under way" in kvagent.wait_for_line("under way")
        while not isinstance((frame := peer.receive()).message, Goaway):
            payload += frame.payload
        assert len(payload) < BIG_COUNT * MIB
        rest, outcomes = peer.take_fetch()
        assert set(outcomes) == {FetchOutcome.HIT}
        assert payload + rest == b"".join(content(name, MIB) for name in keys)
        assert peer.rest() == b""
        assert kvagent.wait() == 0


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    local = f"unix://{tmp_path / 's'}"
    with (
        daemon("--memory", "64MiB") as kvstored,
        agent(
            *("--storage", kvstored.uri, "--listen", "none", "--local", local),
            *("--memory", "64MiB", "--drain", "3600"),
        ) as kvagent,
        RawPeer(local, RECEIVE_BUFFER_BYTES) as peer,
    ):
        namespace, keys = fill(peer)
        peer.ask_for(namespace, BIG, keys)
        peer.receive()
        kvagent.signal(signal.SIGTERM)
        kvagent.wait_for_line("have 3600 s")
        kvagent.signal(signal.SIGTERM)
        assert kvagent.wait() == 0
        assert "kvagent: second signal" in kvagent.log
        assert len(peer.rest()) < BIG_COUNT * MIB


def test_the_socket_file_of_a_killed_agent_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("--listen", "none", "--local", f"unix://{path}")
    with daemon() as kvstored:
        with agent("--storage", kvstored.uri, *options) as kvagent:
            kvagent.signal(signal.SIGKILL)
            assert kvagent.wait() == -signal.SIGKILL
        assert path.exists()
        with agent("--storage", kvstored.uri, *options) as kvagent, RawPeer(kvagent.uri) as peer:
            assert peer.call(FrameType.PING, Empty()) == Empty()
    assert not path.exists()


# --- not starting ------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--listen", "--local"])
def test_an_address_in_use_is_named(option: str, tmp_path: Path) -> None:
    uri = "tcp://127.0.0.1:0" if option == "--listen" else f"unix://{tmp_path / 's'}"
    # That it is a daemon's is no matter.
    with daemon("--listen", uri) as kvstored:
        elsewhere = () if option == "--listen" else ("--listen", "none")
        status, lines = refused(option, kvstored.uri, *elsewhere)
        assert status == 1
        (line,) = lines
        assert line.startswith(f"kvagent: error: listen on {kvstored.uri}: ")
        assert "Address already in use" in line
        with RawPeer(kvstored.uri) as peer:
            assert peer.call(FrameType.PING, Empty()) == Empty()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    status, lines = refused("--listen", "none", "--local", f"unix://{path}")
    assert status == 1
    assert len(lines) == 1
    assert path.read_text() == "mine"


def test_listening_off_loopback_has_to_be_asked_for() -> None:
    # An address that no machine has (RFC 5737), so that nothing is ever opened.
    elsewhere = ("--listen", "tcp://198.51.100.1:0")
    status, lines = refused(*elsewhere)
    assert status == 2
    (line,) = lines
    assert line.startswith("kvagent: error: --listen=tcp://198.51.100.1:0: ")
    assert line.endswith("with --insecure")
    status, lines = refused(*elsewhere, "--insecure")
    assert status == 1
    assert lines[-1].startswith("kvagent: error: listen on tcp://198.51.100.1:0: ")


def test_memory_that_is_not_there_is_refused() -> None:
    status, lines = refused("--listen", "tcp://127.0.0.1:0", "--memory", "1PiB")
    assert status == 2
    (line,) = lines
    assert line.startswith("kvagent: error: --memory=1PiB: does not fit: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "none"], "--listen=none: serves nobody"),
        (["--relay", NOBODY], f"--relay={NOBODY}: is a daemon (--storage)"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(options: list[str], words: str) -> None:
    status, lines = refused(*options)
    assert status == 2
    (line,) = lines
    assert line.startswith(f"kvagent: error: {words}")


def test_nobody_is_served_by_an_agent_that_did_not_start(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, lines = refused("--local", f"unix://{path}", "--listen", f"tcp://127.0.0.1:{port}")
    assert status == 1
    assert f"127.0.0.1:{port}" in lines[-1]
    # The other address was free and must not stay bound.
    assert not path.exists()
