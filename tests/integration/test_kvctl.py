"""`kvctl` against real nodes: servers in this process, daemons, and a terminal to look at."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.errors import TransportTimeout
from kvstore.loadreport import LoadReport, NodeState
from kvstore.messages import Error, ErrorCode, Message, Role, Status as StatusMessage
from kvstore.wire import Flags, FrameType, Header
from kvstore_client.ctl import ping, status, top
from kvstore_client.ctl.attention import Attention
from kvstore_client.ctl.connection import open_connection
from kvstore_client.ctl.options import Common
from kvstore_client.ctl.top import Top
from kvstore_client.ctl.top_view import View
from kvstore_client.ctl.watcher import Watcher
from tests.support.agents import run_agents
from tests.support.cluster import (
    chain,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.frames import frame
from tests.support.peers import Act, Talk, proxied, scripted
from tests.support.processes import daemon
from tests.support.tree import PACKAGES

PATIENCE_S = 20.0
#: Nobody listens there: the port is reserved.
NOBODY = "tcp://127.0.0.1:1"


def common(*uris: str, json: bool = False, timeout_s: float = PATIENCE_S) -> Common:
    endpoints = tuple(parse_endpoint(uri) for uri in uris)
    return Common(endpoints=endpoints, timeout_s=timeout_s, json=json)


async def run(module: Any, options: Common, **given: Any) -> tuple[int, str]:
    """Run a command in this process; its exit status and its output."""
    values = {"count": None, "interval": "0.1", "sort": "endpoint", "reverse": False, **given}
    output = io.StringIO()
    ended: int = await module.run(options, argparse.Namespace(**values), output)
    return ended, output.getvalue()


def answer(message: Message) -> Act:
    """Answer a request with this."""

    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        talk.write(frame(header.type, header.request_id, message, flags=Flags.REPLY))

    return act


def refuse(talk: Talk, header: Header, metadata: bytes) -> None:
    """Refuse whatever it is."""
    talk.send(
        FrameType.ERROR,
        header.request_id,
        Error(code=ErrorCode.PERMISSION, message="not for you"),
    )


# --- status ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_status_tells_what_nodes_have_counted() -> None:
    async with serve(2) as nodes:
        uris = [node.uri for node in nodes]
        async with connected(nodes[:1]) as client:
            namespace = await open_pool(client)
            keys = chain(3)
            await store_blocks(client, namespace, keys)
            await fetch_blocks(client, namespace, [*keys, *chain(1, 7)])
        await nodes[0].left_alone()
        # A report may be 20 ms old, and tell of a time before the put.
        for _ in range(1000):
            ended, text = await run(status, common(*uris, json=True))
            told = json.loads(text)["nodes"]
            buffers = told[0]["report"]["buffers"]
            if buffers["free_bytes"] < buffers["total_bytes"]:
                break
        assert ended == 0
        assert buffers["total_bytes"] - buffers["free_bytes"] == 3 * 4096
        assert [node["endpoint"] for node in told] == uris
        assert [node["node_id"] for node in told] == ["node-0", "node-1"]
        assert [node["error"] for node in told] == [None, None]
        assert [node["role"] for node in told] == ["daemon", "daemon"]
        counters = told[0]["counters"]
        assert counters["put_blocks_stored"] == 3
        assert counters["fetch_blocks_hit"] == 3
        assert counters["fetch_blocks_miss"] == 1
        assert (counters["connections"], counters["sessions"]) == (1, 1)
        assert told[0]["report"]["links"][0]["name"] == uris[0]
        ended, text = await run(status, common(*uris))
        assert ended == 0
        assert re.search(r"^node-0 +READY +daemon .*12KiB of 1MiB \(1%\) +1 +1 +tcp://", text, re.M)
        assert re.search(r"^fetch: HIT +3 +0$", text, re.M)
        assert re.search(r"^put: STORED +3 +0$", text, re.M)


@pytest.mark.asyncio
async def test_status_and_top_of_an_agent_tell_what_it_carries(tmp_path: Path) -> None:
    async with serve() as nodes, run_agents(nodes, local=tmp_path) as (agent,):
        keys = chain(3)
        async with connected(nodes) as client, connected(agent.local) as engine:
            await store_blocks(client, await open_pool(client), keys)
            result = await fetch_blocks(engine, await open_pool(engine), keys)
            assert result.ok
        await agent.left_alone()
        ended, text = await run(status, common(agent.uri))
        assert ended == 0
        assert re.search(r"^agent-0 +READY +agent .*pool: 4MiB of 4MiB reclaimable", text, re.M)
        assert re.search(r"^own loads: blocks +3$", text, re.M)
        assert re.search(r"^own loads: bytes +12KiB$", text, re.M)
        assert re.search(r"^brought in: bytes direct +12KiB$", text, re.M)
        assert re.search(r"^relayed: requests +0$", text, re.M)
        assert re.search(r"^agent-0 +3 +0 +0 +0B +pool: .* 0$", text, re.M)
        assert "arena" not in text
        assert "lookup: keys" not in text
        ended, text = await run(top, common(agent.uri), count="1")
        assert ended == 0
        assert re.search(r"^agent-0 +READY .* pool: 4MiB of 4MiB reclaimable +tcp://", text, re.M)


@pytest.mark.asyncio
async def test_status_of_nodes_that_are_down_says_why_and_the_others_still_answer() -> None:
    async with serve() as (node,):
        silent = "no answer to STATUS in 0.05 s"
        async with scripted({}) as hangs, scripted({FrameType.STATUS: refuse}) as refuses:
            uris = [NOBODY, hangs.uri, node.uri, refuses.uri, "unix:///nowhere/kvstored.sock"]
            ended, text = await run(status, common(*uris, json=True, timeout_s=0.05))
        errors = [told["error"] for told in json.loads(text)["nodes"]]
        assert ended == 1
        assert errors[2] is None
        for uri, error in zip(uris, errors, strict=True):
            assert error is None or uri in error
        assert "refused" in errors[0] or "Connect call failed" in errors[0]
        assert silent in errors[1]
        assert "not for you" in errors[3]
        assert "No such file" in errors[4]
        ended, text = await run(status, common(NOBODY, node.uri))
        assert ended == 1
        assert re.search(rf"^{NOBODY} +down ", text, re.M)
        assert re.search(rf"^connect to {NOBODY}: ", text, re.M)
        assert re.search(r"^node-0 +READY ", text, re.M)


@pytest.mark.asyncio
async def test_status_of_a_node_that_says_no_hello() -> None:
    async with scripted({FrameType.HELLO: lambda talk, header, metadata: None}) as hangs:
        ended, text = await run(status, common(hangs.uri, timeout_s=0.05))
        assert ended == 1
        assert f"{hangs.uri}: no answer to HELLO in 0.05 s" in text
        await until(lambda: not hangs.talks, "kvctl has hung up")


@pytest.mark.asyncio
async def test_what_a_peer_says_cannot_draw_on_the_screen() -> None:
    report = LoadReport(
        node_id="\x1b[2J", boot_id=b"", seq=1, interval_ms=200, state=NodeState.READY
    )
    said = StatusMessage(
        node_id="\x1b[2J", version="\r1", role=Role.DAEMON, uptime_s=0.0, report=report
    )
    async with scripted({FrameType.STATUS: answer(said)}) as liar:
        ended, text = await run(status, common(liar.uri))
        assert ended == 0
        assert "\x1b" not in text
        assert "\r" not in text
        assert "\\x1b[2J" in text


@pytest.mark.slow
@pytest.mark.asyncio
async def test_status_hears_of_a_queue_that_does_not_change() -> None:
    async with serve() as (node,), connected([node], node_id="gpu-7") as client:
        namespace = await open_pool(client)
        keys = chain(4)
        await store_blocks(client, namespace, keys)
        node.gate.chunks_left = 0
        into = room(4)
        handle = client.fetch(namespace, keys, into, deadline_s=PATIENCE_S)
        await until(lambda: any(c.protocol.fetch_queued_bytes for c in node.server.connections))
        async with connected([node], node_id="other") as other:
            reports = other.cluster.reports

            def left_out() -> bool:
                newest = reports.report(node.name)
                return bool(reports.requesters(node.name)) and not (newest and newest.requesters)

            await until(left_out, "the others have heard of it, and are told no more")
            (told,) = await status.ask_all([parse_endpoint(node.uri)], PATIENCE_S)
        assert [load.node_id for load in told.requesters] == ["gpu-7"]
        assert told.requesters[0].queued_bytes == 4 * len(contents(keys)[0])
        text = status.as_tables([told], None)
        assert re.search(r"^gpu-7 +node-0 +16KiB +1$", text, re.M)
        node.gate.open()
        await handle


# --- ping ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_ping_counts_and_measures() -> None:
    async with serve() as (node,):
        ended, text = await run(ping, common(node.uri), count="3", interval="0.01")
        assert ended == 0
        lines = text.splitlines()
        for number in (1, 2, 3):
            assert re.fullmatch(
                rf"{node.uri} \(node-0\): ping {number}: \d+\.\d{{3}} ms", lines[number - 1]
            )
        assert lines[3:5] == ["", f"{node.uri} (node-0): 3 pings, 0 without an answer"]
        assert re.fullmatch(r"round trip min/avg/max/p99 = [\d./]+ ms", lines[5])
        assert node.counter("requests_ping") == 3
        assert node.counter("connections_accepted") == 1


@pytest.mark.asyncio
async def test_ping_says_why_there_is_no_answer_and_goes_on() -> None:
    async with serve() as (node,):
        options = common(node.uri, NOBODY, json=True)
        ended, text = await run(ping, options, count="2", interval="0.01")
        alive, dead = json.loads(text)["nodes"]
        assert ended == 1
        assert (alive["sent"], alive["answered"], alive["error"]) == (2, 2, None)
        assert set(alive["round_trip_ms"]) == {"min", "avg", "max", "p99"}
        assert (dead["sent"], dead["answered"], dead["round_trip_ms"]) == (2, 0, None)
        assert NOBODY in dead["error"]
        told = set(re.findall(r"\w+", ping.EPILOG.partition("--json")[2]))
        assert set(alive) | set(alive["round_trip_ms"]) | {"format", "nodes"} <= told


@pytest.mark.asyncio
async def test_ping_connects_again_when_its_connection_was_lost() -> None:
    async with serve() as (node,), proxied(node.uri) as proxy:
        output = io.StringIO()
        target = ping.Target(parse_endpoint(proxy.uri), PATIENCE_S, output)
        attention = Attention()
        pinging = asyncio.ensure_future(target.ping_on(None, 0.01, attention))
        await until(lambda: target.trips.answered >= 1)
        proxy.refuse()
        proxy.cut()
        await until(lambda: target.trips.error, "a ping has failed")
        answered = target.trips.answered
        proxy.refuse(False)
        await until(lambda: target.trips.answered > answered, "a ping is answered again")
        attention.stop()
        await pinging
        assert f"{proxy.uri}" in target.trips.error
        assert not target.trips.all_answered


@pytest.mark.asyncio
async def test_a_late_answer_is_not_that_of_the_next_ping() -> None:
    held: list[Callable[[], None]] = []

    def hold_first(talk: Talk, header: Header, metadata: bytes) -> None:
        held.append(lambda: talk.send(header.type, header.request_id, b"\x80", reply=True))
        if len(held) > 1:
            held[-1]()

    async with scripted({FrameType.PING: hold_first}) as server:
        target = ping.Target(parse_endpoint(server.uri), 0.05, None)
        await target.ping_on(2, 0.01, Attention())
        assert (target.trips.sent, target.trips.answered) == (2, 1)
        assert "no answer to PING in 0.05 s" in target.trips.error
        assert server.count(FrameType.HELLO) == 2  # the first connection was given up


@pytest.mark.asyncio
async def test_a_node_that_hangs_does_not_keep_ping_from_ending() -> None:
    async with scripted({}) as hangs:
        target = ping.Target(parse_endpoint(hangs.uri), 600.0, None)
        attention = Attention()
        pinging = asyncio.ensure_future(target.ping_on(None, 3600.0, attention))
        await until(lambda: hangs.count(FrameType.PING) == 1)
        attention.stop()
        await pinging
        assert target.trips.sent == 0
        await until(lambda: not hangs.talks, "kvctl has hung up")


# --- top -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_top_without_a_terminal_prints_a_block_a_view() -> None:
    async with serve(2) as nodes:
        uris = [node.uri for node in nodes]
        ended, text = await run(top, common(*uris, NOBODY), count="2", sort="name", reverse=True)
        assert ended == 1
        blocks = text.split("\n\nkvctl top")
        assert len(blocks) == 2
        for block in blocks:
            assert "nodes: 3, down: 1  order: name, reversed" in block
            names = re.findall(r"^(\S+) +(?:READY|down) ", block, re.M)
            assert names == [NOBODY, "node-1", "node-0"]
            assert re.search(r"^node-0 +READY +\S+ +(fresh|widen) ", block, re.M)
            assert re.search(rf"^node-1 +{uris[1]} +\[\.+\] ", block, re.M)
        assert "\x1b" not in text


@pytest.mark.asyncio
async def test_top_writes_a_line_of_json_a_view() -> None:
    async with serve() as (node,):
        ended, text = await run(top, common(node.uri, json=True), count="2")
        first, second = (json.loads(line) for line in text.splitlines())
        assert ended == 0
        (told,) = first["nodes"]
        assert (told["node_id"], told["role"], told["error"]) == ("node-0", "daemon", None)
        assert told["freshness"] in ("fresh", "widen", "stale")
        assert told["report"]["links"][0]["name"] == node.uri
        assert first["time"] <= second["time"]


@pytest.mark.asyncio
async def test_a_watcher_sees_a_queue_come_and_go() -> None:
    async with serve() as (node,), connected([node], node_id="gpu-7") as client:
        namespace = await open_pool(client)
        keys = chain(4)
        await store_blocks(client, namespace, keys)
        with watching(node.uri) as (watcher, now):
            await until(lambda: watcher.heard)
            node.gate.chunks_left = 0
            handle = client.fetch(namespace, keys, room(4), deadline_s=PATIENCE_S)
            await until(lambda: watcher.node(now()).requesters, "the queue is seen")
            seen = watcher.node(now())
            assert seen.requesters[0].node_id == "gpu-7"
            await until(lambda: watcher.node(now()).queued_bytes == 16384)
            node.gate.open()
            await handle
            await until(lambda: not watcher.node(now()).requesters, "the queue is gone")
            await until(lambda: watcher.node(now()).queued_bytes == 0)


@pytest.mark.asyncio
async def test_a_watcher_survives_nodes_that_go_and_come_back() -> None:
    changes: list[int] = []
    async with serve() as (node,):
        with watching(node.uri, lambda: changes.append(1)) as (watcher, now):
            await until(lambda: watcher.node(now()).report is not None)
            before = watcher.node(now())
            assert (before.error, before.state) == ("", "READY")
            await node.kill()
            await until(lambda: watcher.node(now()).error, "the loss is seen")
            gone = watcher.node(now())
            assert gone.state == "down"
            assert gone.report is not None  # what it said last stays
            assert node.uri in gone.error
            await node.start()
            await until(lambda: not watcher.node(now()).error, "it is seen again")
            back = watcher.node(now())
            assert back.report is not None
            assert back.report.boot_id != gone.report.boot_id
            assert len(changes) >= 3


@pytest.mark.asyncio
async def test_a_node_that_drains_says_so() -> None:
    async with serve() as (node,), connected([node]) as client:
        namespace = await open_pool(client)
        keys = chain(1)
        await store_blocks(client, namespace, keys)
        with watching(node.uri) as (watcher, now):
            await until(lambda: watcher.heard)
            node.gate.chunks_left = 0
            handle = client.fetch(namespace, keys, room(1), deadline_s=PATIENCE_S)
            await until(lambda: node.server.busy)
            stopping = asyncio.ensure_future(node.server.stop(PATIENCE_S))
            await until(lambda: watcher.node(now()).state == "DRAINING")
            node.gate.open()
            await handle
            await stopping
            node.running = False


@pytest.mark.asyncio
async def test_a_node_that_falls_silent_is_connected_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore_client.ctl.watcher.SILENCE_S_MAX", 0.05)
    async with scripted({}) as silent:  # it welcomes, and reports nothing
        with watching(silent.uri) as (watcher, now):
            await until(lambda: silent.count(FrameType.HELLO) >= 2)
            node = watcher.node(now())
            assert f"{silent.uri}: silent for" in node.error
            assert node.report is None


@pytest.mark.asyncio
async def test_top_ends_when_asked_even_if_nobody_was_heard() -> None:
    async with scripted({}) as silent:
        view = Top(common(silent.uri), View(), io.StringIO())
        running = asyncio.ensure_future(view.run_with(lambda: view.print_blocks(None, 3600.0)))
        await until(lambda: silent.count(FrameType.SUBSCRIBE) == 1)
        view._attention.stop()
        assert await running == 1
        await until(lambda: not silent.talks, "kvctl has hung up")


@contextmanager
def watching(
    uri: str, on_change: Callable[[], None] = lambda: None
) -> Iterator[tuple[Watcher, Callable[[], float]]]:
    """A watcher at work, and the clock that it goes by."""
    watcher = Watcher(parse_endpoint(uri), PATIENCE_S, on_change, retry_s=0.01)
    task = asyncio.ensure_future(watcher.watch())
    try:
        yield watcher, asyncio.get_running_loop().time
        assert not task.done()
    finally:
        task.cancel()


# --- the connection --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_connection_that_is_cancelled_while_it_opens_is_closed() -> None:
    async with scripted({FrameType.HELLO: lambda talk, header, metadata: None}) as hangs:
        opening = asyncio.ensure_future(open_connection(parse_endpoint(hangs.uri), 600.0))
        await until(lambda: hangs.count(FrameType.HELLO) == 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await until(lambda: not hangs.talks, "kvctl has hung up")


@pytest.mark.asyncio
async def test_a_question_after_the_end_fails_at_once() -> None:
    async with serve() as (node,):
        connection = await open_connection(parse_endpoint(node.uri), 600.0)
        assert await connection.end(0.0) is None
        connection.close(TransportTimeout("enough"))
        connection.close()
        assert str(await connection.end(600.0)) == "enough"
        with pytest.raises(TransportTimeout, match="enough"):
            await connection.ping()


# --- as a process ----------------------------------------------------------------------------

_SOURCES = ":".join(dict.fromkeys(str(directory.parent) for directory in PACKAGES.values()))
_ENVIRONMENT = {**os.environ, "PYTHONPATH": _SOURCES}
_COMMAND = [sys.executable, "-W", "error", "-m", "kvstore_client.ctl"]
# As _COMMAND, in a session whose terminal is standard input.
_ON_TERMINAL = [
    *(sys.executable, "-W", "error", "-c"),
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from kvstore_client.ctl.__main__ import main; sys.exit(main())",
]
ENTERED, LEFT = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def kvctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *words],
        env=_ENVIRONMENT,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_kvctl_against_a_daemon() -> None:
    with daemon("--node-id", "store-1") as kvstored:
        endpoint = ("--endpoint", kvstored.uri)
        done = kvctl(*endpoint, "status")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(
            r"^store-1 +READY +daemon +\S+ +\S+ +arena: 0B of 16MiB", done.stdout, re.M
        )
        done = kvctl(*endpoint, "ping", "--count", "2", "--interval", "0.01")
        assert (done.returncode, done.stderr) == (0, "")
        assert "2 pings, 0 without an answer" in done.stdout
        done = kvctl("top", *endpoint, "--count", "1", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["nodes"][0]["node_id"] == "store-1"
        uri = kvstored.uri
        kvstored.signal(signal.SIGTERM)
        kvstored.wait()
        done = kvctl("--endpoint", uri, "status")
        assert (done.returncode, done.stderr) == (1, "")
        assert f"connect to {uri}: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_ping_with_its_statistics(number: signal.Signals) -> None:
    with daemon() as kvstored, started("--endpoint", kvstored.uri, "ping") as process:
        assert process.stdout is not None
        assert ": ping 1: " in process.stdout.readline()
        process.send_signal(number)
        rest = process.stdout.read()
        assert re.search(r"\d+ pings, 0 without an answer\nround trip min/avg/max/p99 = ", rest)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_top_quietly() -> None:
    with daemon() as kvstored:
        words = ("--endpoint", kvstored.uri, "top", "--interval", "0.1")
        with started(*words) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(60) == 141


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A `kvctl` that goes on."""
    process = subprocess.Popen(
        [*_COMMAND, *words],
        env=_ENVIRONMENT,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Terminal:
    """A `kvctl` on a terminal of its own.

    Attributes:
        process: The command.
        shown: All that the terminal was told since `forget`.
    """

    def __init__(self, words: tuple[str, ...], columns: int, rows: int) -> None:
        self._operator, self._terminal = os.openpty()
        termios.tcsetwinsize(self._operator, (rows, columns))
        self.modes = termios.tcgetattr(self._terminal)
        self.shown = ""
        self.process = subprocess.Popen(
            [*_ON_TERMINAL, *words],
            env=_ENVIRONMENT,
            cwd="/",
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            start_new_session=True,
        )

    def current_modes(self) -> list[Any]:
        """How the terminal treats what is typed."""
        return termios.tcgetattr(self._terminal)

    def type(self, keys: str) -> None:
        """Press keys; what was shown before is forgotten."""
        self.shown = ""
        os.write(self._operator, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        """As when the operator draws the window larger."""
        self.shown = ""
        termios.tcsetwinsize(self._operator, (rows, columns))

    def wait_for(self, text: str) -> None:
        """Read until it is shown; a command that ends or hangs without it fails the test."""
        while text not in self.shown:
            part = os.read(self._operator, 65536)
            assert part, f"{text!r} was never shown:\n{self.shown}"
            self.shown += part.decode()

    def close(self) -> None:
        """End it in any case."""
        self.process.kill()
        self.process.wait()
        os.close(self._operator)
        os.close(self._terminal)


@contextmanager
def on_terminal(*words: str, columns: int = 120, rows: int = 30) -> Iterator[Terminal]:
    """A `kvctl` on a terminal."""
    terminal = Terminal(words, columns, rows)
    # Nothing else would wake a read: the terminal has no end while we hold its other side.
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    try:
        yield terminal
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        terminal.close()


def _too_long(number: int, stack: object) -> None:
    raise TimeoutError("a terminal has shown nothing for a minute")


@pytest.mark.slow
def test_top_redraws_in_place_and_gives_the_terminal_back() -> None:
    with daemon("--node-id", "store-1") as kvstored:
        words = ("--endpoint", kvstored.uri, "top", "--interval", "0.1")
        with on_terminal(*words) as terminal:
            terminal.wait_for("store-1  READY")
            assert terminal.shown.startswith(ENTERED)
            assert "\x1b[2J" not in terminal.shown  # clearing all of it flickers
            assert terminal.current_modes()[3] & termios.ICANON == 0
            terminal.type("s")
            terminal.wait_for("order: name ")
            terminal.type("r")
            terminal.wait_for("order: name, reversed")
            terminal.resize(30, 5)
            terminal.wait_for(" more lines")
            terminal.type("q")
            terminal.wait_for(LEFT)
            assert terminal.process.wait(60) == 0
            assert terminal.shown.endswith(LEFT)
            assert terminal.current_modes() == terminal.modes


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\x03", signal.SIGTERM])
def test_whatever_ends_top_gives_the_terminal_back(end: str | signal.Signals) -> None:
    with on_terminal("--endpoint", NOBODY, "top") as terminal:
        terminal.wait_for(f"connect to {NOBODY}")
        if isinstance(end, str):
            terminal.type(end)  # Ctrl-C
        else:
            terminal.process.send_signal(end)
        terminal.wait_for(LEFT)
        assert terminal.process.wait(60) == 1  # nobody was heard
        assert terminal.current_modes() == terminal.modes


@pytest.mark.slow
def test_top_leaves_the_terminal_while_it_is_suspended() -> None:
    with on_terminal("--endpoint", NOBODY, "top") as terminal:
        terminal.wait_for(f"connect to {NOBODY}")
        terminal.type("\x1a")  # Ctrl-Z
        terminal.wait_for(LEFT)
        _, state = os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(state)
        assert terminal.current_modes() == terminal.modes
        terminal.shown = ""
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for(ENTERED)
        terminal.wait_for(f"connect to {NOBODY}")
        terminal.type("q")
        terminal.wait_for(LEFT)
        assert terminal.process.wait(60) == 1
