"""Plays the turns of a work on a cluster, and notes how each went and what links carried."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kvstore_bench.emulate.cluster import Running
from kvstore_bench.emulate.records import Arrivals, Played, Record
from kvstore_bench.emulate.steps import Decode, Decoded, Prefill, Prefilled
from kvstore_bench.emulate.work import Compute, Turn, Work
from kvstore_bench.shaped.nodes import Node, NodeFailed
from kvstore_bench.shaped.traffic import watching
from kvstore_client.scheduler import DecodeEngine, PrefillEngine, choose_decode, choose_prefill

# Engines have memory for all turns: nothing is turned away.
_ENDLESS = 1 << 60


class Player:
    """Sends each turn to engines, as the scheduler of the paper does, and waits for it.

    Args:
        on: What runs; None for `ORACLE`.
        deadline_s: Of each request of an engine.
        groups: Groups of layers.
        on_turn: Called when a turn has ended.
    """

    def __init__(
        self,
        on: Running | None,
        work: Work,
        compute: Compute,
        deadline_s: float,
        groups: int,
        shape: tuple[Sequence[str], Sequence[str]],
        on_turn: Callable[[Record], None],
    ) -> None:
        self._on = on
        self._work = work
        self._compute = compute
        self._deadline_s = deadline_s
        self._groups = groups
        self._on_turn = on_turn
        # Each of its requests ends at its deadline; all that may keep a turn waiting besides are
        # the GPUs.
        self._turn_s_max = 3 * deadline_s + sum(
            compute.prefill_s(turn) + sum(compute.answer_s(turn)) for turn in work.turns
        )
        self._prefill = {name: [0, 0] for name in shape[0]}  # tokens and turns under way
        self._decode = {name: [0, 0] for name in shape[1]}
        self._gpus = {name: asyncio.Lock() for name in shape[0]}

    async def play(self, played: Played, arrivals: Arrivals) -> None:
        """Play all sessions.

        Raises:
            NodeFailed: A process has ended.
        """
        played.began_at = time.monotonic()
        if arrivals.idle:
            for turns in self._work.sessions:
                await self._session(turns, played, 0.0)
        else:
            starts = arrivals.times_s(len(self._work.sessions))
            async with asyncio.TaskGroup() as group:
                for turns, start_s in zip(self._work.sessions, starts, strict=True):
                    group.create_task(self._session(turns, played, start_s))
        played.ended_at = time.monotonic()

    async def _session(self, turns: Sequence[Turn], played: Played, start_s: float) -> None:
        await asyncio.sleep(start_s)
        began_at = time.monotonic()
        for turn in turns:
            record = await self._turn(turn)
            played.records.append(record)
            self._on_turn(record)
        played.session_s.append(time.monotonic() - began_at)

    async def _turn(self, turn: Turn) -> Record:
        arrived_at = time.monotonic()
        prefill, decode = self._choose(turn)
        loads = self._prefill[prefill], self._decode[decode]
        for load in loads:
            load[0] += turn.context_tokens
            load[1] += 1
        try:
            run = self._oracle if self._on is None else self._real
            prefilled, decoded = await run(turn, prefill, decode, arrived_at)
        finally:
            for load in loads:
                load[0] -= turn.context_tokens
                load[1] -= 1
        return Record(turn, prefill, decode, arrived_at, prefilled, decoded)

    def _choose(self, turn: Turn) -> tuple[str, str]:
        """The prefill and the decode node of a turn: not where the last one of its session was,
        but where least is under way."""
        engines = [PrefillEngine(name, *load) for name, load in self._prefill.items()]
        # All turns under way load: without queues of their own, tokens are what tells them apart.
        (at,) = choose_prefill([turn.context_tokens], engines, {}, alpha=0, beta=_ENDLESS)
        free = [DecodeEngine(load[0], load[1], _ENDLESS) for load in self._decode.values()]
        (to,) = choose_decode([turn.context_tokens], free)
        return list(self._prefill)[at], list(self._decode)[to]

    async def _real(
        self, turn: Turn, prefill: str, decode: str, arrived_at: float
    ) -> tuple[Prefilled, Decoded]:
        assert self._on is not None
        on_prefill, on_decode = self._on.prefill[prefill], self._on.decode[decode]
        # Who decodes begins when the hits are here: what it has relayed is in its agent's memory
        # then, and what came directly in that of the other node.
        loaded = asyncio.Event()

        async def receive() -> Decoded:
            await loaded.wait()
            return await on_decode.decode(
                self._decode_step(turn, prefill), partial(on_prefill.release, turn.name)
            )

        async def load() -> Prefilled:
            try:
                return await on_prefill.prefill(self._prefill_step(turn, decode), loaded.set)
            finally:
                loaded.set()

        try:
            async with asyncio.timeout(self._turn_s_max), asyncio.TaskGroup() as group:
                first, second = group.create_task(load()), group.create_task(receive())
        except TimeoutError:
            raise NodeFailed(
                f"turn {turn.name} from {prefill} to {decode} has not ended after"
                f" {self._turn_s_max:.0f} s"
            ) from None
        return first.result(), second.result()

    def _prefill_step(self, turn: Turn, decode: str) -> Prefill:
        step_s = self._compute.prefill_s(turn) / self._groups
        return Prefill(
            turn=turn.name,
            scope=turn.scope,
            blocks=turn.blocks,
            hit_count=turn.hit_count,
            decode_node=decode,
            compute_s=(step_s,) * self._groups,
            overlap=self._compute.overlap,
            deadline_s=self._deadline_s,
        )

    def _decode_step(self, turn: Turn, prefill: str) -> Decode:
        assert self._on is not None
        first_token_s, decode_s = self._compute.answer_s(turn)
        return Decode(
            turn=turn.name,
            scope=turn.scope,
            blocks=turn.blocks,
            hit_count=turn.hit_count,
            peer=self._on.peers[prefill],
            wait_s=self._deadline_s,
            first_token_s=first_token_s,
            decode_s=decode_s,
            deadline_s=self._deadline_s,
        )

    async def _oracle(
        self, turn: Turn, prefill: str, decode: str, arrived_at: float
    ) -> tuple[Prefilled, Decoded]:
        async with self._gpus[prefill]:
            await asyncio.sleep(self._compute.prefill_s(turn))
        ended_at = time.monotonic()
        first_token_s, decode_s = self._compute.answer_s(turn)
        await asyncio.sleep(first_token_s)
        first_token_at = time.monotonic()
        await asyncio.sleep(decode_s)
        return (
            Prefilled(
                turn=turn.name,
                began_at=arrived_at,
                first_group_at=arrived_at,
                loaded_at=arrived_at,
                ended_at=ended_at,
            ),
            Decoded(
                turn=turn.name,
                received_at=ended_at,
                first_token_at=first_token_at,
                ended_at=time.monotonic(),
            ),
        )


async def play(
    player: Player, policy: str, arrivals: Arrivals, nodes: Mapping[str, Node]
) -> Played:
    """Play everything, and watch the links meanwhile.

    Raises:
        NodeFailed: A process has ended.
    """
    links = [link for node in nodes.values() for link in node.links.items()]
    played = Played(policy)
    for node in nodes.values():
        for network in node.links:
            played.links += [(node.name, network, "rx"), (node.name, network, "tx")]

    def read() -> tuple[int, ...]:
        found: list[int] = []
        for _, link in links:
            counters = link.counters()
            found += (counters.received_bytes, counters.sent_bytes)
        return tuple(found)

    async with watching(read) as readings:
        await player.play(played, arrivals)
    played.readings = readings
    return played


__all__ = ["Player", "play"]
