"""The memory of the machine: whether a region fits into it, and its first touch."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.service.memory import (
    PROCESS_BYTES,
    SystemMemory,
    TouchProgress,
    allocate,
    check_memory,
    read_system_memory,
    touch,
)

MIB, GIB, TIB = 1024**2, 1024**3, 1024**4


def test_memory_that_fits_is_taken() -> None:
    check_memory(GIB, SystemMemory(available_bytes=GIB + PROCESS_BYTES))
    check_memory(GIB, SystemMemory(available_bytes=TIB, commit_left_bytes=TIB, group_bytes=TIB))


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (SystemMemory(available_bytes=GIB), "1GiB are available (MemAvailable"),
        (SystemMemory(available_bytes=GIB + PROCESS_BYTES - 1), "1.12GiB are available"),
        (SystemMemory(available_bytes=TIB, commit_left_bytes=512 * MIB), "512MiB may still be"),
        (SystemMemory(available_bytes=TIB, commit_left_bytes=-MIB), "0B may still be committed"),
        (SystemMemory(available_bytes=TIB, group_bytes=GIB), "1GiB are allowed to its control"),
    ],
)
def test_memory_that_does_not_fit_is_refused(memory: SystemMemory, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(GIB, memory)
    assert caught.value.option == "--memory"
    assert caught.value.value == "1GiB"
    assert words in caught.value.remedy
    assert "128MiB of them are for the process itself" in caught.value.remedy


def fake_system(root: Path, overcommit: int, group: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        "MemTotal:       2000 kB\nMemAvailable:   1000 kB\nCommitLimit:     900 kB\n"
        "Committed_AS:    200 kB\nHugePages_Total:       0\n"
    )
    (root / "proc/sys/vm/overcommit_memory").write_text(f"{overcommit}\n")
    (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{group}\n")
    return root


def test_reads_what_the_kernel_says(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 0, "/")
    assert read_system_memory(root) == SystemMemory(available_bytes=1000 * 1024)


def test_counts_promises_where_the_kernel_counts_them(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 2, "/")
    assert read_system_memory(root).commit_left_bytes == 700 * 1024


def test_the_lowest_limit_of_the_control_groups_around_us_counts(tmp_path: Path) -> None:
    root = fake_system(tmp_path, 0, "/system.slice/kvstored.service")
    group = root / "sys/fs/cgroup/system.slice/kvstored.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("5000000\n")
    assert read_system_memory(root).group_bytes == 5_000_000
    (group / "memory.max").write_text("4000000\n")
    assert read_system_memory(root).group_bytes == 4_000_000


def test_this_system_can_be_asked() -> None:
    assert read_system_memory().available_bytes > 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_on_a_terminal_is_one_line_that_goes_away() -> None:
    terminal, clock = io.StringIO(), Clock()
    progress = TouchProgress("kvstored", "arena", terminal, clock)
    progress(64 * MIB, GIB)
    assert terminal.getvalue() == ""
    clock.now = 0.1
    progress(128 * MIB, GIB)
    progress(192 * MIB, GIB)
    progress(GIB, GIB)
    line = "kvstored: arena: 128MiB of 1GiB touched"
    assert terminal.getvalue() == f"\r\x1b[K{line}\r\x1b[K"


def test_progress_in_a_log_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = TouchProgress("kvstored", "arena", None, clock)
    for second in range(25):
        clock.now = float(second)
        progress(second * GIB, 100 * GIB)
    assert caplog.messages == [
        "arena: 10GiB of 100GiB touched",
        "arena: 20GiB of 100GiB touched",
    ]


def test_a_region_is_allocated_and_touched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    region = allocate(MIB, "kvtest")
    try:
        touch(region, "kvtest", "memory")
        assert region.view.nbytes == MIB
        assert caplog.messages == ["touching 1MiB of memory"]
    finally:
        region.close()


def test_a_region_that_no_machine_has_is_refused_before_it_is_mapped() -> None:
    with pytest.raises(ConfigError) as caught:
        allocate(1 << 60, "kvtest")
    assert caught.value.option == "--memory"
