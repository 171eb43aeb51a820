"""The parent's side of an engine in a node: any number of turns at once, each with its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from kvstore_bench.children import Child
from kvstore_bench.emulate.steps import (
    Decode,
    Decoded,
    FromEngine,
    Loaded,
    Prefill,
    Prefilled,
    Ready,
    Received,
    Release,
    Setup,
    ToEngine,
)
from kvstore_bench.shaped.nodes import NodeFailed

ENGINE = "kvstore_bench.emulate.engine"
# Interpreter, imports, touching the memory; many may start at once.
READY_TIMEOUT_S = 60.0

Answer = Prefilled | Decoded


class Host(Protocol):
    """Where an engine runs: a `kvstore_bench.shaped.nodes.Node`."""

    async def start(
        self,
        module: str,
        arguments: tuple[str, ...] = (),
        on_line: Callable[[str], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> Child:
        """Start a Python module there."""


class _Asked:
    """What waits for an answer.

    Attributes:
        reached: Called when half of the way is done; None when it was.
    """

    def __init__(self, reached: Callable[[], object] | None) -> None:
        self.reached = reached
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()


class EngineSession:
    """An engine that was started in a node. Made by `start`."""

    def __init__(self) -> None:
        self.child: Child
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._asked: dict[tuple[type[Answer], str], _Asked] = {}
        self._watching: asyncio.Task[None]
        self._failure = ""

    @classmethod
    async def start(cls, node: Host, setup: Setup) -> EngineSession:
        """Start an engine, tell it who it is, and wait until it has its agent and its memory.

        Raises:
            NodeFailed: It has not, or it has ended, or is late.
        """
        session = cls()
        session.child = await node.start(ENGINE, on_line=session._hear)
        session._watching = asyncio.create_task(session._watch())
        try:
            session._say(setup)
            async with asyncio.timeout(READY_TIMEOUT_S):
                ready = await session._ready
            if ready.error:
                raise NodeFailed(f"{session.child.name}: {ready.error}")
        except TimeoutError:
            await session.stop()
            raise NodeFailed(
                f"{session.child.name} is not ready after {READY_TIMEOUT_S:.0f} s"
            ) from None
        except BaseException:
            await session.stop()
            raise
        return session

    async def stop(self) -> None:
        """End the engine. What waits for an answer gets NodeFailed."""
        await self.child.stop()
        await asyncio.wait([self._watching])

    async def prefill(
        self, step: Prefill, on_loaded: Callable[[], object] | None = None
    ) -> Prefilled:
        """Have the first half of a turn done.

        It takes as long as its requests, their deadlines at most, and the GPU; who waits no more
        gets no answer, but the engine goes on.

        Args:
            on_loaded: Called once, when none of its hits is on its way any more: time to tell who
                decodes. If it fails before that, then.

        Raises:
            NodeFailed: The engine has ended.
        """
        answer = await self._ask(Prefilled, step, on_loaded)
        assert isinstance(answer, Prefilled)
        return answer

    async def decode(
        self, step: Decode, on_received: Callable[[], object] | None = None
    ) -> Decoded:
        """Have the second half of a turn done; as `prefill`.

        Args:
            on_received: Called once, when no block is on its way any more: time to `release` the
                turn where it was prefilled.
        """
        answer = await self._ask(Decoded, step, on_received)
        assert isinstance(answer, Decoded)
        return answer

    def release(self, turn: str) -> None:
        """Who decodes has all: what a prefill has left in its agent need not be kept any more."""
        self._say(Release(turn))

    async def _ask(
        self, kind: type[Answer], step: Prefill | Decode, reached: Callable[[], object] | None
    ) -> Answer:
        if self._failure:
            raise NodeFailed(self._failure)
        name = (kind, step.turn)
        assert name not in self._asked, f"turn {step.turn} is under way"
        asked = self._asked[name] = _Asked(reached)
        try:
            self._say(step)
            return await asked.answer
        finally:
            del self._asked[name]

    def _say(self, step: ToEngine) -> None:
        self.child.say(msgspec.json.encode(step).decode())

    # --- what it says ----------------------------------------------------------------------

    def _hear(self, line: str) -> None:
        try:
            report = msgspec.json.decode(line, type=FromEngine)
        except msgspec.DecodeError as error:
            self._fail(f"an engine has said what is no report: {line[:200]!r}: {error}")
            return
        match report:
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(report)
            case Loaded():
                self._reached(Prefilled, report.turn)
            case Received():
                self._reached(Decoded, report.turn)
            case Prefilled() | Decoded():
                self._reached(type(report), report.turn)
                asked = self._asked.get((type(report), report.turn))
                if asked is not None and not asked.answer.done():
                    asked.answer.set_result(report)

    def _reached(self, kind: type[Answer], turn: str) -> None:
        asked = self._asked.get((kind, turn))
        if asked is not None and asked.reached is not None:
            reached, asked.reached = asked.reached, None
            reached()

    async def _watch(self) -> None:
        await self.child.ended()
        self._fail(self.child.story())

    def _fail(self, why: str) -> None:
        """Nothing more is to be expected."""
        self._failure = self._failure or why
        if not self._ready.done():
            self._ready.set_exception(NodeFailed(self._failure))
            self._ready.exception()  # whether somebody waits for it or not
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(NodeFailed(self._failure))


__all__ = ["ENGINE", "EngineSession", "Host"]
