"""A node of a shaped network: its links, and the processes that run in it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError
from kvstore_bench.children import LINE_BYTES_MAX, Child
from kvstore_bench.shaped.namespaces import NetworkNamespace

if TYPE_CHECKING:
    from kvstore_bench.shaped.network import Link

DAEMON_PORT = 7450
AGENT_PORT = 7460
# Interpreter, imports, touching the arena: a second or two, but many may start at once.
LISTEN_TIMEOUT_S = 60.0

_LISTENING = re.compile(r"listening on (\S+)")


class NodeFailed(KVStoreError):
    """Raised when a process in a node ends badly, or does not listen in time; says why."""


class Node:
    """One node.

    Args:
        name: Unique in its network.
        namespace: Where its processes run.

    Attributes:
        links: By the name of the network.
        children: What was started in it; the network stops what still runs.
    """

    def __init__(self, name: str, namespace: NetworkNamespace, links: Mapping[str, Link]) -> None:
        self.name = name
        self.namespace = namespace
        self.links = links
        self.children: list[Child] = []

    def address(self, network: str) -> str:
        """Its IP address on a network."""
        return self.links[network].address

    def python(self, module: str, arguments: Sequence[str] = ()) -> list[str]:
        """The command that runs a Python module in this node, for whoever starts it himself.

        The process is bound to the one that starts it, which must be this one.
        """
        # -P: as in `bound_command`.
        return self.namespace.command([sys.executable, "-P", "-m", module, *arguments])

    async def start(
        self,
        module: str,
        arguments: Sequence[str] = (),
        on_line: Callable[[str], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> Child:
        """Start a Python module in this node; see `Child`."""
        process = await asyncio.create_subprocess_exec(
            *self.python(module, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
        child = Child(f"{module} in {self.name}", process, on_line, on_log)
        self.children.append(child)
        return child

    async def serve(
        self, module: str, arguments: Sequence[str], lines: list[str] | None = None
    ) -> Child:
        """Start a program that logs "listening on URI"; returns when it has said so once.

        Args:
            lines: Gets what it prints.

        Raises:
            NodeFailed: It ended, or is late; with the last lines of its log.
        """
        listening = asyncio.Event()

        def hear(line: str) -> None:
            if _LISTENING.search(line):
                listening.set()

        on_line = None if lines is None else lines.append
        child = await self.start(module, arguments, on_line, hear)
        waits = [asyncio.create_task(listening.wait()), asyncio.create_task(child.ended())]
        try:
            await asyncio.wait(waits, timeout=LISTEN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
        if child.status is not None:
            raise NodeFailed(child.story())
        if not listening.is_set():
            log = " | ".join(child.log) or "nothing"
            raise NodeFailed(
                f"{child.name} does not listen after {LISTEN_TIMEOUT_S:.0f} s; its log: {log}"
            )
        return child

    async def daemon(self, network: str, memory: str, options: Sequence[str] = ()) -> Child:
        """Start `kvstored` on its address on a network, on the usual port, under its own name."""
        return await self.serve(
            "kvstore_daemon",
            [
                *("--listen", self.uri(network), "--insecure"),
                *("--memory", memory, "--node-id", self.name),
                *options,
            ],
        )

    def uri(self, network: str, port: int = DAEMON_PORT) -> str:
        """Where something in this node listens."""
        return f"tcp://{self.address(network)}:{port}"

    async def answer(self, module: str, arguments: Sequence[str], timeout_s: float) -> Any:
        """Run a module that prints JSON and ends; what it has printed.

        Raises:
            NodeFailed: It ended with another status than 0, printed nothing, or took too long.
        """
        lines: list[str] = []
        child = await self.start(module, arguments, lines.append)
        return await self.answer_of(child, lines, timeout_s)

    async def answer_of(self, child: Child, lines: Sequence[str], timeout_s: float) -> Any:
        """The same for a child that runs already, whose lines go to `lines`."""
        try:
            async with asyncio.timeout(timeout_s):
                status = await child.ended()
        except TimeoutError:
            log = " | ".join(child.log) or "nothing"
            await child.stop()
            raise NodeFailed(
                f"{child.name} has not ended after {timeout_s:.0f} s; its log: {log}"
            ) from None
        finally:
            # Ends at once: it has ended, or the caller was cancelled.
            await child.stop()
            self.children.remove(child)
        if status or not lines:
            raise NodeFailed(child.story())
        return json.loads("\n".join(lines))


__all__ = ["AGENT_PORT", "DAEMON_PORT", "Node", "NodeFailed"]
