"""`kvctl ping`: how long nodes take to answer, and whether they do."""

from __future__ import annotations

import argparse
import asyncio
import math
from collections import deque
from typing import Any, TextIO

from kvstore.endpoint import Endpoint
from kvstore.errors import KVStoreError
from kvstore_client.ctl.attention import Attention
from kvstore_client.ctl.connection import ControlConnection, open_connection, reason_text
from kvstore_client.ctl.documents import as_text, document
from kvstore_client.ctl.options import Common, Subparsers, add_command, seconds, whole
from kvstore_client.ctl.tables import printable

INTERVAL_S = 1.0
# A hundred a second is a probe; more is a load, for which kvbench is there.
INTERVAL_S_MIN = 0.01
INTERVAL_S_MAX = 3600.0
COUNT_MAX = 1_000_000
# Round trips that the percentile is of, the newest: a day at one a second.
SAMPLES_MAX = 100_000

EPILOG = f"""
A ping is the smallest question of the protocol on a connection that is open: what it takes is
the network both ways, and the time until the node's loop comes to it. Each waits for its answer
or for --timeout before the next one goes out. A connection that is lost is made again at the
next ping.

Without --count it goes on until Ctrl-C, which shows the statistics; p99 is of the newest
{SAMPLES_MAX:,} round trips.

examples:
  kvctl ping
  kvctl --endpoint unix:///run/kvstored.sock ping --count 100 --interval 0.01
  kvctl --endpoint tcp://10.0.0.7:7450 ping --count 3 --json

--json (when it ends): format, and nodes [endpoint, node_id, error, sent, answered,
round_trip_ms]. error is what became of the newest ping that had no answer, or null.
round_trip_ms {{min, avg, max, p99}} is null if there was no answer at all.

exit status: 0 all pings were answered; 1 one of them was not, or none was sent;
2 an option cannot be
"""


class RoundTrips:
    """Statistics of the pings to one node; memory is bounded.

    Attributes:
        sent, answered: Pings.
        error: What became of the newest ping without an answer.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.answered = 0
        self.error = ""
        self._sum_s = 0.0
        self._least_s = math.inf
        self._most_s = 0.0
        self._newest: deque[float] = deque(maxlen=SAMPLES_MAX)

    @property
    def all_answered(self) -> bool:
        """Whether there was a ping, and an answer to each."""
        return 0 < self.sent == self.answered

    def answer(self, elapsed_s: float) -> None:
        """One more ping, and it was answered."""
        self.sent += 1
        self.answered += 1
        self._sum_s += elapsed_s
        self._least_s = min(self._least_s, elapsed_s)
        self._most_s = max(self._most_s, elapsed_s)
        self._newest.append(elapsed_s)

    def failure(self, error: str) -> None:
        """One more ping, and it was not answered."""
        self.sent += 1
        self.error = error

    def summary_ms(self) -> dict[str, float] | None:
        """min, avg, max and p99 (nearest rank); None if nothing was answered."""
        if not self.answered:
            return None
        ranked = sorted(self._newest)
        times_s = {
            "min": self._least_s,
            "avg": self._sum_s / self.answered,
            "max": self._most_s,
            "p99": ranked[math.ceil(0.99 * len(ranked)) - 1],
        }
        return {name: round(1e3 * time_s, 6) for name, time_s in times_s.items()}


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Add `ping` to the commands of `kvctl`."""
    parser = add_command(
        subparsers,
        "ping",
        "round trips to nodes",
        "Measure round trips to nodes, until Ctrl-C or --count.",
        EPILOG,
    )
    parser.add_argument("--count", metavar="N", help="end after N pings (default: go on)")
    parser.add_argument(
        "--interval",
        metavar="S",
        default=f"{INTERVAL_S:g}",
        help="seconds from one ping to the next (default %(default)s)",
    )
    parser.set_defaults(run=run)


async def run(common: Common, given: argparse.Namespace, output: TextIO) -> int:
    """Ping all nodes until the count is reached or a signal comes; the exit status.

    Raises:
        ConfigError: An option cannot be.
    """
    count = None if given.count is None else whole(given.count, "--count", 1, COUNT_MAX)
    interval_s = seconds(given.interval, "--interval", INTERVAL_S_MIN, INTERVAL_S_MAX)
    lines = None if common.json else output
    targets = [Target(endpoint, common.timeout_s, lines) for endpoint in common.endpoints]
    attention = Attention()
    with attention.signals():
        await asyncio.gather(*(t.ping_on(count, interval_s, attention) for t in targets))
    if common.json:
        output.write(as_text(document([target.as_json() for target in targets])))
    else:
        output.write("".join(f"\n{target.as_text()}" for target in targets))
    return 0 if all(target.trips.all_answered for target in targets) else 1


class Target:
    """One node that is pinged.

    Args:
        output: Gets a line a ping; None for none.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float, output: TextIO | None) -> None:
        self.trips = RoundTrips()
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._output = output
        self._node_id = ""
        self._connection: ControlConnection | None = None

    async def ping_on(self, count: int | None, interval_s: float, attention: Attention) -> None:
        """Ping until `count` is reached or somebody stops us."""
        loop = asyncio.get_running_loop()
        stopped = loop.create_task(attention.until_stopped())
        try:
            while not attention.stopped:
                due_at = loop.time() + interval_s
                ping = loop.create_task(self._ping())
                try:
                    # Nobody who has pressed Ctrl-C wants to wait for a node that hangs.
                    await asyncio.wait((ping, stopped), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not ping.done():
                        ping.cancel()
                        await asyncio.wait((ping,))
                if not ping.cancelled():
                    ping.result()
                if self.trips.sent == count:
                    return
                await asyncio.wait((stopped,), timeout=max(0.0, due_at - loop.time()))
        finally:
            stopped.cancel()
            if self._connection is not None:
                self._connection.close()

    async def _ping(self) -> None:
        try:
            connection = await self._connected()
            elapsed_s = await connection.ping()
        except KVStoreError as error:
            self._connection_failed()
            self.trips.failure(reason_text(self._endpoint, error))
            self._say(f"ping {self.trips.sent}: {self.trips.error}")
            return
        self.trips.answer(elapsed_s)
        self._say(f"{self._name()}: ping {self.trips.sent}: {1e3 * elapsed_s:.3f} ms")

    async def _connected(self) -> ControlConnection:
        if self._connection is None or self._connection.lost:
            self._connection = None
            self._connection = await open_connection(self._endpoint, self._timeout_s)
            self._node_id = self._connection.welcome.node_id
        return self._connection

    def _connection_failed(self) -> None:
        # A late answer must not be taken for that of the next ping.
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _name(self) -> str:
        return f"{self._endpoint} ({self._node_id})" if self._node_id else str(self._endpoint)

    def _say(self, text: str) -> None:
        if self._output is not None:
            self._output.write(printable(text) + "\n")
            self._output.flush()

    def as_text(self) -> str:
        """The statistics, for people."""
        trips = self.trips
        lost = trips.sent - trips.answered
        lines = f"{printable(self._name())}: {trips.sent} pings, {lost} without an answer\n"
        figures = trips.summary_ms()
        if figures is not None:
            names, values = "/".join(figures), "/".join(f"{v:.3f}" for v in figures.values())
            lines += f"round trip {names} = {values} ms\n"
        return lines

    def as_json(self) -> dict[str, Any]:
        """The statistics, for programs."""
        return {
            "endpoint": str(self._endpoint),
            "node_id": self._node_id or None,
            "error": self.trips.error or None,
            "sent": self.trips.sent,
            "answered": self.trips.answered,
            "round_trip_ms": self.trips.summary_ms(),
        }
