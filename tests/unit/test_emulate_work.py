"""What an emulated cluster has to do: hits, scaling, and how long GPUs take."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import ConfigError
from kvstore_bench.emulate.work import Compute, Scale, make_work, shared_compute
from kvstore_bench.trace import Request, Session, Trace

TOKENS = 64


def trace(*sessions: list[range], name: str = "t", tokens: int = TOKENS) -> Trace:
    """Sessions by the blocks of their prompts."""
    made = tuple(
        Session(
            f"{name}-{place}",
            "shared",
            tuple(
                Request(float(at), len(prompt) * tokens + 5, 10, tuple(prompt))
                for at, prompt in enumerate(prompts)
            ),
        )
        for place, prompts in enumerate(sessions)
    )
    return Trace(name, tokens, made)


def test_hits_are_what_earlier_turns_of_the_session_have_stored() -> None:
    work = make_work([trace([range(4), range(6), range(6)])], Scale(8, layers=2))
    assert [turn.hit_count for turn in work.turns] == [0, 4, 6]
    assert [turn.appended_tokens for turn in work.turns] == [4 * TOKENS, 2 * TOKENS, 0]
    assert work.block_bytes == 8 * TOKENS
    assert work.hit_bytes == 10 * work.block_bytes
    assert work.new_bytes == 6 * work.block_bytes
    assert work.longest_bytes == 6 * work.block_bytes


def test_prompt_that_was_edited_hits_as_far_as_it_is_the_same() -> None:
    prompts = [range(4), [0, 1, 12, 13], [0, 1, 2, 3, 14]]
    work = make_work([trace(prompts)], Scale(8))  # type: ignore[arg-type]
    assert [turn.hit_count for turn in work.turns] == [0, 2, 4]


def test_sessions_share_nothing() -> None:
    work = make_work([trace([range(4)], [range(4)])], Scale(8))
    assert [turn.hit_count for turn in work.turns] == [0, 0]
    first, second = work.turns
    assert first.scope != second.scope
    assert first.name != second.name


@given(st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_token_scale_keeps_what_prompts_share(scale: int, lengths: list[int]) -> None:
    whole = make_work([trace([range(length) for length in lengths])], Scale(8))
    if all(length < scale for length in lengths):
        return
    work = make_work([trace([range(length) for length in lengths])], Scale(8, token_scale=scale))
    kept = [turn for turn in whole.turns if len(turn.blocks) >= scale]
    for turn, before in zip(work.turns, kept, strict=True):
        assert len(turn.blocks) == len(before.blocks) // scale
        assert turn.hit_count == before.hit_count // scale
        # The last block of a group names all before it.
        assert turn.blocks == before.blocks[scale - 1 :: scale]


def test_scale_cuts_sessions_and_turns() -> None:
    work = make_work(
        [trace([range(2)] * 5, [range(3)] * 5, name="a"), trace([range(4)] * 5, name="b")],
        Scale(8, sessions=2, turns=3),
    )
    assert [len(session) for session in work.sessions] == [3, 3]
    assert (work.session_count, work.turn_count) == (3, 15)
    assert work.sources == ("a", "b")


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (Scale(8, token_scale=99), "--token-scale=99"),
        (Scale(0), "--bytes-per-token=0"),
        (Scale(1 << 40), "--bytes-per-token="),
    ],
)
def test_what_cannot_be_emulated_is_refused(scale: Scale, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_work([trace([range(4)])], scale)


def test_traces_of_different_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="16, 64"):
        make_work([trace([range(4)]), trace([range(4)], tokens=16)], Scale(8))


def test_shares_of_a_time_are_spent_over_all_turns() -> None:
    work = make_work([trace([range(4), range(6), range(9)])], Scale(8))
    compute = shared_compute(work, 10.0, 0.5, 0.2, overlap=True)
    assert sum(map(compute.prefill_s, work.turns)) == pytest.approx(5.0)
    assert sum(sum(compute.answer_s(turn)) for turn in work.turns) == pytest.approx(2.0)


def test_attention_costs_more_the_longer_the_context() -> None:
    work = make_work([trace([range(4), range(8)])], Scale(8))
    short, long = (Compute(attention_s=1e-6).prefill_s(turn) for turn in work.turns)
    assert long == pytest.approx(2 * short)
