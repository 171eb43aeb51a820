"""Playing conversations: what is asked for, and that no wrong byte goes unseen."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from kvstore_bench.replay import add_replay_parser, command, player
from kvstore_bench.replay.plan import Plan, Scale, make_plan
from kvstore_bench.replay.player import BusyTime, Played, Player
from kvstore_bench.replay.report import Arena, Report, make_report
from kvstore_bench.trace import Request, Session, Trace
from kvstore_client import (
    AsyncClient,
    FetchOutcome,
    FetchResult,
    Layout,
    LookupResult,
    Namespace,
    PutOutcome,
    PutResult,
    Tier,
)

BLOCK_BYTES = 64 * 64


class Ended:
    """A handle whose request has ended."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self._result

    async def quiesced(self) -> None:
        """Its memory is free at once."""


class Memory:
    """A store in a dictionary, with the methods of `AsyncClient` that a replay calls.

    Args:
        fault: What it does wrong: "flip", "exchange" or "nothing written"; or honestly:
            "lost" loses a block between lookup and fetch.
    """

    def __init__(self, fault: str = "") -> None:
        self.blocks: dict[bytes, npt.NDArray[np.uint8]] = {}
        self.calls: list[tuple[str, int, int]] = []
        self._fault = fault

    async def open_namespace(self, pool: str, layout: Layout) -> Namespace:
        """Nothing to open."""
        return Namespace(pool, layout)

    async def lookup(self, namespace: Namespace, keys: Sequence[bytes], **_: Any) -> LookupResult:
        """Which are there."""
        hits = [key in self.blocks for key in keys]
        prefix = hits.index(False) if False in hits else len(hits)
        self.calls.append(("lookup", 0, len(keys)))
        return LookupResult(hits=hits, prefix=prefix, leases=[], unreachable=[])

    def fetch(
        self, namespace: Namespace, keys: Sequence[bytes], into: Any, first: int, deadline_s: float
    ) -> Ended:
        """Copies what is there, rightly or not."""
        self.calls.append(("fetch", first, len(keys)))
        outcomes = [FetchOutcome.HIT] * (len(keys) - first)
        for place, key in enumerate(keys[first:]):
            into[place] = self.blocks[key]
        if self._fault == "flip":
            into[-1, 77] ^= 4
        elif self._fault == "exchange":
            into[[0, -1]] = into[[-1, 0]]
        elif self._fault == "nothing written":
            into[0] = 0xFF
        elif self._fault == "lost":
            outcomes[1] = FetchOutcome.MISS
        return Ended(
            FetchResult(
                outcomes=outcomes,
                tiers=[Tier.ARENA] * len(outcomes),
                runs=[],
                run_of_block=[],
                bytes=into.nbytes,
                elapsed_s=0.25,
                errors=[],
            )
        )

    def put(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        blocks: Any,
        first: int,
        deadline_s: float,
    ) -> Ended:
        """Keeps the first bytes of a key."""
        self.calls.append(("put", first, len(keys)))
        outcomes = []
        for key, block in zip(keys[first:], blocks, strict=True):
            outcomes.append(PutOutcome.EXISTS if key in self.blocks else PutOutcome.STORED)
            self.blocks.setdefault(key, block.copy())
        return Ended(
            PutResult(
                outcomes=outcomes,
                runs=[],
                run_of_block=[],
                bytes=blocks.nbytes,
                elapsed_s=0.5,
                errors=[],
            )
        )


def make(*lengths: int) -> Plan:
    """One conversation whose prompts have that many blocks."""
    requests = tuple(Request(0.0, length * 64 + 1, 1, tuple(range(length))) for length in lengths)
    return make_plan([Trace("t", 64, (Session("s", "s", requests),))], Scale(bytes_per_token=64))


async def play(plan: Plan, store: Memory, **options: Any) -> list[Played]:
    played: list[Played] = []
    await Player(
        cast(AsyncClient, store),
        plan,
        run_id="r",
        deadline_s=1.0,
        on_played=played.append,
        **{"concurrency": 1, "verify": True, **options},
    ).play()
    return played


@pytest.mark.asyncio
async def test_hits_are_fetched_and_misses_put() -> None:
    store = Memory()
    first, second, third, fourth = await play(make(3, 5, 5, 0), store)
    assert store.calls == [
        *[("lookup", 0, 3), ("put", 0, 3)],
        *[("lookup", 0, 5), ("fetch", 0, 3), ("put", 3, 5)],
        *[("lookup", 0, 5), ("fetch", 0, 5)],
    ]
    assert (first.used, first.fetch_s, first.put_s) == (0, None, 0.5)
    assert (second.used, second.fetch_s, second.wrong) == (3, 0.25, 0)
    assert second.read_bytes == 3 * BLOCK_BYTES
    assert second.written_bytes == 2 * BLOCK_BYTES
    assert (third.used, third.put_s) == (5, None)
    assert (fourth.blocks, fourth.tokens) == (0, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fault", "wrong", "used"), [("flip", 1, 2), ("exchange", 2, 0), ("nothing written", 1, 0)]
)
async def test_wrong_bytes_are_found(fault: str, wrong: int, used: int) -> None:
    _, second = await play(make(3, 4), Memory(fault))
    assert (second.wrong, second.used) == (wrong, used)
    _, unseen = await play(make(3, 4), Memory(fault), verify=False)
    assert (unseen.wrong, unseen.used) == (0, 3)


@pytest.mark.asyncio
async def test_a_hit_that_brings_nothing_is_not_hidden_by_the_turn_before() -> None:
    # The blocks lie in the reader's memory already, from the turn before.
    class Idle(Memory):
        def fetch(self, *arguments: Any, **options: Any) -> Ended:
            into = arguments[2]
            before = into.copy()
            ended = super().fetch(*arguments, **options)
            if into.shape[0] == 4:
                into[:] = before
            return ended

    second, third = (await play(make(3, 4, 5), Idle()))[1:]
    assert (second.wrong, third.wrong) == (0, 4)


@pytest.mark.asyncio
async def test_a_block_that_is_lost_is_computed_again_with_all_that_follow() -> None:
    store = Memory("lost")
    _, second = await play(make(3, 4), store)
    assert store.calls[-1] == ("put", 1, 4)
    assert (second.hits, second.used, second.wrong) == (3, 1, 0)
    assert second.fetched == {FetchOutcome.HIT: 2, FetchOutcome.MISS: 1}
    assert second.put == {PutOutcome.EXISTS: 2, PutOutcome.STORED: 1}


@pytest.mark.asyncio
async def test_long_prompts_travel_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(player, "WINDOW_BYTES_MAX", 4 * BLOCK_BYTES)
    store = Memory()
    _, second = await play(make(10, 10), store)
    runs = [call for call in store.calls if call[0] != "lookup"]
    windows = [(0, 4), (4, 8), (8, 10)]
    assert runs == [(kind, *window) for kind in ("put", "fetch") for window in windows]
    assert (second.used, second.wrong, second.fetch_s) == (10, 0, 0.75)


@pytest.mark.asyncio
async def test_all_conversations_are_played_by_few_workers() -> None:
    requests = (Request(0.0, 128, 1, (1, 2)), Request(1.0, 192, 1, (1, 2, 3)))
    sessions = tuple(Session(f"s{number}", f"s{number}", requests) for number in range(7))
    plan = make_plan([Trace("t", 64, sessions)], Scale(bytes_per_token=64))
    for concurrency in (1, 3, 50):
        played = await play(plan, Memory(), concurrency=concurrency)
        assert sorted((request.turn, request.used) for request in played) == [
            *[(0, 0)] * 7,
            *[(1, 2)] * 7,
        ]


def test_time_at_work_counts_once() -> None:
    now = 0.0
    busy = BusyTime(lambda: now)
    with busy:
        now = 1.0
        with busy:
            now = 3.0
        now = 4.0
    now = 10.0
    with busy:
        now = 11.0
    assert busy.total_s == 5.0


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (2, 1)])
def test_wrong_blocks_are_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, wrong: int, status: int
) -> None:
    async def replay(plan: Plan, *_: Any) -> tuple[Report, list[Played]]:
        played = [Played(0, 3, 200, 64, wrong=wrong)]
        report = make_report(
            plan,
            played,
            endpoints=[],
            own_daemon=True,
            concurrency=1,
            verified=True,
            elapsed_s=1.0,
            fetching_s=0.0,
            putting_s=0.0,
            arena=Arena(),
        )
        return report, played

    trace = tmp_path / "chat.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}\n')
    monkeypatch.setattr(command, "_replay", replay)
    parser = argparse.ArgumentParser()
    add_replay_parser(parser.add_subparsers())
    args = parser.parse_args(["replay", str(trace)])
    assert args.run(args) == status
