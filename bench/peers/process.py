"""The process of one peer, as the harness sees it: started, asked, ended."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from kvstore_bench.children import bound_program
from peers.catalogue import Entry
from peers.work import Work

# Of one answer: the slowest is a fill by a client that is slow.
ANSWER_TIMEOUT_S = 300.0
CLOSE_TIMEOUT_S = 15.0
LOG_LINES_MAX = 10

# For every process, so that no client and no server is measured with an allocator that gives
# each large value back to the system, and faults it in again for the next.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
BENCH = Path(__file__).resolve().parents[1]


class RunFailed(Exception):
    """Raised when a peer's process fails; says why, with the end of its log."""


class Missing(Exception):
    """Raised when a peer's environment lacks something; names it."""


class Process:
    """The process of one peer, for `async with`."""

    def __init__(self, entry: Entry, work: Work, venvs: Path, folder: Path) -> None:
        self.entry = entry
        self.work = work
        self._command = [
            str(entry.python(venvs)),
            "-P",
            "-m",
            "peers.worker",
            entry.spot,
            entry.variant,
            json.dumps(work.plain()),
            str(folder),
        ]
        self._log = folder / "client.log"
        self._folder = folder

    async def __aenter__(self) -> Process:
        path = os.pathsep.join((str(BENCH), os.environ.get("PYTHONPATH", "")))
        self._folder.mkdir()
        with self._log.open("wb") as log:
            # In a session of its own: Ctrl-C reaches us alone, who end it in order.
            self._process = await asyncio.create_subprocess_exec(
                *bound_program(self._command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path.rstrip(os.pathsep)},
            )
        return self

    async def __aexit__(self, *reason: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if reason[0] is not None and self._process.returncode is None:
            # Interrupted: it may be in the middle of something, and nobody wants to know.
            self._process.kill()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            # Its servers are bound to it and end when it does, however it does.
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def ask(self, action: str, **words: object) -> dict[str, Any]:
        """Have it do something.

        Raises:
            Missing: It lacks something that has to be installed.
            RunFailed: It failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, **words}).encode() + b"\n")
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                line = await self._process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            raise RunFailed(f"{self.entry.name}: {action}: no answer ({error!r})") from None
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "missing" in answer:
            raise Missing(answer["missing"])
        if "error" in answer:
            log = self._log.read_text(errors="replace").splitlines()[-LOG_LINES_MAX:]
            lines = "".join(f"\n    {line}" for line in log)
            raise RunFailed(f"{self.entry.name}: {action}: {answer['error']}{lines}")
        return answer
