"""What a replay will do: cut to scale, and memory for all of it."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.replay.plan import SLACK_BYTES_MIN, Plan, Scale, make_plan
from kvstore_bench.trace import Request, Session, Trace


def request(blocks: range, block_tokens: int = 64) -> Request:
    return Request(0.0, len(blocks) * block_tokens + 10, 5, tuple(blocks))


TALKS = Trace(
    "talks",
    64,
    (
        Session("a", "a", (request(range(10)), request(range(15)), request(range(20)))),
        Session("a/1", "a", (request(range(12)),)),
        Session("b", "b", (request(range(10)), request(range(11)))),
    ),
)
CHAT = Trace("chat", 512, (Session("c", "c", (request(range(3), 512),)),))


def plan(**changes: int) -> Plan:
    return make_plan([TALKS, CHAT], Scale(**{"bytes_per_token": 64, **changes}))


def test_all_of_it() -> None:
    whole = plan()
    assert (len(whole.conversations), whole.requests, whole.blocks) == (4, 7, 81)
    assert whole.prompt_tokens == 78 * 64 + 3 * 512 + 70
    # Sessions of one scope share blocks, those of others have their own.
    assert whole.distinct_blocks == {64: 20 + 11, 512: 3}
    assert whole.hit_rate_max == pytest.approx(1 - 34 / 81)
    assert whole.longest_bytes == 3 * 512 * 64
    assert whole.block_sizes == (64, 512)


def test_cut_to_sessions_and_turns() -> None:
    cut = plan(sessions=3, turns=1)
    assert [len(talk.requests) for talk in cut.conversations] == [1, 1, 1]
    assert (cut.requests, cut.request_count) == (3, 7)
    assert (len(cut.conversations), cut.session_count) == (3, 4)
    assert cut.distinct_blocks == {64: 12 + 10}
    assert cut.block_sizes == (64,)


@pytest.mark.parametrize("bytes_per_token", [8, 64, 4096])
def test_the_arena_holds_every_distinct_block_in_whole_pages(bytes_per_token: int) -> None:
    sized = plan(bytes_per_token=bytes_per_token)
    pages = 31 * -(-64 * bytes_per_token // 4096) + 3 * -(-512 * bytes_per_token // 4096)
    assert sized.arena_bytes >= pages * 4096 + SLACK_BYTES_MIN
    assert sized.arena_bytes <= pages * 4096 * 1.06 + SLACK_BYTES_MIN
    assert sized.arena_bytes % 4096 == 0


def test_layouts_of_other_runs_and_sizes_differ() -> None:
    layered = plan(layers=4)
    assert layered.layout(64, "x").layer_bytes == (1024,) * 4
    layouts = {layered.layout(tokens, run) for tokens in (64, 512) for run in ("x", "y")}
    assert len(layouts) == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bytes_per_token": 0}, "--bytes-per-token=0: must be at least 1"),
        ({"sessions": 0}, "--sessions=0: must be at least 1"),
        ({"turns": -1}, "--turns=-1: must be at least 1"),
        ({"layers": 0}, "--layers=0: must be at least 1"),
        ({"layers": 7}, "--layers=7: must divide the 4096 bytes of a block"),
        ({"bytes_per_token": 1 << 30}, "the limit is 268435456"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    assert expected in str(caught.value)


def test_blocks_are_whole_words() -> None:
    small = Trace("small", 3, (Session("s", "s", (request(range(2), 3),)),))
    with pytest.raises(
        ConfigError, match=r"blocks of 6 bytes \(3 tokens\), they must be a multiple"
    ):
        make_plan([small], Scale(bytes_per_token=2))
