"""Traces of requests: what a replay asks for, read from files that others recorded.

A trace holds no text. A request names its prompt as a chain of block hashes, and the hash of a
block covers all that lies before it: two requests that share a hash id share the whole prefix up
to it. Two formats are read, plain or gzip, told apart by what is in the file:

agentic coding (github.com/callanjfox/kv-cache-tester)
    One JSON object a session, alone in its file or one a line: `id`, `block_size`,
    `hash_id_scope`, `requests[]` with `t` (seconds), `in`, `out` (tokens) and `hash_ids`. An entry
    of type `subagent` holds `requests[]` of its own: a second conversation with its own context,
    beside the one that started it. It becomes a session of its own in the scope of its parent, so
    that what the two have in common (tool definitions, say) still meets.
Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release)
    One request a line: `timestamp` (milliseconds), `input_length`, `output_length`, `hash_ids`.
    Nothing says which requests belong together; see `_conversations`.

What the public files hold, and what follows from it:

- The agentic files name full blocks only. Mooncake's last id is a partial block in 99.8 % of the
  requests, and none of those ids ever lies inside a longer prompt. A store holds full blocks, so
  the partial one is dropped here. Mooncake's files give 38.2 % (conversation) and 65.9 %
  (synthetic) prefix hits that way, and 36.6 % and 64.0 % with the partial blocks counted.
- No id has two predecessors and none occurs twice in a request, as it must be with chained
  hashes; a file that breaks the second rule is refused.
- A later request does not always continue the one before it: the agent compacts or edits its
  context. Nothing is repaired here; the hit rate shows it.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from kvstore.errors import ConfigError

#: Tokens a block in Mooncake's files, which do not say so themselves.
MOONCAKE_BLOCK_TOKENS = 512

# Sub-agents start sub-agents, but a file that nests deeper than this is broken or hostile.
NESTING_MAX = 8
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt: its length, and the chain of its full blocks.

    Attributes:
        at_s: When it was sent, in seconds since the trace began.
        input_tokens: Length of the prompt, the partial block at its end included.
        output_tokens: Tokens that were generated.
        hash_ids: A full block each, from the beginning of the prompt.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """The requests of one conversation, in the order in which they were sent.

    Attributes:
        name: Unique among the sessions of one call of `load_traces`.
        scope: Hash ids mean the same bytes within one scope, and only there.
        requests: At least one.
    """

    name: str
    scope: str
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What one file holds.

    Attributes:
        name: The file's name, without its suffixes.
        block_tokens: Tokens a block.
        sessions: In the order of their first requests' appearance in the file.
    """

    name: str
    block_tokens: int
    sessions: tuple[Session, ...]


def block_key(scope: str, hash_id: int) -> bytes:
    """The 32-byte key under which a block of a trace is stored."""
    digest = _scope_digest(scope).copy()
    digest.update(hash_id.to_bytes(8, "little"))
    return digest.digest()


@functools.lru_cache(maxsize=1024)
def _scope_digest(scope: str) -> hashlib._Hash:
    encoded = scope.encode()
    return hashlib.sha256(len(encoded).to_bytes(8, "little") + encoded)


def load_traces(paths: Sequence[str | Path]) -> list[Trace]:
    """Read files of either format; patterns such as ``traces/*.json.gz`` are expanded.

    A file that is named twice is read once.

    Raises:
        ConfigError: A file is missing, unreadable, or not a trace; it names the file, the line
            and what was expected.
    """
    files = dict.fromkeys(file for path in paths for file in _expand(path))
    names = _UniqueNames()
    return [_load(file, names) for file in files]


def _expand(path: str | Path) -> list[Path]:
    literal = Path(path)
    if literal.is_dir():
        raise ConfigError("trace", path, "is a directory; name its files, as in 'DIRECTORY/*.json'")
    if literal.exists():
        return [literal]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise ConfigError("trace", path, "no such file, and no file matches it as a pattern")
    return [match for match in matches if match.is_file()]


class _UniqueNames:
    """Hands out names; one that is taken gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}#{number}"
        self._taken.add(name)
        return name


# --- files -------------------------------------------------------------------------------------


# The fields that are used; others may stand beside them.
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Kind(msgspec.Struct):
    """What tells the formats apart."""

    requests: msgspec.Raw = msgspec.Raw()
    timestamp: msgspec.Raw = msgspec.Raw()


class _MooncakeLine(msgspec.Struct):
    timestamp: _Seconds
    input_length: _Count
    output_length: _Count
    hash_ids: list[_Count]


class _AgenticRequest(msgspec.Struct, tag_field="type", tag="n", rename={"input": "in"}):
    t: _Seconds
    input: _Count
    hash_ids: list[_Count]
    out: _Count = 0


class _AgenticStreamed(_AgenticRequest, tag="s", rename={"input": "in"}):
    pass


class _Subagent(msgspec.Struct, tag_field="type", tag="subagent"):
    t: _Seconds
    requests: list[_AgenticRequest | _AgenticStreamed | _Subagent]
    agent_id: str = ""


class _AgenticSession(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    requests: list[_AgenticRequest | _AgenticStreamed | _Subagent]
    hash_id_scope: str = "local"


RecordT = TypeVar("RecordT", bound=msgspec.Struct)


class _Problem(Exception):
    """What is wrong with a file, before its name is put in front."""


def _load(path: Path, names: _UniqueNames) -> Trace:
    try:
        return _parse(path, names)
    except _Problem as problem:
        raise ConfigError("trace", path, str(problem)) from problem.__cause__
    except RecursionError as error:
        raise ConfigError("trace", path, "is nested too deeply, expected a trace") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError("trace", path, f"cannot be unpacked: {error}") from error
    except OSError as error:
        raise ConfigError("trace", path, f"cannot be read: {error.strerror or error}") from error


def _parse(path: Path, names: _UniqueNames) -> Trace:
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json") or path.name
    lines = _lines(path)
    try:
        number, first = next(lines)
    except StopIteration:
        raise _Problem("is empty, expected a trace") from None
    try:
        kind = msgspec.json.decode(first, type=_Kind)
    except msgspec.DecodeError:
        # One object over many lines, or no JSON: the whole will tell.
        whole = first + b"".join(line for _, line in lines)
        session = _decode(whole, _AgenticSession, number)
        return _agentic_trace(path, stem, [(number, session)], names)
    if kind.timestamp:
        records = [(number, _decode(first, _MooncakeLine, number))]
        records += [(at, _decode(line, _MooncakeLine, at)) for at, line in lines]
        return _mooncake_trace(stem, records, names)
    if kind.requests:
        sessions = [(number, _decode(first, _AgenticSession, number))]
        sessions += [(at, _decode(line, _AgenticSession, at)) for at, line in lines]
        return _agentic_trace(path, stem, sessions, names)
    raise _Problem(
        f"line {number}: expected an object with `requests` (agentic coding) or with"
        " `timestamp` (Mooncake)"
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1."""
    with path.open("rb") as file:
        packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _decode(data: bytes, type: type[RecordT], line: int) -> RecordT:
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        raise _Problem(f"line {line}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Problem(f"line {line}: expected a JSON object: {error}") from error


def _request(
    at_s: float, input_tokens: int, output_tokens: int, ids: list[int], block_tokens: int, line: int
) -> Request:
    full = input_tokens // block_tokens
    if len(ids) > full + 1:
        raise _Problem(
            f"line {line}: {len(ids)} hash ids for {input_tokens} tokens, expected at most"
            f" {full + 1} of {block_tokens} tokens each"
        )
    hash_ids = tuple(ids[:full])
    if len(set(hash_ids)) != len(hash_ids):
        raise _Problem(
            f"line {line}: a request names a hash id twice, expected the hash of a block to"
            " cover all that lies before it"
        )
    return Request(at_s, input_tokens, output_tokens, hash_ids)


# --- agentic coding ----------------------------------------------------------------------------


def _agentic_trace(
    path: Path, stem: str, records: list[tuple[int, _AgenticSession]], names: _UniqueNames
) -> Trace:
    block_tokens = records[0][1].block_size
    sessions: list[Session] = []
    for line, record in records:
        if record.block_size != block_tokens:
            raise _Problem(
                f"line {line}: block_size is {record.block_size}, expected {block_tokens} as in"
                " the lines before"
            )
        name = names.take(record.id)
        # "global" ids mean the same in all files that were published together.
        scope = name if record.hash_id_scope == "local" else f"{path.resolve().parent}/"
        sessions += _agentic_sessions(record.requests, name, scope, 0.0, block_tokens, line, 0)
    return _not_empty(Trace(stem, block_tokens, tuple(sessions)))


def _agentic_sessions(
    entries: list[_AgenticRequest | _AgenticStreamed | _Subagent],
    name: str,
    scope: str,
    starts_at_s: float,
    block_tokens: int,
    line: int,
    depth: int,
) -> list[Session]:
    """The conversation of `entries`, then those of the sub-agents that it started."""
    if depth > NESTING_MAX:
        raise _Problem(f"line {line}: {name} is nested more than {NESTING_MAX} deep")
    requests: list[Request] = []
    others: list[Session] = []
    agents = 0
    for entry in entries:
        if isinstance(entry, _Subagent):
            agents += 1
            # Its times count from the session's start or from its own; the first one tells.
            first_s = min((inner.t for inner in entry.requests), default=0.0)
            others += _agentic_sessions(
                entry.requests,
                f"{name}/{entry.agent_id or agents}",
                scope,
                starts_at_s + (entry.t if first_s < entry.t else 0.0),
                block_tokens,
                line,
                depth + 1,
            )
        else:
            requests.append(
                _request(
                    starts_at_s + entry.t,
                    entry.input,
                    entry.out,
                    entry.hash_ids,
                    block_tokens,
                    line,
                )
            )
    requests.sort(key=lambda request: request.at_s)
    own = [Session(name, scope, tuple(requests))] if requests else []
    return own + others


# --- Mooncake ----------------------------------------------------------------------------------


def _mooncake_trace(
    stem: str, records: list[tuple[int, _MooncakeLine]], names: _UniqueNames
) -> Trace:
    requests = [
        _request(
            record.timestamp / 1e3,
            record.input_length,
            record.output_length,
            record.hash_ids,
            MOONCAKE_BLOCK_TOKENS,
            line,
        )
        for line, record in records
    ]
    requests.sort(key=lambda request: request.at_s)
    scope = names.take(stem)
    sessions = tuple(
        Session(f"{scope}/{number}", scope, tuple(conversation))
        for number, conversation in enumerate(_conversations(requests), 1)
    )
    return _not_empty(Trace(stem, MOONCAKE_BLOCK_TOKENS, sessions))


def _conversations(requests: list[Request]) -> list[list[Request]]:
    """Group requests where one continues another's prefix.

    A request continues the conversation whose latest request's full blocks are all at the
    beginning of its own; of several the one that shares most. The blocks that all requests of
    the file begin with (a system prompt: one block in Mooncake's conversation trace) make no
    conversation. A second request that continues the same one is a branch, and begins a
    conversation of its own.
    """
    common = _common_blocks(requests)
    conversations: list[list[Request]] = []
    ends: dict[int, int] = {}  # the last block of a conversation -> its place in the list
    for request in requests:
        ids = request.hash_ids
        place = len(conversations)
        for length in range(len(ids), common, -1):
            candidate = ends.get(ids[length - 1])
            if candidate is not None and conversations[candidate][-1].hash_ids == ids[:length]:
                del ends[ids[length - 1]]
                place = candidate
                break
        else:
            conversations.append([])
        conversations[place].append(request)
        if len(ids) > common:
            ends[ids[-1]] = place
    return conversations


def _common_blocks(requests: list[Request]) -> int:
    if len(requests) < 2:
        return 0
    shortest = min(request.hash_ids for request in requests)
    longest = max(request.hash_ids for request in requests)
    for place, (first, last) in enumerate(zip(shortest, longest, strict=False)):
        if first != last:
            return place
    return min(len(shortest), len(longest))


def _not_empty(trace: Trace) -> Trace:
    if not trace.sessions:
        raise _Problem("holds no request")
    return trace


__all__ = [
    "MOONCAKE_BLOCK_TOKENS",
    "Request",
    "Session",
    "Trace",
    "block_key",
    "load_traces",
]
