"""Servers of other people: a child bound to this process, its log in a file, and its end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvstore_bench.children import STOP_TIMEOUT_S, bound_program
from peers.base import CALL_TIMEOUT_S, PeerFailed

# A Python server imports its libraries first.
START_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02
LOG_LINES_MAX = 10
LOG_TAIL_BYTES = 8 * 1024


class Server:
    """One server, running.

    Args:
        name: What it is called in messages.
        program: Its path and its arguments.
        log: Where what it says goes.
    """

    def __init__(
        self,
        name: str,
        program: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                bound_program(program),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._process.pid

    def until_listening(self, address: str | tuple[str, int]) -> None:
        """Wait until somebody can connect to it.

        Args:
            address: Host and port, or the path of a socket.

        Raises:
            PeerFailed: It ended, or does not listen in time; has the end of its log.
        """
        ends_at = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                connect(address).close()
                return
            except OSError as error:
                self.check(f"cannot be reached at {address}: {error}", ends_at)

    def until_said(self, word: str) -> None:
        """Wait until its log has a word.

        Raises:
            PeerFailed: It ended, or does not say it in time.
        """
        ends_at = time.monotonic() + START_TIMEOUT_S
        while word not in self._log.read_text(errors="replace"):
            self.check(f"does not say {word!r}", ends_at)

    def check(self, what: str, ends_at: float) -> None:
        """Wait a moment, unless there is no more reason to.

        Raises:
            PeerFailed: It has ended, or it is too late.
        """
        status = self._process.poll()
        if status is not None:
            raise PeerFailed(f"{self.name} ended with status {status}{self.story()}")
        if time.monotonic() >= ends_at:
            raise PeerFailed(f"{self.name} {what}{self.story()}")
        time.sleep(POLL_INTERVAL_S)

    def story(self) -> str:
        """The last lines of its log, for an error."""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES_MAX:]
        return "".join(f"\n    {line}" for line in lines)

    def stop(self) -> None:
        """End it and wait for that."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(signum)
                try:
                    self._process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    continue


def connect(address: str | tuple[str, int]) -> socket.socket:
    """A connection that sends at once what it is given, and whose calls end."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(CALL_TIMEOUT_S)
        sock.connect(address)
        # A limit of the system's and not Python's, which would poll before every call.
        sock.settimeout(None)
        limit = struct.pack("ll", int(CALL_TIMEOUT_S), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def free_port() -> int:
    """A port of loopback on which nobody listens now, for servers that cannot say which they
    took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def program_path(name: str) -> str:
    """Where a program of the distribution is; empty if nowhere."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or ""


def first_line(program: Sequence[str]) -> str:
    """What a program says of its version."""
    said = subprocess.run(program, capture_output=True, text=True, check=False, timeout=30)
    return ((said.stdout or said.stderr).splitlines() or [""])[0]
