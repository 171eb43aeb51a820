"""Child processes that never outlive their parent, and the processor time that they use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

# <linux/prctl.h>: the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1
# How long a child that was asked to end may take before it is killed.
STOP_TIMEOUT_S = 5.0
# Lines of a child's log that are kept, to say why it ended.
LOG_LINES_MAX = 20
# A longer line of a child is cut by the reader's buffer; the results of a job are the longest.
LINE_BYTES_MAX = 4 * 1024 * 1024

# Runs in the child before its program: SIGKILL when the parent ends, however it ends. (Work
# between fork and exec would not be safe in a parent with threads.) The second look at the
# parent closes the gap in which it may have ended before.
_BIND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(%d, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]): os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def bound_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a Python module in a child bound to this process."""
    # -P: what lies in the working directory must not take the place of installed packages.
    return bound_program([sys.executable, "-P", "-m", module, *arguments])


def bound_program(program: Sequence[str]) -> list[str]:
    """The command that runs a program, by its path, in a child bound to this process."""
    bind = _BIND % _PR_SET_PDEATHSIG
    return [sys.executable, "-IS", "-c", bind, str(os.getpid()), *program]


def cpu_ns(pid: int) -> int | None:
    """Processor time of a process so far, all threads together; None if it is gone.

    The clock id is that of clock_getcpuclockid(3), which Python does not offer.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


class Child:
    """One child process: what it says on standard output and error, and its end.

    Args:
        name: What it is called in messages.
        on_line: Called with each line of standard output.
        on_log: Called with each line of standard error; the last ones are kept anyway.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        on_line: Callable[[str], None] | None,
        on_log: Callable[[str], None] | None,
    ) -> None:
        self.name = name
        self.pid = process.pid
        self.log: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._process = process
        self._tasks = [
            asyncio.create_task(self._read(process.stdout, on_line)),
            asyncio.create_task(self._read(process.stderr, self.log.append, on_log)),
        ]
        self._ended = asyncio.create_task(self._end())

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        arguments: Sequence[str] = (),
        on_line: Callable[[str], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> Child:
        """Start a Python module as a child in a session of its own.

        In a session of its own, so that Ctrl-C reaches the parent alone, which then ends its
        children in order.
        """
        process = await asyncio.create_subprocess_exec(
            *bound_command(module, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
        return cls(name, process, on_line, on_log)

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs; -n after signal n."""
        return self._process.returncode

    def say(self, line: str) -> None:
        """Write a line to its standard input; a child that is gone does not hear it."""
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(line.encode() + b"\n")

    async def ended(self) -> int:
        """Wait for its end, and until all that it said was read; its exit status."""
        return await asyncio.shield(self._ended)

    def story(self) -> str:
        """How it ended and the last lines of its log, for an error."""
        status = self.status
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        lines = "".join(f"\n    {line}" for line in self.log)
        return f"{self.name} ended with {how}{':' if lines else ' and without a word'}{lines}"

    async def stop(self) -> None:
        """Ask it to end, kill it if it does not, and wait for it."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if self.status is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.ended()
        # A grandchild may hold the pipes open; nothing more of interest comes from them.
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._ended, return_exceptions=True)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """Kill it without waiting."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _end(self) -> int:
        status = await self._process.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return status

    async def _read(
        self,
        stream: asyncio.StreamReader | None,
        *hearers: Callable[[str], None] | None,
    ) -> None:
        assert stream is not None
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip("\n")
            for hearer in hearers:
                if hearer is not None:
                    hearer(text)


async def stop_all(children: Sequence[Child]) -> None:
    """Stop children side by side; goes on to the end even if the caller is cancelled."""
    stopping: Awaitable[object] = asyncio.gather(
        *(child.stop() for child in children), return_exceptions=True
    )
    task = asyncio.ensure_future(stopping)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
