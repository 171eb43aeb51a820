"""The paper's scheduler: its rules, their limits and their ties, one row each."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from kvstore_client.scheduler import (
    QUOTA_S,
    AttentionCost,
    Chunk,
    DecodeEngine,
    PrefillClass,
    PrefillEngine,
    PrefillWork,
    ReadSide,
    alpha_tokens,
    beta_tokens,
    choose_decode,
    choose_decode_group,
    choose_prefill,
    choose_side,
    classify,
    decode_ceiling,
    fill_batch,
)

ALPHA, BETA = 1000, 500


def test_limits_come_from_profiles() -> None:
    # 40 kB a token from 50 GB/s: 3.75 million tokens in three seconds.
    assert alpha_tokens(50e9, 40e3) == 3.75e6
    assert beta_tokens(20_000) == 100_000


@pytest.mark.parametrize(
    ("token_count", "read_queue", "expected"),
    [
        (0, 0, PrefillClass.SHORT_READ_QUEUE),
        (BETA, ALPHA, PrefillClass.SHORT_READ_QUEUE),
        (BETA, ALPHA + 1, PrefillClass.LONG_READ_QUEUE),
        (BETA + 1, 0, PrefillClass.OVERLOADED),
        (BETA + 1, ALPHA + 1, PrefillClass.OVERLOADED),
    ],
)
def test_classes_of_prefill_engines(
    token_count: int, read_queue: int, expected: PrefillClass
) -> None:
    assert classify(token_count, read_queue, ALPHA, BETA) is expected


@pytest.mark.parametrize(
    ("requests", "loads", "queues", "expected"),
    [
        pytest.param([10], [("a", 5), ("b", 3)], {}, [1], id="fewest tokens"),
        pytest.param([10], [("a", 400), ("b", 0)], {"b": 1001}, [0], id="short queue first"),
        pytest.param([10], [("a", 501), ("b", 0)], {"b": 1001}, [1], id="long if no short"),
        pytest.param([10], [("a", 501), ("b", 900)], {}, [], id="all overloaded"),
        pytest.param([10], [], {}, [], id="no engine"),
        pytest.param([], [("a", 0)], {}, [], id="no request"),
        pytest.param([10, 10, 10], [("a", 0), ("b", 15)], {}, [0, 0, 1], id="tokens add up"),
        pytest.param([600, 1, 1], [("a", 0), ("b", 400)], {}, [0, 1, 1], id="reclassified"),
        pytest.param([501, 501, 1], [("a", 0), ("a", 0)], {}, [0, 1], id="stops when full"),
        pytest.param([500, 1, 1], [("a", 0)], {}, [0, 0], id="at beta still taken"),
        pytest.param(
            [200, 200, 200, 1],
            [("a", 301), ("b", 0)],
            {"b": 2000},
            [0, 1, 1, 1],
            id="long after short is full",
        ),
        pytest.param([1, 1], [("a", 7), ("a", 7)], {}, [0, 1], id="tie: the first listed"),
    ],
)
def test_prefill_choice(
    requests: list[int],
    loads: list[tuple[str, int]],
    queues: dict[str, float],
    expected: list[int],
) -> None:
    engines = [PrefillEngine(node, token_count) for node, token_count in loads]
    assert choose_prefill(requests, engines, queues, ALPHA, BETA) == expected


def test_of_equal_prefill_engines_the_one_with_fewer_requests_gets_it() -> None:
    engines = [PrefillEngine("a", 5, request_count=3), PrefillEngine("a", 5, request_count=2)]
    assert choose_prefill([1], engines, {}, ALPHA, BETA) == [1]


@pytest.mark.parametrize(
    ("requests", "groups", "expected"),
    [
        ([5, 5, 5], [0, 0], [0, 1, 0]),
        ([5, 5], [100, 0], [1, 1]),
        ([100, 1, 1], [0, 50], [0, 1, 1]),
        ([], [], []),
    ],
)
def test_decode_group_choice(requests: list[int], groups: list[int], expected: list[int]) -> None:
    assert choose_decode_group(requests, groups) == expected


def test_the_ceiling_counts_what_fits_and_what_is_there() -> None:
    engines = [DecodeEngine(100, 1, 50), DecodeEngine(0, 0, 30)]
    # 40 + 40 fit into 80, the third does not.
    assert decode_ceiling([40, 40, 1], engines) == pytest.approx(1.05 * (80 + 100) / 2)
    # A request behind one that does not fit is not counted, though it would fit.
    assert decode_ceiling([81, 1], engines) == pytest.approx(1.05 * 100 / 2)


@pytest.mark.parametrize(
    ("requests", "engines", "expected"),
    [
        pytest.param([10], [(0, 2, 99), (10, 1, 99)], [0], id="below Z only the first"),
        pytest.param([99], [(0, 2, 99), (20, 0, 99)], [0], id="none below Z: fewest tokens"),
        pytest.param([10], [(30, 2, 99), (30, 1, 99), (90, 9, 99)], [1], id="fewest requests"),
        pytest.param([10], [(0, 0, 9), (50, 9, 10)], [1], id="memory decides first"),
        pytest.param([10, 1], [(0, 0, 9), (0, 0, 9)], [], id="head too large: all wait"),
        pytest.param([10, 10], [(0, 0, 15), (0, 0, 15)], [0, 1], id="memory is taken"),
        pytest.param([10, 10, 10], [(0, 0, 15), (0, 0, 15)], [0, 1], id="until none is left"),
        pytest.param([10], [], [], id="no engine"),
    ],
)
def test_decode_choice(
    requests: list[int], engines: list[tuple[int, int, int]], expected: list[int]
) -> None:
    assert choose_decode(requests, [DecodeEngine(*engine) for engine in engines]) == expected


def test_at_the_ceiling_is_below_it() -> None:
    # Z = 1.05 * (20 + 500) / 2 = 273, where the first engine would be, with fewer requests.
    engines = [DecodeEngine(253, 0, 100), DecodeEngine(247, 5, 100)]
    assert decode_ceiling([20], engines) == 253 + 20
    assert choose_decode([20], engines) == [0]
    fuller = [DecodeEngine(254, 0, 100), DecodeEngine(246, 5, 100)]
    assert choose_decode([20], fuller) == [1]


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [(1, 2, ReadSide.PREFILL), (2, 1, ReadSide.DECODE), (2, 2, ReadSide.PREFILL)],
)
def test_side(prefill: int, decode: int, expected: ReadSide) -> None:
    assert choose_side(prefill, decode) is expected


def linear(cached_tokens: int, new_tokens: int) -> float:
    """A millisecond a token."""
    return new_tokens * 1e-3


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([100, 200], [(0, 100), (1, 200)], id="to the quota exactly"),
        pytest.param([100, 250], [(0, 100), (1, 200)], id="cut"),
        pytest.param([300, 50], [(0, 300)], id="no room left"),
        pytest.param([200, 200, 10], [(0, 200), (1, 100)], id="nothing overtakes the cut one"),
        pytest.param([1000], [(0, 300)], id="first one cut"),
    ],
)
def test_batches(queue: list[int], expected: list[tuple[int, int]]) -> None:
    work = [PrefillWork(0, tokens) for tokens in queue]
    # A quota of 300 tokens, clear of the rounding of their sum.
    assert fill_batch(work, linear, QUOTA_S + 1e-9) == [Chunk(*chunk) for chunk in expected]


def test_a_token_that_exceeds_the_quota_goes_alone() -> None:
    assert fill_batch([PrefillWork(10, 10)] * 2, lambda cached, new: 1.0) == [Chunk(0, 1)]


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 20_000)), min_size=1, max_size=8),
    st.floats(1e-12, 1e-7),
)
def test_a_cut_is_exact_to_the_token(queue: list[tuple[int, int]], pair_s: float) -> None:
    cost = AttentionCost(1e-4, pair_s)
    work = [PrefillWork(*item) for item in queue]
    batch = fill_batch(work, cost)
    assert [chunk.place for chunk in batch] == list(range(len(batch)))
    assert all(chunk.new_tokens == work[chunk.place].new_tokens for chunk in batch[:-1])
    used_s = sum(cost(work[c.place].cached_tokens, c.new_tokens) for c in batch)
    last = batch[-1]
    if used_s > QUOTA_S:
        assert batch == [Chunk(0, 1)]
    elif last.new_tokens < work[last.place].new_tokens:
        cached = work[last.place].cached_tokens
        more_s = used_s - cost(cached, last.new_tokens) + cost(cached, last.new_tokens + 1)
        assert more_s > QUOTA_S * (1 - 1e-9)


def test_attention_counts_pairs() -> None:
    # 3 new tokens behind 10: 11 + 12 + 13 pairs.
    assert AttentionCost(1.0, 0.5)(10, 3) == 1.0 + 0.5 * 36


@given(
    st.lists(st.integers(1, 5000), max_size=40),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 9)), max_size=8),
)
def test_no_prefill_engine_gets_a_request_when_it_is_overloaded(
    requests: list[int], loads: list[tuple[int, int]]
) -> None:
    engines = [PrefillEngine(f"n{index % 3}", *load) for index, load in enumerate(loads)]
    chosen = choose_prefill(requests, engines, {"n1": 5000.0}, 1000, 4000)
    counts = [engine.token_count for engine in engines]
    for tokens, index in zip(requests, chosen, strict=False):
        assert counts[index] <= 4000
        counts[index] += tokens
    if len(chosen) < len(requests):
        assert all(count > 4000 for count in counts)


@given(
    st.lists(st.integers(1, 500), max_size=40),
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 9), st.integers(0, 2000)),
        min_size=1,
        max_size=8,
    ),
)
def test_no_decode_engine_gets_more_than_it_has_memory_for(
    requests: list[int], loads: list[tuple[int, int, int]]
) -> None:
    engines = [DecodeEngine(*load) for load in loads]
    chosen = choose_decode(requests, engines)
    free = [engine.free_tokens for engine in engines]
    for tokens, index in zip(requests, chosen, strict=False):
        free[index] -= tokens
        assert free[index] >= 0
    if len(chosen) < len(requests):
        assert all(left < requests[len(chosen)] for left in free)
