"""`kvctl top`: nodes, links and queues as they change."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TextIO

from kvstore.errors import ConfigError
from kvstore_client.ctl.attention import Attention
from kvstore_client.ctl.documents import REPORT_NAMES, as_line, document, live_of
from kvstore_client.ctl.options import Common, Subparsers, add_command, seconds, whole
from kvstore_client.ctl.panels import Node
from kvstore_client.ctl.screen import Screen
from kvstore_client.ctl.top_view import KEYS, ORDERS, View, fit
from kvstore_client.ctl.watcher import Watcher

INTERVAL_S = 1.0
# Nodes report a change after 20 ms; nobody reads faster than this.
INTERVAL_S_MIN = 0.1
INTERVAL_S_MAX = 3600.0
COUNT_MAX = 1_000_000

EPILOG = f"""
On a terminal the view is redrawn in place: {KEYS}; Ctrl-C ends it too.
Without a terminal, as in a pipe, each interval prints a block; the first comes when every node
has reported or failed. Nodes may come and go: what a node said last stays, with its age, until
it is back.

AGE is the time since the newest load report arrived. REPORT says how far it may be believed:
fresh (up to 400 ms), widen (up to 1 s: somewhat old), stale. LOAD is what a link sends, as a
share of its capacity: the highest rate that it has shown while it was busy. The link "storage"
of an agent is how blocks come to it, and is not part of SENT and QUEUED. MEMORY is what a
daemon's arena has in use, and what of an agent's pool is free or can be. Counters are in
`kvctl status`.

examples:
  kvctl top
  kvctl --endpoint tcp://10.0.0.7:7450 --endpoint tcp://10.0.0.8:7450 top --sort queue
  kvctl top --count 1                 one look, for a script or a paste
  kvctl top --json --interval 5 >> loads.jsonl

--json: a line of JSON an interval: format, time (seconds since 1970), and nodes [endpoint,
error, node_id, role, age_s, freshness, report], in the order of --sort. error is null while
the node is heard; node_id, role, age_s and report are null until it was.
{REPORT_NAMES}

exit status: 0 all nodes were heard when it ended; 1 one of them was not;
2 an option cannot be
"""


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Add `top` to the commands of `kvctl`."""
    parser = add_command(
        subparsers,
        "top",
        "live view of nodes, links and queues",
        "Show nodes, links, queues and memory as they change, from the nodes' load reports.",
        EPILOG,
    )
    parser.add_argument(
        "--interval",
        metavar="S",
        default=f"{INTERVAL_S:g}",
        help="seconds from one view to the next (default %(default)s)",
    )
    parser.add_argument("--count", metavar="N", help="end after N views (default: go on)")
    parser.add_argument(
        "--sort",
        metavar="ORDER",
        default="endpoint",
        help=f"of nodes, one of {', '.join(ORDERS)} (default %(default)s: as typed)",
    )
    parser.add_argument("--reverse", action="store_true", help="turn the order around")
    parser.set_defaults(run=run)


async def run(common: Common, given: argparse.Namespace, output: TextIO) -> int:
    """Show nodes until the count is reached or the operator ends it; the exit status.

    Raises:
        ConfigError: An option cannot be.
    """
    if given.sort not in ORDERS:
        raise ConfigError("--sort", given.sort, f"must be one of {', '.join(ORDERS)}")
    count = None if given.count is None else whole(given.count, "--count", 1, COUNT_MAX)
    interval_s = seconds(given.interval, "--interval", INTERVAL_S_MIN, INTERVAL_S_MAX)
    top = Top(common, View(given.sort, given.reverse), output)
    if common.json or not output.isatty():
        return await top.run_with(lambda: top.print_blocks(count, interval_s))
    keyboard = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
    return await top.run_with(lambda: top.redraw(count, interval_s, keyboard))


class Top:
    """All nodes, watched and shown."""

    def __init__(self, common: Common, view: View, output: TextIO) -> None:
        self._common = common
        self._view = view
        self._output = output
        self._attention = Attention()
        self._watchers = [
            Watcher(endpoint, common.timeout_s, self._attention.wake)
            for endpoint in common.endpoints
        ]

    async def run_with(self, show: Callable[[], Awaitable[None]]) -> int:
        """Watch the nodes for as long as `show` takes; the exit status."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(watcher.watch()) for watcher in self._watchers]
        for task in tasks:
            task.add_done_callback(lambda task: self._attention.stop())
        try:
            with self._attention.signals():
                await show()
            ended = 1 if any(node.error or not node.report for node in self._nodes()) else 0
        finally:
            broken = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in broken:
            task.result()
        return ended

    async def print_blocks(self, count: int | None, interval_s: float) -> None:
        """Print a block, or a line of JSON, an interval."""
        loop = asyncio.get_running_loop()
        await self._wait_for_nodes(loop.time() + 2 * self._common.timeout_s)
        shown = 0
        while not self._attention.stopped:
            due_at = loop.time() + interval_s
            self._print(first=not shown)
            shown += 1
            if shown == count:
                return
            while loop.time() < due_at and not self._attention.stopped:
                await self._attention.wait(due_at - loop.time())

    async def redraw(self, count: int | None, interval_s: float, keyboard: int | None) -> None:
        """Redraw the screen an interval, and at once when something has changed."""
        loop = asyncio.get_running_loop()
        with Screen(self._output, keyboard, self._key, self._attention.wake) as screen:
            due_at = loop.time() + interval_s
            left = math.inf if count is None else count
            while True:
                columns, rows = screen.size()
                lines = self._view.lines(self._nodes(), time.strftime("%H:%M:%S"))
                lines[0] += f"  ({KEYS})"
                screen.draw(fit(lines, columns, rows))
                await self._attention.wait(due_at - loop.time())
                if loop.time() >= due_at:
                    due_at = loop.time() + interval_s
                    left -= 1
                if self._attention.stopped or left <= 0:
                    return

    def _key(self, key: str) -> None:
        match key:
            case "q" | "Q" | "":
                self._attention.stop()
            case "s":
                self._view.next_order()
            case "r":
                self._view.reverse = not self._view.reverse
        self._attention.wake()

    async def _wait_for_nodes(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        while not (self._attention.stopped or all(watcher.heard for watcher in self._watchers)):
            if loop.time() >= until:
                return
            await self._attention.wait(until - loop.time())

    def _nodes(self) -> list[Node]:
        now = asyncio.get_running_loop().time()
        return [watcher.node(now) for watcher in self._watchers]

    def _print(self, first: bool) -> None:
        if self._common.json:
            nodes = self._view.sorted(self._nodes())
            text = as_line(document([live_of(node) for node in nodes], time=time.time()))
        else:
            lines = self._view.lines(self._nodes(), time.strftime("%H:%M:%S"))
            text = ("" if first else "\n") + "\n".join(lines) + "\n"
        self._output.write(text)
        self._output.flush()
