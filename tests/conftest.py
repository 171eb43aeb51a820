"""Settings for every test run: repeatable randomness, asyncio's own checks, no one left behind;
and the devices that many tests imitate."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kvstore.transport import verbs
from tests.support.fakeverbs import FakeVerbs

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

# Set here and not only in the Makefile, so that a single test run by hand checks the same;
# processes that tests start inherit it.
os.environ.setdefault("PYTHONASYNCIODEBUG", "1")

# The default run gives the same verdict on the same code each time; the search is for
# whoever wants to find more: pytest --hypothesis-profile=search tests/property
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=1, help="seed of the tests that draw numbers")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')} (repeat a run with --seed)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed for everything random in a test; shown with a failure."""
    value = int(request.config.getoption("seed"))
    print(f"seed: {value}")
    return value


@pytest.fixture
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeVerbs]:
    """Imitated devices: two, or as many as `parametrize("fake", ..., indirect=True)` says."""
    made = FakeVerbs(tmp_path, device_count=getattr(request, "param", 2))
    yield made
    made.close()


@pytest.fixture
def system(fake: FakeVerbs, monkeypatch: pytest.MonkeyPatch) -> FakeVerbs:
    """The same in place of the system's: clients and servers find them."""
    monkeypatch.setattr(verbs, "system_verbs", lambda: fake)
    return fake


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the run if a process that a test has started, or a child of it, outlives the tests."""
    # Orphans become our children, so that none hides behind a parent that has ended.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    left = _living_children()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left behind: {left}"


def _living_children() -> dict[int, str]:
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command's name is in brackets and may contain anything; see proc(5).
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # ended meanwhile
        # Python's own tracker of shared memory ends with us.
        if int(parent) == os.getpid() and state != "Z" and "resource_tracker" not in command:
            found[int(stat.parent.name)] = command
    return found
