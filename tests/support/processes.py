"""Real processes of daemon and agent: started for a test, waited for, and gone when it ends.

::

    with daemon("--memory", "64MiB") as kvstored, agent("--storage", kvstored.uri) as kvagent:
        ... kvagent.uri ...

Leaving the block stops the process with SIGTERM, unless the test has ended it, and checks that
it ended well: status 0 and no traceback in its log.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.support.tree import PACKAGES

# A test that waits this long for what should take a second has failed.
PATIENCE_S = 60.0

# What `python -m` runs for each command.
_MODULES = {"kvstored": "kvstore_daemon", "kvagent": "kvstore_client.agent"}


class Daemon:
    """One `kvstored`, or another command that serves.

    Attributes:
        command: Its name.
        runner: A module that runs that of the command, if Python itself does not.
        lines: Its log so far.
    """

    command = "kvstored"
    runner: tuple[str, ...] = ()

    def __init__(self, *options: str, environment: dict[str, str] | None = None) -> None:
        self._listening = re.compile(rf"{self.command}: listening on (\S+)$")
        path = ":".join(dict.fromkeys(str(directory.parent) for directory in PACKAGES.values()))
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *self.runner, _MODULES[self.command], *options],
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(
            target=self._read, name=f"log of {self.command}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def log(self) -> str:
        """Its log so far, as one text."""
        return "\n".join(self.lines)

    @property
    def uris(self) -> list[str]:
        """Where it listens."""
        return [found[1] for line in list(self.lines) if (found := self._listening.search(line))]

    @property
    def uri(self) -> str:
        """Where it listens, if that is one place."""
        (uri,) = self.uris
        return uri

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def wait_for_line(self, text: str) -> str:
        """The first line of the log that contains `text`, as soon as there is one."""

        def line() -> str | None:
            return next((line for line in self.lines if text in line), None)

        self._wait(lambda: line() is not None, f"a line with {text!r}")
        found = line()
        assert found is not None
        return found

    def wait_until_listening(self, count: int = 1) -> None:
        """Return when it serves on `count` endpoints."""
        self._wait(lambda: len(self.uris) >= count, f"{count} endpoints")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, as soon as it has ended and its log is complete."""
        status = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def resident_bytes_max(self) -> int:
        """The most memory that it ever had in RAM, the arena included."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM: the process has ended")

    def close(self) -> None:
        """End it in any case."""
        if self.running:
            self._process.kill()
        self.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with self._news:
            self._news.wait_for(lambda: condition() or self._ended, PATIENCE_S)
            assert condition(), f"waited in vain for {what}; the log:\n{self.log}"


class AgentProcess(Daemon):
    """One `kvagent`."""

    command = "kvagent"


@contextmanager
def daemon(
    *options: str,
    environment: dict[str, str] | None = None,
    listeners: int = 1,
    kind: type[Daemon] = Daemon,
) -> Iterator[Daemon]:
    """Run `kvstored` on a port of its own, or where `--listen` says; it serves when this enters.

    Args:
        options: As on its command line; 16 MiB of memory unless they say otherwise.
        environment: Variables beside those of the tests.
        listeners: How many endpoints `options` name.
        kind: Another `Daemon`.
    """
    with _running(kind(*_small(options), environment=environment), listeners) as process:
        yield process


@contextmanager
def agent(
    *options: str,
    environment: dict[str, str] | None = None,
    listeners: int = 1,
    kind: type[AgentProcess] = AgentProcess,
) -> Iterator[AgentProcess]:
    """Run `kvagent`, which needs `--storage`; for the rest as `daemon`.

    Args:
        listeners: How many endpoints `options` name, that of `--local` included.
        kind: Another `AgentProcess`.
    """
    made = kind(*_small(options), environment=environment)
    with _running(made, listeners) as process:
        yield process


def _small(options: tuple[str, ...]) -> tuple[str, ...]:
    """On a port of its own and in little memory, unless `options` say otherwise."""
    if "--listen" not in options:
        options = ("--listen", "tcp://127.0.0.1:0", *options)
    if "--memory" not in options:
        options = ("--memory", "16MiB", *options)
    return options


ProcessT = TypeVar("ProcessT", bound=Daemon)


@contextmanager
def _running(process: ProcessT, listeners: int) -> Iterator[ProcessT]:
    try:
        process.wait_until_listening(listeners)
        yield process
        if process.running:
            process.signal(signal.SIGTERM)
            assert process.wait() == 0, process.log
        assert "Traceback" not in process.log, process.log
        assert "internal error" not in process.log, process.log
    finally:
        process.close()


def failed_start(*options: str, kind: type[Daemon] = Daemon) -> tuple[int, list[str]]:
    """Run a `kvstored`, or another `kind`, that cannot start; its exit status and all it said."""
    process = kind(*options)
    try:
        return process.wait(), process.lines
    finally:
        process.close()
