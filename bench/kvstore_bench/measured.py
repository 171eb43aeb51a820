"""What a job came to: its clones put together. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvstore_bench.histogram import Histogram
from kvstore_bench.job import Job
from kvstore_bench.meter import DirectionTotals, Totals
from kvstore_bench.runner import JobResult
from kvstore_bench.sampling import Windows

GIB = 1024**3
# What becomes of a block that is read.
_READ_WORDS = {"hit", "miss", "lost", "corrupt", "timeout", "unavailable"}


class MeasuredDirection:
    """All reads, or all writes, of a job.

    Attributes:
        bytes: Of blocks that were read and are right, or were stored.
        ios, short_ios: I/Os, and those of them with blocks that were missing or not stored.
        bw_bytes: Bytes a second.
        iops: I/Os a second.
        slat, clat, lat, wait: Latencies in nanoseconds.
        windows: What ended when.
        first: Until the first group of layers was there.
        transports, paths: Bytes that travelled, by what moved them and by the path; those of
            blocks that were sent again are in it twice.
    """

    def __init__(self, clones: Sequence[DirectionTotals], runtime_s: float) -> None:
        self.bytes = sum(clone.bytes for clone in clones)
        self.ios = sum(clone.ios for clone in clones)
        self.short_ios = sum(clone.short_ios for clone in clones)
        self.bw_bytes = self.bytes / runtime_s if runtime_s else 0.0
        self.iops = self.ios / runtime_s if runtime_s else 0.0
        self.slat, self.clat, self.lat = Histogram(), Histogram(), Histogram()
        self.wait = Histogram()
        self.windows = Windows()
        self.first = Histogram()
        self.transports: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        for clone in clones:
            self.transports.update(clone.transports)
            self.paths.update(clone.paths)
            self.slat.merge(clone.slat)
            self.clat.merge(clone.clat)
            self.lat.merge(clone.lat)
            self.windows.merge(clone.windows)
            if clone.first is not None:
                self.first.merge(clone.first)
            if clone.wait is not None:
                self.wait.merge(clone.wait)


def percent_of(part: float | None, whole: float) -> float | None:
    """A part in percent; None if it is not known, or nothing is the whole."""
    return None if part is None or not whole else 100 * part / whole


def measured(result: JobResult) -> Measured | None:
    """A result's clones put together; None if none of them could begin."""
    if not result.clones:
        return None
    return Measured(result.job, result.clones, result.server_known)


class Measured:
    """A job in one trial.

    Args:
        clones: At least one.
        server_known: Whether their servers' processor time was measured.

    Attributes:
        runtime_s: From the first I/O of any clone that counts to the end of the last.
        user_s, system_s: Processor time of the clones.
        server_s: Processor time of the servers; None if it is not known.
        spin_s: Processor time of threads that spin.
        verify_us_mean: What servers took to verify the views of an I/O.
        behind_s: How long before the end the first I/O was due that never began.
        outcomes: Blocks by outcome.
    """

    def __init__(self, job: Job, clones: Sequence[Totals], server_known: bool) -> None:
        began = [clone.began for clone in clones]
        ended = [clone.ended for clone in clones]
        pairs = list(zip(began, ended, strict=True))
        self.runtime_s = (max(e.at_ns for e in ended) - min(b.at_ns for b in began)) / 1e9
        self.read = MeasuredDirection([clone.read for clone in clones], self.runtime_s)
        self.write = MeasuredDirection([clone.write for clone in clones], self.runtime_s)
        # Two clocks, of which one is coarser: their difference may come out below nothing.
        self.user_s = max(0, sum(e.user_ns - b.user_ns for b, e in pairs)) / 1e9
        self.system_s = sum(e.system_ns - b.system_ns for b, e in pairs) / 1e9
        self.switches = sum(e.switches - b.switches for b, e in pairs)
        self.major_faults = sum(e.major_faults - b.major_faults for b, e in pairs)
        self.minor_faults = sum(e.minor_faults - b.minor_faults for b, e in pairs)
        # Percentages are of the time of one clone, as fio's are.
        self.clones_s = sum(e.at_ns - b.at_ns for b, e in pairs) / 1e9
        self.server_s = _server_s(clones, shared=job.ioengine == "kv") if server_known else None
        self.spin_s = sum(e.spin_ns - b.spin_ns for b, e in pairs) / 1e9
        self.wrong_blocks = sum(clone.wrong_blocks for clone in clones)
        self.checked_blocks = sum(clone.checked_blocks for clone in clones)
        verify_us = sum(clone.verify_us for clone in clones)
        self.verify_us_mean = verify_us / self.read.ios if self.read.ios else 0.0
        self.behind_s = max(clone.behind_ns for clone in clones) / 1e9
        self.outcomes: Counter[str] = Counter()
        for clone in clones:
            self.outcomes.update(clone.outcomes)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read.bytes + self.write.bytes

    @property
    def hit_percent(self) -> float | None:
        """Of the blocks that were read, those that came."""
        reads = sum(count for word, count in self.outcomes.items() if word in _READ_WORDS)
        return percent_of(self.outcomes["hit"], reads)

    @property
    def views_us(self) -> float:
        """What the views of an I/O took on average, until they were given back."""
        return self.read.lat.mean / 1e3

    @property
    def bw_bytes(self) -> float:
        """Bytes a second, read and written."""
        return self.read.bw_bytes + self.write.bw_bytes

    @property
    def client_s(self) -> float:
        """Processor time of the clones."""
        return self.user_s + self.system_s

    @property
    def client_s_per_gib(self) -> float | None:
        """Processor seconds of the clones a GiB."""
        return self.client_s * GIB / self.bytes if self.bytes else None

    @property
    def server_s_per_gib(self) -> float | None:
        """Processor seconds of the servers a GiB; None if not known."""
        return (
            self.server_s * GIB / self.bytes if self.bytes and self.server_s is not None else None
        )

    @property
    def cpu_s_per_gib(self) -> float | None:
        """Processor seconds of clones and servers a GiB; None if not known."""
        if self.client_s_per_gib is None or self.server_s_per_gib is None:
            return None
        return self.client_s_per_gib + self.server_s_per_gib

    @property
    def server_us_per_block(self) -> float | None:
        """Processor microseconds of the servers a block; None if not known."""
        blocks = sum(self.outcomes.values())
        return self.server_s * 1e6 / blocks if blocks and self.server_s is not None else None


def _server_s(clones: Sequence[Totals], shared: bool) -> float:
    """Clones share their daemons, and have a peer each with `raw`."""
    began = [clone.began.server_ns or 0 for clone in clones]
    ended = [clone.ended.server_ns or 0 for clone in clones]
    return (max(ended) - min(began) if shared else sum(ended) - sum(began)) / 1e9
