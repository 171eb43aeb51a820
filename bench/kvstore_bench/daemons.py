"""Daemons and agents for one measurement: started, waited for, and gone afterwards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from kvstore.errors import KVStoreError
from kvstore.units import format_size_bytes
from kvstore_bench.children import Child, cpu_ns, stop_all

# Interpreter, imports, listeners: a second or two on a busy machine.
START_TIMEOUT_S = 20.0
# The arena is touched before the daemon listens; the slowest machines that were measured
# manage 1.3 GiB/s, and this leaves them a factor of five.
TOUCH_BPS_MIN = 256 * 1024 * 1024

# Where nobody says otherwise; the system chooses the port.
LOOPBACK = "tcp://127.0.0.1:0"

_LISTENING = re.compile(r"listening on (\S+)")


class DaemonFailed(KVStoreError):
    """Raised when a server that was started ends, or does not listen in time."""


class Command(NamedTuple):
    """A program that touches its memory and then logs where it listens.

    Attributes:
        name: What it is called in messages.
        module: The Python module that is run.
        options: Its command line, beside the memory.
    """

    name: str
    module: str
    options: Sequence[str]
    memory_bytes: int


class Servers:
    """Some servers, for `async with`.

    They are gone when the block is left, and also when this process ends in whatever way.

    Attributes:
        endpoints: Where they listen, in the order of the commands.
        pids: Their process ids, in the same order.

    Raises:
        DaemonFailed: On entry; says which, why, and the last lines of its log.
    """

    def __init__(self, commands: Sequence[Command]) -> None:
        self.endpoints: list[str] = []
        self.pids: list[int] = []
        self._commands = commands
        self._children: list[Child] = []

    async def __aenter__(self) -> Self:
        memory_bytes = sum(command.memory_bytes for command in self._commands)
        timeout_s = START_TIMEOUT_S + memory_bytes / TOUCH_BPS_MIN
        try:
            started = [await self._start(command) for command in self._commands]
            async with asyncio.timeout(timeout_s):
                for child, listening in started:
                    self.endpoints.append(await self._listening(child, listening))
        except TimeoutError:
            await self.__aexit__(None, None, None)
            place = len(self.endpoints)
            size = format_size_bytes(self._commands[place].memory_bytes)
            late = self._children[place]
            raise DaemonFailed(
                f"{late.name} (--memory {size}) does not listen after {timeout_s:.0f} s;"
                f" its log ends with: {' | '.join(late.log) or 'nothing'}"
            ) from None
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self.pids = [child.pid for child in self._children]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await stop_all(self._children)

    def cpu_ns(self) -> int | None:
        """Processor time of all of them so far; None if one is gone."""
        times = [cpu_ns(pid) for pid in self.pids]
        return None if None in times else sum(time for time in times if time is not None)

    def failures(self) -> list[str]:
        """How those ended that should still run."""
        return [child.story() for child in self._children if child.status is not None]

    async def _start(self, command: Command) -> tuple[Child, asyncio.Future[str]]:
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def hear(line: str) -> None:
            found = _LISTENING.search(line)
            if found and not listening.done():
                listening.set_result(found[1])

        arguments = ["--memory", str(command.memory_bytes), *command.options]
        child = await Child.start(command.name, command.module, arguments, hear, hear)
        self._children.append(child)
        return child, listening

    async def _listening(self, child: Child, listening: asyncio.Future[str]) -> str:
        ended = asyncio.ensure_future(child.ended())
        try:
            await asyncio.wait((ended, listening), return_when=asyncio.FIRST_COMPLETED)
            if not listening.done():
                raise DaemonFailed(child.story())
            return listening.result()
        finally:
            ended.cancel()


class Daemons(Servers):
    """Some `kvstored`, for `async with`.

    Args:
        count: How many.
        memory_bytes: Arena of each.
        options: Further words of their command line.
        listen: Where each listens; a unix socket is for one alone.

    Raises:
        DaemonFailed: On entry; says which, why, and the last lines of its log.
    """

    def __init__(
        self,
        count: int,
        memory_bytes: int,
        options: Sequence[str] = (),
        listen: str = LOOPBACK,
    ) -> None:
        words = [("--listen", listen, "--node-id", f"kvbench-{n}", *options) for n in range(count)]
        super().__init__(
            [
                Command(f"kvstored {number}", "kvstore_daemon", of_one, memory_bytes)
                for number, of_one in enumerate(words)
            ]
        )
