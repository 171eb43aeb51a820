"""The process of one clone of a job: told what to do on its input, says how it went.

::

    parent ──▶ worker    the task, one line of JSON; later any line: go
    worker ──▶ parent    Step ... Ready ... Progress ... Step ... Finished, one line each

Rule: standard output belongs to these lines alone. The process ends when its parent does.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time

import msgspec
import uvloop

from kvstore.errors import KVStoreError
from kvstore_bench.engines.base import Engine, Task
from kvstore_bench.meter import Meter, Totals
from kvstore_bench.spinners import Spinners
from kvstore_bench.workload import Workload

# Begins each line of a worker's log.
LOG_PREFIX = "worker: "
# How often a worker says how far its set-up is.
STEP_INTERVAL_S = 0.25


class Step(msgspec.Struct, frozen=True, tag=True):
    """Before or after the run: what is done, and how much of how much."""

    what: str
    done_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """All is set up; the worker waits for the word to go."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """During the run: bytes so far."""

    read_bytes: int
    written_bytes: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """How it went. Without totals it could not begin, and `error` says why."""

    error: str = ""
    totals: Totals | None = None


Report = Step | Ready | Progress | Finished


def make_engine(task: Task) -> Engine:
    """The engine that a task asks for."""
    # Imported here: `null` and `raw` need no client.
    match task.job.ioengine:
        case "null":
            from kvstore_bench.engines.null import NullEngine

            return NullEngine(task)
        case "raw":
            from kvstore_bench.engines.raw import RawEngine

            return RawEngine(task)
        case _:
            from kvstore_bench.engines.kv import KvEngine

            return KvEngine(task)


def say(report: Report) -> None:
    """One line to the parent."""
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.stdout.flush()


class Steps:
    """Says steps, but not more often than someone can read them."""

    def __init__(self) -> None:
        self._what = ""
        self._said_at = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._said_at >= STEP_INTERVAL_S:
            self._what, self._said_at = what, now
            say(Step(what, done_bytes, total_bytes))


async def work(task: Task) -> Totals:
    """Do the task.

    Raises:
        KVStoreError: It could not begin.
    """
    workload = Workload(task.job, task.clone)
    engine = make_engine(task)
    spinners = Spinners(task.job.spin, task.job.spin_outside)
    steps = Steps()
    try:
        await engine.open(workload, steps)
        await spinners.start()
        meter = Meter(
            task.job,
            engine.server_pids,
            lambda read, written: say(Progress(read, written)),
            spinners.cpu_ns,
        )
        # What the set-up has made is no business of a collection during the run.
        gc.collect()
        gc.freeze()
        say(Ready())
        await heard()
        await engine.run(workload, meter)
        await spinners.stop()
        await engine.settle(workload, meter, steps)
        return meter.totals()
    finally:
        await spinners.stop()
        await engine.close()


async def heard() -> None:
    """Wait for a line on standard input; the loop goes on meanwhile."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        loop.remove_reader(0)
        os.read(0, 4096)
        waiter.set_result(None)

    loop.add_reader(0, wake)
    await waiter


def main() -> int:
    """Read the task from standard input and do it.

    Returns:
        Exit status: 0 if there is a result, whatever it says; 1 if it could not begin.
    """
    logging.basicConfig(format=LOG_PREFIX + "%(message)s", level=logging.WARNING)
    # Not by the buffered reader, which would swallow the word to go.
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"
    task = msgspec.json.decode(line, type=Task)
    # uvloop: the loop that `kvstore_client.Client` runs for engines. Never in debug mode, which
    # would be measured too.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        try:
            totals = runner.run(work(task))
        except (KVStoreError, OSError, MemoryError, ExceptionGroup) as error:
            # The slots of an engine fail as a group; the first says why.
            first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            say(Finished(error=str(first) or type(first).__name__))
            return 1
    say(Finished(totals=totals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
