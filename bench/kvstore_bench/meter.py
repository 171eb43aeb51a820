"""What is counted while a job runs: latencies, bytes, outcomes, processor time.

The times of an I/O, as fio defines them: `slat` from the beginning of its submission until the
call returns, `clat` from then until its last byte is there and verified, `lat` both together. With
a rate, `wait` is the time from when an I/O was due until it began, and `lat` all three.

An I/O counts if it was submitted after the ramp; the run ends with the last of them.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from kvstore_bench.children import cpu_ns
from kvstore_bench.histogram import Histogram, Snapshot
from kvstore_bench.job import Job
from kvstore_bench.sampling import Windows

# How often a job says how far it is.
PROGRESS_INTERVAL_NS = 250_000_000

clock_ns = time.monotonic_ns


class Travelled(NamedTuple):
    """Some bytes of an I/O: by which path they came or went, and what moved them here."""

    path: str
    transport: str
    size_bytes: int


class Usage(msgspec.Struct, frozen=True):
    """What this process, and the servers that it watches, have used so far.

    Attributes:
        at_ns: Of the monotonic clock, which all processes of a host share.
        user_ns: Without threads that spin in this process.
        server_ns: Processor time of the servers; None if that is not known.
        spin_ns: Processor time of threads that spin, here or beside.
    """

    at_ns: int
    user_ns: int
    system_ns: int
    server_ns: int | None
    switches: int
    major_faults: int
    minor_faults: int
    spin_ns: int = 0


def usage(server_pids: Sequence[int], spin_ns: int = 0, spin_outside: bool = False) -> Usage:
    """What was used until now.

    Args:
        spin_ns: By threads that spin.
        spin_outside: Whether they do so in another process.
    """
    own = resource.getrusage(resource.RUSAGE_SELF)
    servers = [cpu_ns(pid) for pid in server_pids]
    known = [used for used in servers if used is not None]
    return Usage(
        at_ns=clock_ns(),
        user_ns=int(own.ru_utime * 1e9) - (0 if spin_outside else spin_ns),
        system_ns=int(own.ru_stime * 1e9),
        server_ns=sum(known) if servers and len(known) == len(servers) else None,
        switches=own.ru_nvcsw + own.ru_nivcsw,
        major_faults=own.ru_majflt,
        minor_faults=own.ru_minflt,
        spin_ns=spin_ns,
    )


class DirectionTotals(msgspec.Struct, frozen=True):
    """All reads, or all writes, that count.

    Attributes:
        bytes: Of blocks that were read and are right, or were stored.
        ios: I/Os that ended.
        short_ios: Of those, the ones with blocks that were not there, or not stored.
        transports, paths: Bytes that travelled, by what moved them here and by the path.
        wait: From when they were due until they began; None without a rate.
        windows: What ended when.
        first: From when they were due until the first group of layers was there; None if no
            layers come in groups.
    """

    bytes: int
    ios: int
    short_ios: int
    slat: Snapshot
    clat: Snapshot
    lat: Snapshot
    transports: dict[str, int] = {}
    paths: dict[str, int] = {}
    wait: Snapshot | None = None
    windows: Windows = msgspec.field(default_factory=Windows)
    first: Snapshot | None = None


class Totals(msgspec.Struct, frozen=True):
    """How one clone of a job went.

    Attributes:
        outcomes: Blocks by outcome ("hit", "miss", "stored", ...).
        began, ended: What was used at the two ends of what counts.
        error: Why it ended early; empty if it did not.
        wrong_blocks: Blocks that were read and are not what was written.
        checked_blocks: Blocks that were compared with what was written.
        verify_us: What servers took to compare views with their checksums.
        behind_ns: How long before the end the first I/O was due that never began.
    """

    read: DirectionTotals
    write: DirectionTotals
    outcomes: dict[str, int]
    began: Usage
    ended: Usage
    error: str
    wrong_blocks: int
    checked_blocks: int
    verify_us: int = 0
    behind_ns: int = 0


class Direction:
    """Reads, or writes, while they happen."""

    def __init__(self, paced: bool) -> None:
        self.bytes = 0
        self.ios = 0
        self.short_ios = 0
        self.slat = Histogram()
        self.clat = Histogram()
        self.lat = Histogram()
        self.wait = Histogram() if paced else None
        self.windows = Windows()
        self.first: Histogram | None = None
        self.transports: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()

    def totals(self) -> DirectionTotals:
        """As a value."""
        return DirectionTotals(
            bytes=self.bytes,
            ios=self.ios,
            short_ios=self.short_ios,
            slat=self.slat.snapshot(),
            clat=self.clat.snapshot(),
            lat=self.lat.snapshot(),
            wait=self.wait.snapshot() if self.wait is not None else None,
            windows=self.windows,
            first=self.first.snapshot() if self.first is not None else None,
            transports=dict(self.transports),
            paths=dict(self.paths),
        )


class Meter:
    """Counts one clone of a job; says when it is over.

    Args:
        server_pids: Processes whose time counts as the servers'.
        on_progress: Called now and then with (bytes read, bytes written) so far, those of
            the ramp included.
        spin_ns: Processor time of the threads that spin, so far.

    Attributes:
        outcomes: Blocks by outcome, those of the ramp left out.
    """

    def __init__(
        self,
        job: Job,
        server_pids: Sequence[int],
        on_progress: Callable[[int, int], None],
        spin_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        paced = bool(job.io_interval_s)
        self.read = Direction(paced)
        self.write = Direction(paced)
        self.outcomes: Counter[str] = Counter()
        self.error = ""
        self.wrong_blocks = 0
        self.checked_blocks = 0
        self.verify_us = 0
        self.behind_ns = 0
        self._pids = server_pids
        self._on_progress = on_progress
        self._spin_ns = spin_ns
        self._spin_outside = job.spin_outside
        self._seen = [0, 0]
        self._progress_at_ns = 0
        self._ramp_ns = int(job.ramp_time * 1e9)
        self._runtime_ns = int(job.runtime * 1e9)
        self._counts_from_ns = 0
        self._ends_at_ns = 0
        self._began: Usage | None = None
        self._last_ns = 0

    def start(self) -> tuple[int, int]:
        """The clock runs from now on; when that is, and when it is over (0: by size only)."""
        now = clock_ns()
        self._progress_at_ns = now
        self._counts_from_ns = now + self._ramp_ns
        self._ends_at_ns = self._counts_from_ns + self._runtime_ns if self._runtime_ns else 0
        return now, self._ends_at_ns

    def counts(self, began_ns: int) -> bool:
        """Whether an I/O that begins at this time counts."""
        if began_ns < self._counts_from_ns:
            return False
        if self._began is None:
            self._began = self._usage()
        return True

    def over(self, now_ns: int) -> bool:
        """Whether no further I/O may begin."""
        return bool(self.error) or 0 < self._ends_at_ns <= now_ns

    def completed(
        self,
        is_read: bool,
        times_ns: tuple[int, int, int],
        good_bytes: int,
        short: bool,
        waited_ns: int = 0,
    ) -> None:
        """Count one I/O that counts.

        Args:
            times_ns: When it began, when it was submitted, when it had ended.
            good_bytes: Of blocks that are there, or were stored.
            short: Whether that is less than it should be.
            waited_ns: From when it was due until it began.
        """
        direction = self.read if is_read else self.write
        began_ns, submitted_ns, ended_ns = times_ns
        direction.ios += 1
        direction.bytes += good_bytes
        direction.short_ios += short
        direction.windows.record(ended_ns, good_bytes)
        direction.slat.record(submitted_ns - began_ns)
        direction.clat.record(ended_ns - submitted_ns)
        direction.lat.record(waited_ns + ended_ns - began_ns)
        if direction.wait is not None:
            direction.wait.record(waited_ns)

    def first_came(self, after_ns: int) -> None:
        """The first group of layers of a read that counts was there so long after it was due."""
        if self.read.first is None:
            self.read.first = Histogram()
        self.read.first.record(after_ns)

    def travelled(self, is_read: bool, runs: Sequence[Travelled]) -> None:
        """Count how the bytes of an I/O that counts came, or went."""
        direction = self.read if is_read else self.write
        for path, transport, size_bytes in runs:
            direction.paths[path] += size_bytes
            direction.transports[transport] += size_bytes

    def seen(self, is_read: bool, byte_count: int, now_ns: int) -> None:
        """Note bytes for the progress, whether or not they count."""
        self._seen[not is_read] += byte_count
        if now_ns >= self._progress_at_ns:
            self._progress_at_ns = now_ns + PROGRESS_INTERVAL_NS
            self._on_progress(*self._seen)

    def finish(self) -> None:
        """The last I/O has ended: what is used from now on does not count."""
        self._ended = self._usage()

    def _usage(self) -> Usage:
        return usage(self._pids, self._spin_ns(), self._spin_outside)

    def totals(self) -> Totals:
        """Everything that was counted, after `finish`."""
        return Totals(
            read=self.read.totals(),
            write=self.write.totals(),
            outcomes=dict(self.outcomes),
            began=self._began or self._ended,
            ended=self._ended,
            error=self.error,
            wrong_blocks=self.wrong_blocks,
            checked_blocks=self.checked_blocks,
            verify_us=self.verify_us,
            behind_ns=self.behind_ns,
        )
