"""Servers that lie, say nothing, or say what nobody understands."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from kvstore.checksum import block_seed, layer_checksums
from kvstore.errors import (
    RefusedError,
    RemoteProtocolError,
    TransportError,
)
from kvstore.layout import Geometry, namespace_id
from kvstore.messages import (
    CorruptReply,
    Data,
    Delete,
    DeleteReply,
    Done,
    Error,
    ErrorCode,
    Fetch,
    FetchOutcome,
    Goaway,
    Limits,
    Lookup,
    LookupReply,
    Message,
    Namespaces,
    Put,
    PutDone,
    PutOutcome,
    Role,
    Want,
    Welcome,
    decode,
)
from kvstore.wire import FrameType, Header
from kvstore_client import AsyncClient, Namespace, breaker
from tests.support.cluster import (
    chain,
    chain_with_owners,
    connected,
    contents,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import content, layout
from tests.support.peers import (
    Act,
    ScriptedServer,
    Talk,
    acknowledge,
    scripted,
    welcome,
)

HIT, MISS, CORRUPT, TIMEOUT, UNAVAILABLE = FetchOutcome
LAYOUT = layout(50, 70)
SIZE = 120
KEYS = chain(3)


def checksums(name: bytes, data: bytes) -> bytes:
    """What an honest server says of a block."""
    offsets = Geometry(LAYOUT.layer_bytes).offsets
    seed = block_seed(namespace_id("pool", LAYOUT), name)
    return layer_checksums([data[a:b] for a, b in pairwise(offsets)], seed)


HONEST = {name: content(name, SIZE) for name in KEYS}
GOOD = b"".join(checksums(name, data) for name, data in HONEST.items())
BYTES = b"".join(HONEST.values())

Answer = Callable[[Talk, int], None]


def data(payload: bytes, sums: bytes, piece: int = 0, offset: int = 0, **more: Any) -> Answer:
    def answer(talk: Talk, request_id: int) -> None:
        message = Data(checksums=sums, **more)
        talk.send(FrameType.DATA, request_id, message, payload, piece, offset)

    return answer


def done(outcomes: bytes, **more: Any) -> Answer:
    def answer(talk: Talk, request_id: int) -> None:
        talk.send(FrameType.DONE, request_id, Done(outcomes=outcomes, **more))

    return answer


def other(type: FrameType, message: Message, reply: bool = False, shift: int = 0) -> Answer:
    def answer(talk: Talk, request_id: int) -> None:
        talk.send(type, request_id + shift, message, reply=reply)

    return answer


def garbage(talk: Talk, request_id: int) -> None:
    talk.write(b"HTTP/1.1 200 OK\r\n\r\n" * 10)


def to_fetch(*answers: Answer) -> Act:
    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        for answer in answers:
            answer(talk, header.request_id)

    return act


def swapped() -> bytes:
    """The bytes of the second block under the key of the first, with right checksums of the
    second: what a server with a mixed-up index would send."""
    first, second, third = KEYS
    return (
        checksums(second, HONEST[second])
        + checksums(first, HONEST[first])
        + checksums(third, HONEST[third])
    )


HALF = bytes(16)
BROKEN = "broken"  # the connection is dropped with a RemoteProtocolError
#: (what the server answers, outcomes or BROKEN)
LIES: dict[str, tuple[tuple[Answer, ...], Any]] = {
    "the truth": ((data(BYTES, GOOD), done(b"\0\0\0")), [HIT] * 3),
    "wrong bytes": ((data(b"x" + BYTES[1:], GOOD), done(b"\0\0\0")), [CORRUPT, HIT, HIT]),
    "wrong checksums": ((data(BYTES, HALF + GOOD[16:]), done(b"\0\0\0")), [CORRUPT, HIT, HIT]),
    "other blocks, right checksums": (
        (data(HONEST[KEYS[1]] + HONEST[KEYS[0]] + HONEST[KEYS[2]], swapped()), done(b"\0\0\0")),
        [CORRUPT, CORRUPT, HIT],
    ),
    "layers exchanged": (
        (data(BYTES, GOOD[8:16] + GOOD[:8] + GOOD[16:]), done(b"\0\0\0")),
        [CORRUPT, HIT, HIT],
    ),
    "hits without bytes": ((done(b"\0\0\0"),), BROKEN),
    "a hit with half of its bytes": ((data(BYTES[:60], GOOD[:16]), done(b"\0\1\1")), BROKEN),
    "a miss after its bytes": ((data(BYTES, GOOD), done(b"\1\1\1")), [HIT] * 3),
    "hit and failed": ((data(BYTES, GOOD, failed=(0,)), done(b"\0\0\0")), [HIT] * 3),
    "failed first, then bytes": (
        (data(b"", b"", failed=(1,)), data(BYTES, GOOD), done(b"\0\0\0")),
        [HIT, MISS, HIT],
    ),
    "nothing at all": ((done(b"\1\1\1"),), [MISS] * 3),
    "beyond the last piece": ((data(bytes(SIZE), HALF, piece=3), done(b"\1\1\1")), BROKEN),
    "far beyond": ((data(bytes(8), HALF, piece=2**31), done(b"\1\1\1")), BROKEN),
    "longer than the request": ((data(BYTES + b"!", GOOD), done(b"\0\0\0")), BROKEN),
    "a gap": ((data(BYTES[10:120], b"", offset=10), done(b"\1\1\1")), BROKEN),
    "the same again": ((data(BYTES, GOOD), data(BYTES, GOOD), done(b"\0\0\0")), BROKEN),
    "too few checksums": ((data(BYTES, GOOD[:-8]), done(b"\0\0\0")), BROKEN),
    "too many checksums": ((data(BYTES, GOOD + HALF), done(b"\0\0\0")), BROKEN),
    "failed key that is none": ((data(b"", b"", failed=(3,)), done(b"\1\1\1")), BROKEN),
    "failed key below zero": ((data(b"", b"", failed=(-1,)), done(b"\1\1\1")), BROKEN),
    "too few outcomes": ((done(b"\1\1"),), BROKEN),
    "too many outcomes": ((done(b"\1\1\1\1"),), BROKEN),
    "an unknown outcome": ((done(b"\1\1\x09"),), BROKEN),
    "unknown tiers": ((data(BYTES, GOOD), done(b"\0\0\0", tiers=b"\0\0\x63")), BROKEN),
    "too few tiers": ((data(BYTES, GOOD), done(b"\0\0\0", tiers=b"\1")), BROKEN),
    "done twice": ((done(b"\1\1\1"), done(b"\1\1\1")), [MISS] * 3),
    "the answer of a put": ((other(FrameType.PUT_DONE, PutDone(outcomes=b"\0\0\0")),), BROKEN),
    "a want": ((other(FrameType.WANT, Want(indices=(0,))),), BROKEN),
    "another reply": ((other(FrameType.LOOKUP, LookupReply(bitmap=b"\7"), True),), BROKEN),
    "a report": ((other(FrameType.LOAD_REPORT, Done(outcomes=b"")),), BROKEN),
    "about another request": ((other(FrameType.DONE, Done(outcomes=b"\1"), shift=1000),), BROKEN),
    "no request id": ((lambda talk, _: talk.send(FrameType.DONE, 0, Done(outcomes=b"")),), BROKEN),
    "a request": ((other(FrameType.FETCH, Done(outcomes=b"")),), BROKEN),
    "not MessagePack": ((lambda talk, id: talk.send(FrameType.DONE, id, b"\xc1"),), BROKEN),
    "a wrong message": ((other(FrameType.DONE, Want(indices=(1,))),), BROKEN),
    "garbage": ((garbage,), BROKEN),
    "a refusal": (
        (other(FrameType.ERROR, Error(code=ErrorCode.LIMIT, message="too much")),),
        [UNAVAILABLE] * 3,
    ),
}  # fmt: skip


async def ask(client: AsyncClient, namespace: Namespace) -> tuple[list[FetchOutcome], list[Any]]:
    """Fetch; memory of a block is right if it is a hit, and nothing outside was written."""
    arena = bytearray(b"\xa5" * (3 * SIZE + 200))
    into = [memoryview(arena)[100 + n * SIZE : 100 + (n + 1) * SIZE] for n in range(3)]
    handle = client.fetch(namespace, KEYS, into, deadline_s=600)
    result = await handle
    await handle.quiesced()
    for name, outcome, memory in zip(KEYS, result.outcomes, into, strict=True):
        assert outcome is not HIT or bytes(memory) == HONEST[name]
    assert arena[:100] == arena[-100:] == b"\xa5" * 100
    return result.outcomes, result.errors


@pytest.mark.asyncio
@pytest.mark.parametrize("lie", LIES)
async def test_a_server_that_lies_about_a_fetch(lie: str) -> None:
    answers, expected = LIES[lie]
    async with (
        scripted({FrameType.FETCH: to_fetch(*answers)}) as server,
        connected(server.uri) as client,
    ):
        namespace = await client.open_namespace("pool", LAYOUT)
        outcomes, errors = await ask(client, namespace)
        if expected is BROKEN:
            assert not set(outcomes) - {HIT, UNAVAILABLE, MISS, CORRUPT}
            assert [type(error) for error in errors] == [RemoteProtocolError], errors
            # It is left, and asked again when it may have come to its senses.
            server.script[FrameType.FETCH] = to_fetch(data(BYTES, GOOD), done(b"\0\0\0"))
            await until(lambda: server.count(FrameType.HELLO) == 6)
            await until(lambda: client.cluster._links[0].up)
            assert (await ask(client, namespace))[0] == [HIT] * 3
        else:
            assert outcomes == expected
            if CORRUPT in outcomes:
                await until(lambda: server.count(FrameType.CORRUPT_REPORT))
            assert server.count(FrameType.CORRUPT_REPORT) == (CORRUPT in outcomes)


@pytest.mark.asyncio
async def test_a_last_layer_alone_is_no_block() -> None:
    """All of the last group of layers is right, and nothing else ever comes."""
    last = data(
        b"".join(HONEST[name][50:] for name in KEYS),
        b"".join(checksums(name, HONEST[name])[8:] for name in KEYS),
        piece=len(KEYS),
    )
    async with (
        scripted({FrameType.FETCH: to_fetch(last, done(b"\0\0\0"))}) as server,
        connected(server.uri) as client,
    ):
        namespace = await client.open_namespace("pool", LAYOUT)
        handle = client.fetch(namespace, KEYS, room(3, SIZE), order="layer", deadline_s=600)
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [UNAVAILABLE] * 3
        assert [type(error) for error in result.errors] == [RemoteProtocolError]


def to_put(*answers: Answer) -> Act:
    return to_fetch(*answers)


def want(*indices: int) -> Answer:
    return other(FrameType.WANT, Want(indices=indices))


def put_done(outcomes: bytes) -> Answer:
    return other(FrameType.PUT_DONE, PutDone(outcomes=outcomes))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answers",
    [
        (want(3),),
        (want(0, 0),),
        (want(0), want(0)),
        (want(-1),),
        (want(*range(4000)),),
        (put_done(b"\0"),),
        (put_done(b"\0\0\0\0"),),
        (put_done(b"\0\0\xff"),),
        (done(b"\0\0\0"),),
        (data(b"x", b""),),
        (garbage,),
        (other(FrameType.PUT, PutDone(outcomes=b"\0\0\0"), reply=True),),
    ],
)
async def test_a_server_that_lies_about_a_put(answers: tuple[Answer, ...]) -> None:
    async with (
        scripted({FrameType.PUT: to_put(*answers)}) as server,
        connected(server.uri) as client,
    ):
        namespace = await client.open_namespace("pool", LAYOUT)
        handle = client.put(namespace, KEYS, list(HONEST.values()), deadline_s=600)
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [PutOutcome.UNAVAILABLE] * 3
        assert [type(error) for error in result.errors] == [RemoteProtocolError]


@pytest.mark.asyncio
async def test_what_a_server_claims_to_have_stored_is_its_own_affair() -> None:
    async with (
        scripted({FrameType.PUT: to_put(put_done(b"\0\0\0"))}) as server,
        connected(server.uri) as client,
    ):
        namespace = await client.open_namespace("pool", LAYOUT)
        handle = client.put(namespace, KEYS, list(HONEST.values()), deadline_s=600)
        assert (await handle).outcomes == [PutOutcome.STORED] * 3
        await handle.quiesced()


def reply(type: FrameType, message: Message) -> Act:
    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        talk.send(type, header.request_id, message, reply=True)

    return act


@pytest.mark.asyncio
async def test_small_replies_that_cannot_be() -> None:
    script = {
        FrameType.DELETE: reply(FrameType.DELETE, DeleteReply(deleted=b"\1")),
        FrameType.STATUS: acknowledge,
    }
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        with pytest.raises(RemoteProtocolError, match="1 answers for 3 items"):
            await client.delete(namespace, KEYS)
        await until(lambda: client.cluster._links[0].up)
        assert isinstance((await client.status())[server.uri], RemoteProtocolError)


@pytest.mark.asyncio
async def test_a_server_that_opens_another_namespace() -> None:
    opened: list[bytes] = []

    def wrong(talk: Talk, header: Header, metadata: bytes) -> None:
        opened.append(metadata)
        message = Namespaces(namespaces=())
        talk.send(FrameType.OPEN_NAMESPACE, header.request_id, message, reply=True)

    async with (
        scripted({FrameType.OPEN_NAMESPACE: wrong}) as server,
        connected(server.uri) as client,
    ):
        with pytest.raises(RefusedError, match="another namespace"):
            await client.open_namespace("pool", LAYOUT)
        assert opened


# --- handshakes ----------------------------------------------------------------------------


def refuse(code: ErrorCode, message: str) -> Act:
    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        talk.send(FrameType.ERROR, 0, Error(code=code, message=message))

    return act


def say(message: Message, type: FrameType = FrameType.WELCOME) -> Act:
    return lambda talk, header, metadata: talk.send(type, 0, message)


def welcome_of(version: int, **more: Any) -> Welcome:
    values = {"node_id": "liar", "boot_id": bytes(16), "role": Role.DAEMON, **more}
    return Welcome(version=version, **values)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("hello", "text"),
    [
        (refuse(ErrorCode.VERSION, "versions 7 to 9"), "versions 7 to 9"),
        (refuse(ErrorCode.PERMISSION, "who are you"), "who are you"),
        (refuse(ErrorCode.LIMIT, "1024 connections"), "1024 connections"),
        (say(welcome_of(99)), "version 99"),
        (say(welcome_of(0)), "version 0"),
        (say(Goaway(reason="closed"), FrameType.GOAWAY), "instead of WELCOME"),
        (say(Done(outcomes=b""), FrameType.DONE), "instead of WELCOME"),
        (lambda talk, header, metadata: talk.close(), "closed|reset"),
        (lambda talk, header, metadata: talk.write(b"SSH-2.0-x\r\n" * 9), "magic"),
        (lambda talk, header, metadata: talk.send(FrameType.WELCOME, 0, b"\x93"), "WELCOME|Mess"),
        (lambda talk, header, metadata: None, "no WELCOME"),
    ],
)
async def test_a_server_that_does_not_welcome_us(hello: Act, text: str) -> None:
    timeout_s = 0.05 if text == "no WELCOME" else 5
    async with (
        scripted({FrameType.HELLO: hello}) as server,
        connected(server.uri, connect_timeout_s=timeout_s) as client,
    ):
        link = client.cluster._links[0]
        await until(lambda: re.search(text, str(link.last_error)))
        namespace = await client.open_namespace("pool", LAYOUT)
        outcomes, errors = await ask(client, namespace)
        assert outcomes == [UNAVAILABLE] * 3
        assert [type(error) for error in errors] == [TransportError]
        assert re.search(text, str(errors[0]))
        assert server.count(FrameType.FETCH) == 0


@pytest.mark.asyncio
async def test_a_second_welcome_breaks_the_connection() -> None:
    def twice(talk: Talk, header: Header, metadata: bytes) -> None:
        welcome(talk, header, metadata)
        welcome(talk, header, metadata)

    async with (
        scripted({FrameType.HELLO: twice}) as server,
        connected(server.uri, connect_timeout_s=0.05) as client,
    ):
        namespace = await client.open_namespace("pool", LAYOUT)
        assert (await ask(client, namespace))[0] == [UNAVAILABLE] * 3


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_sick_server_beside_a_good_one_costs_its_own_blocks() -> None:
    """Half of the extents belong to a daemon that never answers; the rest is served."""
    async with serve(1) as nodes, scripted({}) as server:
        ends = [nodes[0].uri, server.uri]
        keys = chain_with_owners(ends, [(0, 1), (1, 0)])
        async with connected(ends) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys[:64])
            into = room(128)
            handle = client.fetch(namespace, keys, into, deadline_s=0.2)
            result = await handle
            await handle.quiesced()
            assert result.outcomes == [HIT] * 64 + [TIMEOUT] * 64
            found = await client.lookup(namespace, keys, deadline_s=0.2)
            assert found.prefix == 64
            assert found.unreachable == [server.uri]


async def fetches_came(server: ScriptedServer, count: int) -> None:
    """Wait until a server has seen that many."""
    await until(lambda: server.count(FrameType.FETCH) == count)


@pytest.mark.asyncio
async def test_a_server_that_never_answers_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DELAY_S_MIN", "DELAY_S_MAX"):
        monkeypatch.setattr(breaker, name, 600.0)
    async with scripted({}) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        for sent in range(0, 2 * breaker.FAILURES_MAX, 2):
            given_up = client.fetch(namespace, KEYS, room(3, SIZE), deadline_s=600)
            await fetches_came(server, sent + 1)
            given_up.cancel()  # says nothing about the server
            handle = client.fetch(namespace, KEYS, room(3, SIZE), deadline_s=0.01)
            assert (await handle).outcomes == [TIMEOUT] * 3
            await handle.quiesced()
        total = 2 * breaker.FAILURES_MAX
        await fetches_came(server, total)
        outcomes, errors = await ask(client, namespace)
        assert outcomes == [UNAVAILABLE] * 3
        assert "left alone" in str(errors[0])
        put = await client.put(namespace, KEYS, contents(KEYS, SIZE), deadline_s=600)
        assert put.outcomes == [PutOutcome.UNAVAILABLE] * 3
        assert (await client.lookup(namespace, KEYS)).unreachable == [server.uri]
        assert server.count(FrameType.FETCH) == total


@pytest.mark.asyncio
async def test_limits_of_a_server_are_kept() -> None:
    """A server that takes three keys at most gets no more in a request."""
    limits = welcome_of(1, limits=Limits(keys_per_request=3, metadata_bytes=2048))
    sizes: list[int] = []

    def count(kind: Any) -> Act:
        def act(talk: Talk, header: Header, metadata: bytes) -> None:
            wanted = len(decode(metadata, kind).keys)
            sizes.append(wanted)
            assert len(metadata) <= 2048
            answers: dict[Any, Callable[[], None]] = {
                Fetch: lambda: done(b"\1" * wanted)(talk, header.request_id),
                Put: lambda: put_done(b"\1" * wanted)(talk, header.request_id),
                Lookup: lambda: talk.send(
                    FrameType.LOOKUP, header.request_id, LookupReply(bitmap=b"\7"), reply=True
                ),
                Delete: lambda: talk.send(
                    FrameType.DELETE, header.request_id, DeleteReply(deleted=b"\1" * wanted),
                    reply=True,
                ),
            }  # fmt: skip
            answers[kind]()

        return act

    script = {FrameType.HELLO: say(limits)}
    script |= {kind: count(message) for kind, message in (
        (FrameType.FETCH, Fetch), (FrameType.PUT, Put),
        (FrameType.LOOKUP, Lookup), (FrameType.DELETE, Delete))}  # fmt: skip
    keys = chain(10)
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        assert (await client.fetch(namespace, keys, room(10, SIZE))).outcomes == [MISS] * 10
        assert (await client.put(namespace, keys, contents(keys, SIZE))).ok
        await client.lookup(namespace, keys)
        assert await client.delete(namespace, keys) == [True] * 10
        assert max(sizes) == 3
        assert sum(sizes) == 40


@pytest.mark.asyncio
async def test_corrupt_blocks_are_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers = data(b"x" + BYTES[1:], HALF + GOOD[16:32] + HALF), done(b"\0\0\0")
    script = {
        FrameType.FETCH: to_fetch(*answers),
        FrameType.CORRUPT_REPORT: reply(FrameType.CORRUPT_REPORT, CorruptReply(dropped=b"\1\1")),
    }
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        for _ in range(3):
            assert (await ask(client, namespace))[0] == [CORRUPT, HIT, CORRUPT]
        counters = client.counters()
        assert counters["corrupt_blocks"] == counters["fetch_blocks_corrupt"] == 6
        assert counters["fetch_blocks_hit"] == 3
    lines = [record.getMessage() for record in caplog.records if "corrupt" in record.getMessage()]
    assert len(lines) == 1
    assert re.search(r"liar served 2 corrupt blocks", lines[0])


@pytest.mark.asyncio
async def test_the_honest_answer_is_that_of_a_real_node() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        await store_blocks(client, namespace, KEYS)
        slots = nodes[0].store.pools.namespace(namespace.id).slots
        stored = b"".join(nodes[0].store.index.checksums[slots[name]] or b"" for name in KEYS)
        assert stored == GOOD
