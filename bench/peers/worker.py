"""The process of one peer: its client library, its memory, and its server as a child.

Told what to do by lines of JSON on standard input, and answers each with a line:

    {"do": "open"}                                     {"versions": …, "fill_s": …}
    {"do": "get", "depth": 2, "seconds": 1, …}         a section, see `_measured`
    {"do": "put", "depth": 2, "seconds": 1}            a section
    {"do": "check"}                                    {"checked": …, "wrong": …}

or with {"error": …}. It ends when standard input does.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kvstore_bench.children import cpu_ns
from peers.base import Driven, Peer, PeerMissing, endless
from peers.work import Work, percentile

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
# Fields of /proc/stat in which a processor does nothing: idle, iowait.
IDLE_FIELDS = (3, 4)
GUEST_FIELDS = 8


def busy_s() -> float:
    """Processor time of everything on this machine so far."""
    with open("/proc/stat") as file:
        values = [int(word) for word in file.readline().split()[1:]]
    busy = [ticks for field, ticks in enumerate(values[:GUEST_FIELDS]) if field not in IDLE_FIELDS]
    return sum(busy) / TICKS_A_SECOND


class Watch:
    """What a section costs: begun when made."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.client_s = self.server_s = self.seconds = self.busy_s = 0.0

    def begin(self) -> None:
        """Time goes from now on."""
        self._at = self._now()

    def end(self) -> None:
        """Add what went since `begin`."""
        now = self._now()
        seconds, client_s, server_s, busy = (
            after - before for after, before in zip(now, self._at, strict=True)
        )
        self.seconds += seconds
        self.client_s += client_s
        self.server_s += server_s
        self.busy_s += busy

    def _now(self) -> tuple[float, float, float, float]:
        # A server that is gone shows as a failure of the next call.
        servers = sum(cpu_ns(pid) or 0 for pid in self._peer.server_pids)
        return time.perf_counter(), time.process_time(), servers / 1e9, busy_s()


class Worker:
    """One peer, and what can be asked of it."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.peer = peer
        self._folder = folder

    async def open(self) -> dict[str, Any]:
        """Start it, store what will be read, and once what will be written.

        The first time costs servers that do not touch their memory before several times as much
        as any later one, and clients too; nobody is measured by it.
        """
        if missing := self.peer.missing():
            raise PeerMissing(missing)
        await self.peer.open(self._folder)
        began = time.perf_counter()
        await self.peer.fill()
        await self._write(self.peer.work.lanes, Watch(self.peer))
        return {"versions": self.peer.versions, "fill_s": time.perf_counter() - began}

    async def get(self, depth: int, seconds: float, ramp_s: float) -> dict[str, Any]:
        """Read batches for some time; those of a while before do not count."""
        peer, watch = self.peer, Watch(self.peer)
        peer.rewind()
        batches = endless(peer)
        await peer.drive("get", depth, batches, time.perf_counter() + ramp_s)
        watch.begin()
        driven = await peer.drive("get", depth, batches, time.perf_counter() + seconds)
        watch.end()
        memory = peer.memory
        wrong = sum(memory.wrong(memory.lane(lane), n) for lane, n in driven.last.items())
        return self._measured(driven, watch) | {
            "checked": len(driven.last) * peer.work.batch,
            "wrong": wrong,
        }

    async def put(self, depth: int, seconds: float) -> dict[str, Any]:
        """Store all that is written, again and again until that took some time."""
        peer, watch = self.peer, Watch(self.peer)
        driven = Driven()
        while not driven.took_s or watch.seconds < seconds:
            await peer.forget(peer.work.writes())
            driven.took_s += (await self._write(depth, watch)).took_s
        return self._measured(driven, watch)

    async def check(self) -> dict[str, Any]:
        """Read everything once, into memory that was blanked, and compare every byte."""
        peer, work = self.peer, self.peer.work
        area, wrong = peer.memory.lane(0), 0
        for batch in range(work.batches):
            peer.memory.blank(area)
            await self._read(batch, area)
            wrong += peer.memory.wrong(area, batch)
        return {"checked": work.batches * work.batch, "wrong": wrong}

    async def _write(self, depth: int, watch: Watch) -> Driven:
        """One round of writes."""
        watch.begin()
        driven = await self.peer.drive("put", depth, iter(self.peer.work.writes()))
        watch.end()
        return driven

    async def _read(self, batch: int, area: memoryview) -> None:
        alone: Callable[[int, memoryview], None] | None = getattr(self.peer, "read_back", None)
        if alone is not None:
            await asyncio.to_thread(alone, batch, area)
        else:
            await self.peer.drive("get", 1, iter([batch]))

    def _measured(self, driven: Driven, watch: Watch) -> dict[str, Any]:
        """A section, for JSON: bytes and seconds, processor seconds of client and server, cores
        that something else had, and milliseconds of a batch."""
        took_ms = [1e3 * took_s for took_s in driven.took_s]
        others_s = watch.busy_s - watch.client_s - watch.server_s
        return {
            "bytes": len(took_ms) * self.peer.work.batch_bytes,
            "seconds": watch.seconds,
            "client_s": watch.client_s,
            "server_s": watch.server_s,
            "other_cores": others_s / watch.seconds,
            "batch_ms": {f"p{p}": percentile(took_ms, p) for p in (50, 99)},
        }


def made(spot: str, work: Work, variant: str) -> Peer:
    """The peer that is called `module:Class`."""
    module, _, name = spot.partition(":")
    peer = getattr(importlib.import_module(f"peers.{module}"), name)(work, variant)
    assert isinstance(peer, Peer)
    return peer


async def serve(peer: Peer, folder: Path, answers: int) -> None:
    """Do what is asked until there is nothing more."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    worker = Worker(peer, folder)
    try:
        while line := await lines.readline():
            asked = json.loads(line)
            action: Callable[..., Awaitable[dict[str, Any]]] = getattr(worker, asked.pop("do"))
            try:
                answer = await action(**asked)
            except PeerMissing as error:
                answer = {"missing": str(error)}
            except Exception as error:
                # Whatever a library of somebody else raises: the others are still measured.
                answer = {"error": f"{type(error).__name__}: {error}"}
            os.write(answers, json.dumps(answer).encode() + b"\n")
    finally:
        await peer.close()


def main() -> None:
    """Run a worker: `module:Class`, its variant, the work as JSON, a folder."""
    spot, variant, work, folder = sys.argv[1:]
    # Libraries print; what they print must not look like an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    peer = made(spot, Work(**json.loads(work)), variant)
    running = serve(peer, Path(folder), answers)
    if spot.startswith("kv:"):
        uvloop: Any = importlib.import_module("uvloop")
        uvloop.run(running)
    else:
        asyncio.run(running)


if __name__ == "__main__":
    main()
