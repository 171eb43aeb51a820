"""Reading traces: both formats, packed or not, and what a broken file is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.trace import Request, Trace, block_key, load_traces


def agentic(name: str = "trace_1", **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": name,
        "models": ["some-model"],
        "block_size": 64,
        "hash_id_scope": "local",
        "requests": [
            {"t": 0.0, "type": "s", "in": 130, "out": 5, "hash_ids": [1, 2], "ttft": 0.5},
            {"t": 3.5, "type": "n", "in": 256, "out": 7, "hash_ids": [1, 2, 3, 4]},
        ],
    }
    return {**record, **changes}


def mooncake(*requests: tuple[int, int, list[int]]) -> bytes:
    lines = [
        {"timestamp": at_ms, "input_length": tokens, "output_length": 9, "hash_ids": ids}
        for at_ms, tokens, ids in requests
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def load(path: Path, data: bytes) -> Trace:
    path.write_bytes(data)
    (trace,) = load_traces([path])
    return trace


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_traces([path])
    assert caught.value.value == path
    return caught.value.remedy


def test_an_agentic_file_becomes_a_session(tmp_path: Path) -> None:
    trace = load(tmp_path / "one.json", json.dumps(agentic()).encode())
    assert (trace.name, trace.block_tokens) == ("one", 64)
    (session,) = trace.sessions
    assert session.name == session.scope == "trace_1"
    assert session.requests == (
        Request(0.0, 130, 5, (1, 2)),
        Request(3.5, 256, 7, (1, 2, 3, 4)),
    )


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "many lines"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_the_format_is_told_by_the_content(
    tmp_path: Path, indent: int | None, packed: bool
) -> None:
    # The names lie on purpose.
    data = json.dumps(agentic(), indent=indent).encode()
    chat = mooncake((0, 1024, [1, 2]))
    pack = gzip.compress if packed else bytes
    assert load(tmp_path / "a.jsonl", pack(data)).block_tokens == 64
    assert load(tmp_path / "b.json.gz", pack(chat)).block_tokens == 512


def test_agentic_sessions_may_stand_one_a_line(tmp_path: Path) -> None:
    lines = [json.dumps(agentic(name)).encode() for name in ("a", "b", "a")]
    trace = load(tmp_path / "many.jsonl", b"\n".join([lines[0], b"", *lines[1:]]))
    assert [session.name for session in trace.sessions] == ["a", "b", "a#2"]
    # Local ids of different sessions never meet, not even those of two with one name.
    assert len({session.scope for session in trace.sessions}) == 3


def test_local_ids_of_two_files_do_not_meet_and_global_ones_do(tmp_path: Path) -> None:
    for scope in ("local", "global"):
        for name in ("1", "2"):
            record = agentic("same", hash_id_scope=scope)
            (tmp_path / f"{scope}-{name}.json").write_text(json.dumps(record))
    local = load_traces([str(tmp_path / "local-*.json")])
    shared = load_traces([str(tmp_path / "global-*.json")])
    assert len({trace.sessions[0].scope for trace in local}) == 2
    assert len({trace.sessions[0].scope for trace in shared}) == 1


def test_a_subagent_is_a_session_of_its_own_in_the_scope_of_its_parent(tmp_path: Path) -> None:
    first, second = agentic()["requests"]
    inner = {"t": 0.0, "type": "n", "in": 128, "out": 1, "hash_ids": [1, 9]}
    deeper = {"t": 21.0, "type": "subagent", "agent_id": "deep", "requests": [{**inner, "t": 21.0}]}
    agents = [
        {"t": 2.0, "type": "subagent", "requests": [inner, {**inner, "t": 4.0}]},
        {
            "t": 20.0,
            "type": "subagent",
            "agent_id": "x",
            "requests": [{**inner, "t": 20.5}, deeper],
        },
    ]
    record = agentic(requests=[first, *agents, second])
    trace = load(tmp_path / "one.json", json.dumps(record).encode())
    names = [session.name for session in trace.sessions]
    assert names == ["trace_1", "trace_1/1", "trace_1/x", "trace_1/x/deep"]
    assert {session.scope for session in trace.sessions} == {"trace_1"}
    times = [[request.at_s for request in session.requests] for session in trace.sessions]
    # Times inside may count from the sub-agent's start, or from the session's.
    assert times == [[0.0, 3.5], [2.0, 6.0], [20.5], [21.0]]


def test_requests_are_in_the_order_of_their_times(tmp_path: Path) -> None:
    first, second = agentic()["requests"]
    trace = load(tmp_path / "one.json", json.dumps(agentic(requests=[second, first])).encode())
    assert [request.at_s for request in trace.sessions[0].requests] == [0.0, 3.5]


def test_partial_blocks_are_dropped(tmp_path: Path) -> None:
    data = mooncake((0, 1030, [1, 2, 3]), (10, 1024, [7, 8]), (20, 100, [6]))
    trace = load(tmp_path / "chat.jsonl", data)
    ids = [session.requests[0].hash_ids for session in trace.sessions]
    assert ids == [(1, 2), (7, 8), ()]
    assert trace.sessions[0].requests[0].input_tokens == 1030


def test_mooncake_requests_that_continue_a_prefix_become_conversations(tmp_path: Path) -> None:
    # Block 0 is the system prompt of all, the ids above 90 are partial blocks.
    data = mooncake(
        (0, 1100, [0, 1, 91]),
        (1000, 1100, [0, 2, 92]),
        (2000, 2100, [0, 1, 3, 4, 93]),
        (3000, 1600, [0, 2, 5, 94]),
        (4000, 1600, [0, 1, 6, 95]),  # branches off the first, which went on with 3 and 4
        (5000, 2600, [0, 1, 3, 4, 7, 96]),
        (6000, 600, [0, 97]),
        (7000, 600, [0, 98]),
    )
    trace = load(tmp_path / "chat.jsonl.gz", gzip.compress(data))
    turns = [[int(request.at_s) for request in session.requests] for session in trace.sessions]
    assert turns == [[0, 2, 5], [1, 3], [4], [6], [7]]
    assert {session.scope for session in trace.sessions} == {"chat"}
    for session in trace.sessions:
        for before, after in zip(session.requests, session.requests[1:], strict=False):
            assert after.hash_ids[: len(before.hash_ids)] == before.hash_ids


def test_patterns_are_expanded_and_a_file_is_read_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.json").write_text(json.dumps(agentic(name)))
    pattern = str(tmp_path / "?.json")
    traces = load_traces([pattern, tmp_path / "b.json", str(tmp_path / "c[1].json")])
    assert [trace.name for trace in traces] == ["a", "b", "c[1]"]


def test_keys_differ_by_scope_and_id() -> None:
    keys = {block_key(scope, number) for scope in ("a", "b", "a\0") for number in range(300)}
    assert len(keys) == 900
    assert {len(key) for key in keys} == {32}
    assert block_key("a", 1) == block_key("a", 1)
    # Written down: what was stored under it is found by the next version too.
    assert block_key("trace_0061", 1).hex().startswith("dfa4a1166da40067")


BROKEN = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "is empty"),
    "no json": (b"\x7fELF something", "line 1: expected a JSON object"),
    "an array": (b"[1, 2]", "line 1: Expected `object`, got `array`"),
    "another object": (b'{"a": 1}', "line 1: expected an object with `requests`"),
    "a type": (b'{"id": "a", "block_size": 64, "requests": [{"type": "z"}]}', "'z' - at `$.req"),
    "block size": (json.dumps(agentic(block_size=0)).encode(), ">= 1 - at `$.block_size`"),
    "no requests": (json.dumps(agentic(requests=[])).encode(), "holds no request"),
    "second line": (mooncake((0, 512, [1])) + b'{"timestamp": "x"}', "line 2: Expected `float`"),
    "cut off": (mooncake((0, 512, [1])) + b'{"timestamp": 1', "line 2: expected a JSON object"),
    "negative id": (mooncake((0, 512, [-1])), "`int` >= 0 - at `$.hash_ids[0]`"),
    "huge id": (mooncake((0, 512, [1 << 63])), "at `$.hash_ids[0]`"),
    "too many ids": (
        mooncake((0, 512, [1]), (1, 512, [2, 3, 4])),
        "line 2: 3 hash ids for 512 tokens, expected at most 2 of 512 tokens each",
    ),
    "twice the same id": (
        mooncake((0, 2000, [1, 2, 1])),
        "line 1: a request names a hash id twice",
    ),
    "cut off gzip": (gzip.compress(mooncake((0, 512, [1])))[:-9], "cannot be unpacked"),
    "bad gzip": (b"\x1f\x8b" + bytes(60), "cannot be unpacked"),
    "block sizes differ": (
        json.dumps(agentic()).encode() + b"\n" + json.dumps(agentic(block_size=16)).encode(),
        "line 2: block_size is 16, expected 64",
    ),
    "invalid text": (b'{"timestamp": 1, "hash_ids": "\xff"}', "line 1: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_its_line_and_what_was_expected(tmp_path: Path, name: str) -> None:
    data, expected = BROKEN[name]
    assert expected in refusal(tmp_path / "broken", data)


def test_nesting_has_a_limit(tmp_path: Path) -> None:
    entry: dict[str, Any] = agentic()["requests"][0]
    for _ in range(20):
        entry = {"t": 0, "type": "subagent", "requests": [entry]}
    data = json.dumps(agentic(requests=[entry])).encode()
    assert "nested more than 8 deep" in refusal(tmp_path / "deep.json", data)
    deep = b'{"a":' * 100_000
    assert "nested too deeply" in refusal(tmp_path / "deeper.json", deep)


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_traces([tmp_path / "absent.json"])
    with pytest.raises(ConfigError, match="no file matches"):
        load_traces([str(tmp_path / "*.json")])
    with pytest.raises(ConfigError, match="is a directory"):
        load_traces([tmp_path])
