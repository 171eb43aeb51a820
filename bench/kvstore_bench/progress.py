"""What a terminal shows while jobs run: one line, written over and over, as fio's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from kvstore.units import format_size_bytes
from kvstore_bench.job import Job
from kvstore_bench.runner import JobResult, Watcher
from kvstore_bench.worker import Progress, Report, Step

_CLEAR = "\r\033[K"
_LETTERS = {"read": "R", "write": "W", "randread": "r", "randwrite": "w", "rw": "M", "randrw": "m"}


class Quiet(Watcher):
    """Shows warnings only.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def warning(self, text: str) -> None:
        """On a line of its own."""
        self._stream.write(f"kvbench run: {text}\n")
        self._stream.flush()


class ProgressLine(Watcher):
    """Shows bandwidth and the time that is left.

    Args:
        stream: A terminal.
        trials: Of how many.
    """

    def __init__(self, stream: TextIO, trials: int) -> None:
        self._stream = stream
        self._trials = trials
        self._trial = 0
        self._jobs: Sequence[Job] = ()
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}
        self._began_at = 0.0
        self._last: tuple[float, int, int] = (0.0, 0, 0)
        self._rates = (0.0, 0.0)

    def group_begins(self, trial: int, jobs: Sequence[Job]) -> None:
        """Show that something is being set up."""
        self._trial, self._jobs = trial, jobs
        self._seen.clear()
        self._began_at = 0.0
        self._show(f"{', '.join(job.name for job in jobs)}: start")

    def report(self, job: Job, clone: int, report: Report) -> None:
        """Show how far a clone, or all of them, are."""
        match report:
            case Step(what, done, total):
                of = f"{format_size_bytes(done)}/{format_size_bytes(total)}"
                self._show(f"{job.name}: {what} {of}")
            case Progress(read, written):
                self._seen[job.name, clone] = (read, written)
                self._show(self._status(time.monotonic()))

    def warning(self, text: str) -> None:
        """On a line of its own, above the progress."""
        self._stream.write(f"{_CLEAR}kvbench run: {text}\n")
        self._stream.flush()

    def going(self) -> None:
        """The time runs from now."""
        self._began_at = time.monotonic()
        self._last = (self._began_at, 0, 0)
        self._rates = (0.0, 0.0)

    def group_ends(self, results: Sequence[JobResult]) -> None:
        """Leave the terminal clean."""
        self._stream.write(_CLEAR)
        self._stream.flush()

    def _status(self, now: float) -> str:
        read = sum(bytes for bytes, _ in self._seen.values())
        written = sum(bytes for _, bytes in self._seen.values())
        at, last_read, last_written = self._last
        if now - at >= 0.2:
            self._rates = ((read - last_read) / (now - at), (written - last_written) / (now - at))
            self._last = (now, read, written)
        count = sum(job.numjobs for job in self._jobs)
        kinds = "".join(f"{_LETTERS[job.rw]}({job.numjobs})" for job in self._jobs)
        part = max((self._part(job, now) for job in self._jobs), default=0.0)
        shown = f"[r={_rate(self._rates[0])}]" if any(job.reads for job in self._jobs) else ""
        shown += f"[w={_rate(self._rates[1])}]" if any(job.writes for job in self._jobs) else ""
        left_s = (now - self._began_at) * (1 - part) / part if part > 0.001 else 0.0
        eta = f"{int(left_s) // 60:02d}m:{int(left_s) % 60:02d}s"
        return f"Jobs: {count} (f={count}): [{kinds}][{part:.1%}]{shown}[eta {eta}]"

    def _part(self, job: Job, now: float) -> float:
        """How much of a job is done, 0 to 1."""
        moved = sum(sum(pair) for (name, _), pair in self._seen.items() if name == job.name)
        elapsed_s = now - self._began_at
        by_time = elapsed_s / (job.ramp_time + job.runtime) if job.runtime else 0.0
        by_size = 0.0 if job.time_based else moved / (job.size * job.numjobs)
        return min(1.0, max(by_time, by_size))

    def _show(self, text: str) -> None:
        trial = f"[{self._trial}/{self._trials}] " if self._trials > 1 else ""
        self._stream.write(f"{_CLEAR}{trial}{text}")
        self._stream.flush()


def _rate(bytes_per_s: float) -> str:
    return f"{format_size_bytes(round(bytes_per_s))}/s"
