"""Runs jobs: daemons for those that have none, a process for each clone, the word to go.

::

    for each trial, for each group of jobs
        start daemons ──▶ start workers ──▶ all ready ──▶ go ──▶ all finished ──▶ stop all
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from kvstore_bench.children import Child, stop_all
from kvstore_bench.daemons import DaemonFailed
from kvstore_bench.engines.base import Task
from kvstore_bench.job import Job
from kvstore_bench.jobfile import groups
from kvstore_bench.jobservers import JobServers, servers_of
from kvstore_bench.meter import Totals
from kvstore_bench.worker import LOG_PREFIX, Finished, Progress, Ready, Report, Step

# A worker says something several times a second. Before the first word it starts an
# interpreter and touches memory; an I/O may take until its deadline.
SILENCE_MAX_S = 60.0

_REPORTS: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one job went in one trial.

    Attributes:
        trial: From 1.
        group: Number of the group in which it ran, from 0.
        began_at: Seconds since 1970.
        elapsed_s: Set-up and removal included.
        clones: Totals of each clone that could begin.
        error: Why it failed; empty if it did not.
        server_known: Whether the servers' processor time is in the totals.
    """

    job: Job
    trial: int
    group: int
    began_at: float
    elapsed_s: float
    clones: list[Totals]
    error: str
    server_known: bool


class Watcher:
    """Told what happens; what a terminal shows is a subclass."""

    def group_begins(self, trial: int, jobs: Sequence[Job]) -> None:
        """A group of jobs is about to be set up."""

    def report(self, job: Job, clone: int, report: Report) -> None:
        """A clone has said something."""

    def warning(self, text: str) -> None:
        """A clone has something to tell."""

    def going(self) -> None:
        """All of the group have begun."""

    def group_ends(self, results: Sequence[JobResult]) -> None:
        """A group is over."""


async def run_jobs(jobs: Sequence[Job], trials: int, watcher: Watcher) -> list[JobResult]:
    """Run all jobs, `trials` times in turn; one that fails does not keep others from running."""
    results: list[JobResult] = []
    for trial in range(1, trials + 1):
        for number, group in enumerate(groups(jobs)):
            watcher.group_begins(trial, group)
            gate = Gate(len(group), watcher.going)
            found = await asyncio.gather(
                *(_run_job(job, trial, number, gate, watcher) for job in group)
            )
            watcher.group_ends(found)
            results += found
    return results


class Gate:
    """Where the jobs of a group wait for each other; one that fails waits no more."""

    def __init__(self, count: int, on_open: Callable[[], None]) -> None:
        self._missing = count
        self._open = asyncio.Event()
        self._on_open = on_open

    async def ready(self) -> None:
        """A job is set up; wait until all are."""
        self.dropped()
        await self._open.wait()

    def dropped(self) -> None:
        """A job need not be waited for."""
        self._missing -= 1
        if self._missing == 0:
            self._on_open()
            self._open.set()


async def _run_job(job: Job, trial: int, group: int, gate: Gate, watcher: Watcher) -> JobResult:
    began_at, started = time.time(), time.monotonic()
    run = JobRun(job, gate, watcher)
    error, clones = "", []
    try:
        if job.ioengine == "kv":
            async with servers_of(job) as servers:
                clones = await run.run(servers)
                error = await servers.failures_soon() if run.errors else servers.failures()
        else:
            clones = await run.run(JobServers())
    except DaemonFailed as failure:
        error = str(failure)
    finally:
        run.close()
    error = error or "; ".join(run.errors)
    return JobResult(
        job=job,
        trial=trial,
        group=group,
        began_at=began_at,
        elapsed_s=time.monotonic() - started,
        clones=clones,
        error=error,
        server_known=bool(clones) and all(c.ended.server_ns is not None for c in clones),
    )


class JobRun:
    """The workers of one job.

    Attributes:
        errors: What went wrong, once each.
    """

    def __init__(self, job: Job, gate: Gate, watcher: Watcher) -> None:
        self.errors: list[str] = []
        self._job = job
        self._gate = gate
        self._watcher = watcher
        self._at_gate = True
        self._children: list[Child] = []

    async def run(self, servers: JobServers) -> list[Totals]:
        """Run all clones; totals of those that have some."""
        run = os.urandom(16).hex()
        workers = [Worker(self._job, clone, self._watcher) for clone in range(self._job.numjobs)]
        try:
            for worker in workers:
                task = Task(
                    job=self._job,
                    clone=worker.clone,
                    run=run,
                    endpoints=servers.endpoints,
                    relays=servers.relays,
                    server_pids=servers.pids,
                    keep=servers.keep,
                )
                self._children.append(await worker.start(task))
            await asyncio.gather(*(worker.ready() for worker in workers))
            self._at_gate = False
            await self._gate.ready()
            if not any(worker.over for worker in workers):
                for worker in workers:
                    worker.go()
                await asyncio.gather(*(worker.finished() for worker in workers))
        finally:
            await stop_all(self._children)
        for worker in workers:
            if worker.error and worker.error not in self.errors:
                self.errors.append(worker.error)
        return [worker.totals for worker in workers if worker.totals is not None]

    def close(self) -> None:
        """Keep nobody waiting at the gate."""
        if self._at_gate:
            self._at_gate = False
            self._gate.dropped()


class Worker:
    """One clone's process, from this side.

    Attributes:
        totals: What it has counted, None if it could not begin.
        error: Why it failed or ended early; empty if it did not.
    """

    def __init__(self, job: Job, clone: int, watcher: Watcher) -> None:
        self.clone = clone
        self.totals: Totals | None = None
        self.error = ""
        self._job = job
        self._watcher = watcher
        self._ready = asyncio.Event()
        self._over = asyncio.Event()
        self._going = False
        self._heard_at = time.monotonic()
        # Touching memory says nothing until it is done.
        self._silence_max_s = SILENCE_MAX_S + job.deadline + job.size / (256 * 1024 * 1024)
        self._child: Child

    @property
    def over(self) -> bool:
        """Whether it has finished, one way or the other."""
        return self._over.is_set()

    async def start(self, task: Task) -> Child:
        """Start the process and tell it what to do."""
        name = f"{self._job.name}.{self.clone}"
        self._child = await Child.start(name, "kvstore_bench.worker", (), self._hear, self._pass_on)
        self._child.say(msgspec.json.encode(task).decode())
        self._watch_task = asyncio.create_task(self._watch())
        return self._child

    async def ready(self) -> None:
        """Wait until it is set up, or has failed."""
        await self._ready.wait()

    def go(self) -> None:
        """Let it begin."""
        self._heard_at = time.monotonic()
        self._going = True
        self._child.say("go")

    async def finished(self) -> None:
        """Wait until it has said how it went, or has failed."""
        await self._over.wait()

    def _hear(self, line: str) -> None:
        self._heard_at = time.monotonic()
        try:
            report = _REPORTS.decode(line)
        except msgspec.DecodeError as error:
            self._end(f"{self._child.name} said {line[:80]!r}: {error}")
            return
        self._watcher.report(self._job, self.clone, report)
        match report:
            case Ready():
                self._ready.set()
            case Finished(reason, totals):
                self.totals = totals
                self._end(reason or (totals.error if totals else ""))
            case Step() | Progress():
                pass

    def _pass_on(self, line: str) -> None:
        # Warnings of a worker; the traceback of one that ends becomes its job's error.
        if line.startswith(LOG_PREFIX):
            self._watcher.warning(f"{self._child.name}: {line.removeprefix(LOG_PREFIX)}")

    def _end(self, error: str) -> None:
        self.error = self.error or error
        self._ready.set()
        self._over.set()

    async def _watch(self) -> None:
        """Notice a process that ends without a result, or says nothing any more."""
        ended = asyncio.ensure_future(self._child.ended())
        try:
            while not ended.done():
                waits_for_us = self._ready.is_set() and not self._going
                silent_s = time.monotonic() - self._heard_at
                if silent_s > self._silence_max_s and not waits_for_us:
                    self._end(f"{self._child.name} has said nothing for {silent_s:.0f} s")
                    self._child.kill()
                await asyncio.wait((ended,), timeout=1)
        finally:
            ended.cancel()
        if not self.over:
            self._end(self._child.story())
