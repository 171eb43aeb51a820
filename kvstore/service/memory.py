"""The memory of the machine: whether what a process will hold fits into it, and its first touch.

A page that cannot be had kills the process without a word when it is touched (SIGBUS, or the
OOM killer), so that whether all of them fit is asked before.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import msgspec

from kvstore.buffers import Region
from kvstore.errors import ConfigError
from kvstore.units import format_size_bytes

logger = logging.getLogger(__name__)

# What the process takes beside its region, once it serves: interpreter, libraries, buffers.
PROCESS_BYTES = 128 * 1024 * 1024
# How often a start that takes long says so in a log.
LOG_INTERVAL_S = 10.0
# A terminal is written to no more often than an eye can follow.
TERMINAL_INTERVAL_S = 0.1

# vm.overcommit_memory, see proc(5): with 2 each page counts against a limit.
_OVERCOMMIT_NEVER = 2


class SystemMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the system would give us.

    Attributes:
        available_bytes: MemAvailable of /proc/meminfo: without swapping anything out.
        commit_left_bytes: What the kernel would still promise, where it counts promises
            (vm.overcommit_memory=2); else None.
        group_bytes: Lowest memory.max of our control groups (version 2); None without.
    """

    available_bytes: int
    commit_left_bytes: int | None = None
    group_bytes: int | None = None


def check_memory(size_bytes: int, memory: SystemMemory) -> None:
    """Refuse a `--memory` that does not fit.

    Raises:
        ConfigError: Says what would fit, and what limits it.
    """
    limits = [(memory.available_bytes, "are available (MemAvailable in /proc/meminfo)")]
    if memory.commit_left_bytes is not None:
        why = "may still be committed (CommitLimit in /proc/meminfo; vm.overcommit_memory is 2)"
        limits.append((memory.commit_left_bytes, why))
    if memory.group_bytes is not None:
        limits.append((memory.group_bytes, "are allowed to its control group (memory.max)"))
    limit_bytes, why = min(limits)
    if size_bytes + PROCESS_BYTES > limit_bytes:
        raise ConfigError(
            "--memory",
            format_size_bytes(size_bytes),
            f"does not fit: {format_size_bytes(max(0, limit_bytes))} {why}, and"
            f" {format_size_bytes(PROCESS_BYTES)} of them are for the process itself",
        )


def read_system_memory(root: Path = Path("/")) -> SystemMemory:
    """Ask the kernel. `root`: where /proc and /sys are."""
    sizes: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB":
            sizes[name] = int(number) * 1024
    overcommit = int((root / "proc/sys/vm/overcommit_memory").read_text())
    commit_left = sizes["CommitLimit"] - sizes["Committed_AS"]
    return SystemMemory(
        available_bytes=sizes["MemAvailable"],
        commit_left_bytes=commit_left if overcommit == _OVERCOMMIT_NEVER else None,
        group_bytes=_group_bytes(root),
    )


def _group_bytes(root: Path) -> int | None:
    """The lowest limit of our control group and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mount = root / "sys/fs/cgroup"
    limits: list[int] = []
    for line in lines:
        if not line.startswith("0::/"):
            continue  # version 1
        group = mount / line.removeprefix("0::/")
        while group.is_relative_to(mount):
            try:
                text = (group / "memory.max").read_text().strip()
            except OSError:
                text = "max"  # the root has none, and a container may not see what is above it
            if text.isdecimal():
                limits.append(int(text))
            group = group.parent
    return min(limits, default=None)


class TouchProgress:
    """Shows that memory is being touched: one line on a terminal, a log line now and then.

    Args:
        program: Name of the command, for the terminal's line; the log has it.
        what: What the memory is for, as in "arena".
        terminal: Where the line is rewritten; None to log.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self,
        program: str,
        what: str,
        terminal: TextIO | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self._what = what
        self._terminal = terminal
        self._clock = clock
        self._shown_at = clock()

    def __call__(self, done_bytes: int, size_bytes: int) -> None:
        """So many bytes of the memory are there."""
        now = self._clock()
        sizes = f"{format_size_bytes(done_bytes)} of {format_size_bytes(size_bytes)}"
        done = f"{self._what}: {sizes} touched"
        if self._terminal is None:
            if now - self._shown_at >= LOG_INTERVAL_S:
                self._shown_at = now
                logger.info("%s", done)
        elif done_bytes == size_bytes:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()
        elif now - self._shown_at >= TERMINAL_INTERVAL_S:
            self._shown_at = now
            self._terminal.write(f"\r\x1b[K{self._program}: {done}")
            self._terminal.flush()


def allocate(size_bytes: int, name: str) -> Region:
    """A region that fits into memory; its pages are still to be touched.

    Args:
        name: What the memory is called in /proc/<pid>/maps.

    Raises:
        ConfigError: It does not fit.
    """
    check_memory(size_bytes, read_system_memory())
    return Region(size_bytes, name)


def touch(region: Region, program: str, what: str) -> None:
    """Fault in all pages of a region, and show that it goes on. As for `TouchProgress`."""
    logger.info("touching %s of memory", format_size_bytes(region.size_bytes))
    terminal = sys.stderr if sys.stderr.isatty() else None
    region.touch(TouchProgress(program, what, terminal))
