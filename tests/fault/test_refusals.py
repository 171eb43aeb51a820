"""Servers that say no, grant less than was asked for, or answer when nobody waits any more."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import LayoutMismatch, LimitExceeded, PermissionDenied, RefusedError
from kvstore.messages import (
    Done,
    Error,
    ErrorCode,
    Fetch,
    FetchOutcome,
    Limits,
    Lookup,
    LookupReply,
    Message,
    Put,
    PutDone,
    PutOutcome,
    Release,
    Role,
    Welcome,
    decode,
)
from kvstore.protocol import ClientProtocol
from kvstore.wire import VERSION, FrameType, Header
from kvstore_client import AsyncClient, Namespace, breaker, namespaces
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
from tests.support.engine import layout
from tests.support.peers import Act, Talk, open_namespace, scripted

HIT, MISS, CORRUPT, TIMEOUT, UNAVAILABLE = FetchOutcome
LAYOUT = layout(50, 70)
SIZE = 120
KEYS = chain(3)


def reply(type: FrameType, message: Message) -> Act:
    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        talk.send(type, header.request_id, message, reply=True)

    return act


def ends_with(type: FrameType, message: Message) -> Act:
    """The last word about a fetch or a put."""
    return lambda talk, header, metadata: talk.send(type, header.request_id, message)


def welcomes_with(limits: Limits) -> Act:
    message = Welcome(
        version=VERSION, node_id="server", boot_id=bytes(16), role=Role.DAEMON, limits=limits
    )
    return lambda talk, header, metadata: talk.send(FrameType.WELCOME, 0, message)


# --- lookups -------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("size_bytes", [0, 2, 1_000_000])
async def test_a_bitmap_of_another_length_is_no_answer(size_bytes: int) -> None:
    lie = reply(FrameType.LOOKUP, LookupReply(bitmap=b"\xff" * size_bytes, lease=1))
    async with scripted({FrameType.LOOKUP: lie}) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        found = await client.lookup(namespace, KEYS, lease_s=1)
        assert (found.prefix, found.hits, found.leases) == (0, [False] * 3, [])
        assert (found.unreachable, found.refused) == ([server.uri], {})
        # It is left, and asked again when it may have come to its senses.
        await until(lambda: server.count(FrameType.HELLO) == 6)


@pytest.mark.asyncio
async def test_a_daemon_that_grants_no_lease_is_told_from_one_that_does() -> None:
    granted = reply(FrameType.LOOKUP, LookupReply(bitmap=b"\3", lease=9))
    refused = reply(FrameType.LOOKUP, LookupReply(bitmap=b"\7"))
    async with scripted({FrameType.LOOKUP: granted}) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        found = await client.lookup(namespace, KEYS, lease_s=1)
        assert (found.prefix, found.leased, len(found.leases)) == (2, 2, 1)
        server.script[FrameType.LOOKUP] = refused
        found = await client.lookup(namespace, KEYS, lease_s=1)
        assert (found.prefix, found.leased, found.leases) == (3, 0, [])


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel"])
async def test_a_lease_that_comes_too_late_is_given_back(end: str) -> None:
    asked: list[tuple[Talk, int]] = []

    def keep(talk: Talk, header: Header, metadata: bytes) -> None:
        asked.append((talk, header.request_id))

    async with scripted({FrameType.LOOKUP: keep}) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        deadline_s = 0.05 if end == "deadline" else 600
        looking = asyncio.ensure_future(
            client.lookup(namespace, KEYS, lease_s=60, deadline_s=deadline_s)
        )
        await until(lambda: asked)
        if end == "cancel":
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking
        else:
            assert (await looking).unreachable == [server.uri]
        talk, request_id = asked[0]
        late = LookupReply(bitmap=b"\7", lease=77)
        talk.send(FrameType.LOOKUP, request_id, late, reply=True)
        await until(lambda: server.count(FrameType.RELEASE))
        assert decode(server.seen[FrameType.RELEASE][0], Release).leases == (77,)


@pytest.mark.asyncio
async def test_leases_of_a_lookup_that_is_cancelled_are_given_back() -> None:
    """One daemon has granted its part, another hangs."""
    granted = reply(FrameType.LOOKUP, LookupReply(bitmap=b"\xff" * 8, lease=5))
    async with scripted({FrameType.LOOKUP: granted}) as good, scripted({}) as hanging:
        ends = [good.uri, hanging.uri]
        async with connected(ends) as client:
            namespace = await client.open_namespace("pool", LAYOUT)
            keys = chain_with_owners(ends, [(0, 1), (1, 0)])
            looking = asyncio.ensure_future(
                client.lookup(namespace, keys, lease_s=60, deadline_s=600)
            )
            await until(lambda: hanging.count(FrameType.LOOKUP))
            await until(lambda: _waits_for(client, 0) == 1, "only the subscription")
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking
            await until(lambda: good.count(FrameType.RELEASE))
            assert decode(good.seen[FrameType.RELEASE][0], Release).leases == (5,)


def _waits_for(client: AsyncClient, index: int) -> int:
    """Requests without a reply on a link's control connection."""
    channels = client.cluster._links[index]._channels
    assert channels is not None
    protocol = channels.control.protocol
    assert isinstance(protocol, ClientProtocol)
    return protocol.call_count


# --- refusals ------------------------------------------------------------------------------


def no(code: ErrorCode, text: str = "no") -> Act:
    def act(talk: Talk, header: Header, metadata: bytes) -> None:
        message = Error(code=code, message=text, field="dtype")
        talk.send(FrameType.ERROR, header.request_id, message)

    return act


@pytest.mark.asyncio
async def test_a_lookup_that_is_refused_says_so() -> None:
    script = {FrameType.LOOKUP: no(ErrorCode.LIMIT, "too many probes")}
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        found = await client.lookup(namespace, KEYS)
        assert (found.prefix, found.unreachable) == (0, [])
        assert [type(error) for error in found.refused.values()] == [LimitExceeded]
        assert list(found.refused) == [server.uri]
        # It answered: that is no reason to leave it alone.
        for _ in range(2 * breaker.FAILURES_MAX):
            assert (await client.lookup(namespace, KEYS)).refused


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [ErrorCode.LAYOUT, ErrorCode.NAMESPACE])
async def test_an_unknown_namespace_is_opened_again_and_not_in_a_storm(
    monkeypatch: pytest.MonkeyPatch, code: ErrorCode
) -> None:
    monkeypatch.setattr(namespaces, "REOPEN_PAUSE_S", 600.0)
    script = {
        kind: no(ErrorCode.NAMESPACE) for kind in (FrameType.FETCH, FrameType.PUT, FrameType.LOOKUP)
    }
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        server.script[FrameType.OPEN_NAMESPACE] = no(code)
        for _ in range(10):
            result = await client.fetch(namespace, KEYS, room(3, SIZE))
            assert result.outcomes == [UNAVAILABLE] * 3
            put = await client.put(namespace, KEYS, contents(KEYS, SIZE))
            assert put.outcomes == [PutOutcome.UNAVAILABLE] * 3
            found = await client.lookup(namespace, KEYS)
            assert list(found.refused) == [server.uri]
        await until(lambda: server.count(FrameType.OPEN_NAMESPACE) == 2)
        other = Namespace("pool", layout(1))  # which this client has not opened
        assert list((await client.lookup(other, KEYS)).refused.values())
        assert server.count(FrameType.OPEN_NAMESPACE) == 2


@pytest.mark.asyncio
async def test_a_pin_against_us_is_known_and_never_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(namespaces, "REOPEN_PAUSE_S", 0.0)
    script = {FrameType.FETCH: no(ErrorCode.NAMESPACE), FrameType.LOOKUP: no(ErrorCode.NAMESPACE)}
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        server.script[FrameType.OPEN_NAMESPACE] = no(ErrorCode.LAYOUT, "pinned")
        await client.fetch(namespace, KEYS, room(3, SIZE))
        await until(lambda: client.cluster._links[0].refusal(namespace))
        for _ in range(5):
            result = await client.fetch(namespace, KEYS, room(3, SIZE))
            assert result.outcomes == [UNAVAILABLE] * 3
            assert [type(error) for error in result.errors] == [LayoutMismatch]
            await client.lookup(namespace, KEYS)
        assert server.count(FrameType.OPEN_NAMESPACE) == 2
        assert server.count(FrameType.FETCH) == 1


@pytest.mark.asyncio
async def test_one_daemon_that_refuses_a_namespace_costs_its_own_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(namespaces, "REOPEN_PAUSE_S", 0.0)
    script = {FrameType.OPEN_NAMESPACE: no(ErrorCode.LIMIT, "256 pools exist")}
    async with serve(1) as nodes, scripted(script) as server:
        ends = [nodes[0].uri, server.uri]
        async with connected(ends) as client:
            namespace = await open_pool(client)
            keys = chain_with_owners(ends, [(0, 1), (1, 0)])
            await store_blocks(client, namespace, keys[:64])
            into = room(128)
            handle = client.fetch(namespace, keys, into)
            result = await handle
            await handle.quiesced()
            assert result.outcomes == [HIT] * 64 + [UNAVAILABLE] * 64
            assert [str(error) for error in result.errors] == ["256 pools exist"]
            # When there is room again it serves, without being opened by hand.
            server.script[FrameType.OPEN_NAMESPACE] = open_namespace
            await until(lambda: client.cluster._links[1].refusal(namespace) is None)
            assert server.count(FrameType.FETCH) == 0
            handle = client.fetch(namespace, keys, into, deadline_s=0.05)
            assert (await handle).outcomes == [HIT] * 64 + [TIMEOUT] * 64
            await handle.quiesced()
            assert server.count(FrameType.FETCH) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (ErrorCode.LIMIT, ErrorCode.UNSUPPORTED, LimitExceeded),
        (None, ErrorCode.LAYOUT, LayoutMismatch),
        (ErrorCode.LIMIT, ErrorCode.PERMISSION, PermissionDenied),
        (ErrorCode.LIMIT, None, None),
        (ErrorCode.DRAINING, ErrorCode.LIMIT, None),
    ],
)
async def test_when_opening_a_namespace_fails(
    first: ErrorCode | None, second: ErrorCode | None, error: type[RefusedError] | None
) -> None:
    scripts = [{FrameType.OPEN_NAMESPACE: no(code)} if code else {} for code in (first, second)]
    async with (
        scripted(scripts[0]) as one,
        scripted(scripts[1]) as two,
        connected([one.uri, two.uri]) as client,
    ):
        if error is None:
            await client.open_namespace("pool", LAYOUT)
        else:
            with pytest.raises(error):
                await client.open_namespace("pool", LAYOUT)


# --- limits --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_times_that_a_server_allows_are_kept_and_told() -> None:
    limits = Limits(deadline_ms=1000, lease_ms=2000, metadata_bytes=1300)
    script = {
        FrameType.HELLO: welcomes_with(limits),
        FrameType.FETCH: ends_with(FrameType.DONE, Done(outcomes=b"\1" * 3)),
        FrameType.PUT: ends_with(FrameType.PUT_DONE, PutDone(outcomes=b"\1" * 3)),
        FrameType.LOOKUP: reply(FrameType.LOOKUP, LookupReply(bitmap=b"\7", lease=1)),
    }
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        await client.fetch(namespace, KEYS, room(3, SIZE), deadline_s=600)
        await client.put(namespace, KEYS, contents(KEYS, SIZE), deadline_s=600)
        found = await client.lookup(namespace, KEYS, lease_s=60)
        assert [lease.duration_s for lease in found.leases] == [2.0]
        assert decode(server.seen[FrameType.LOOKUP][0], Lookup).lease_ms == 2000
        assert decode(server.seen[FrameType.FETCH][0], Fetch).deadline_ms == 1000
        assert decode(server.seen[FrameType.PUT][0], Put).deadline_ms == 1000


@pytest.mark.asyncio
async def test_keys_of_any_request_fit_into_the_metadata_that_a_server_takes() -> None:
    limits = Limits(metadata_bytes=1300)
    longest = [name * 2 for name in chain(9)]

    def miss(talk: Talk, header: Header, metadata: bytes) -> None:
        assert len(metadata) <= 1300
        count = len(decode(metadata, Fetch).keys)
        talk.send(FrameType.DONE, header.request_id, Done(outcomes=b"\1" * count))

    def nothing(talk: Talk, header: Header, metadata: bytes) -> None:
        assert len(metadata) <= 1300
        assert len(decode(metadata, Lookup).keys) <= 8
        talk.send(FrameType.LOOKUP, header.request_id, LookupReply(bitmap=b"\0"), reply=True)

    script = {
        FrameType.HELLO: welcomes_with(limits),
        FrameType.FETCH: miss,
        FrameType.LOOKUP: nothing,
    }
    async with scripted(script) as server, connected(server.uri) as client:
        ranks = [
            await client.open_namespace("pool", layout(50, 70, tp_rank=rank, tp_size=16))
            for rank in range(16)
        ]
        fetched = await client.fetch(ranks[0], longest, room(9, SIZE))
        assert fetched.outcomes == [MISS] * 9
        assert server.count(FrameType.FETCH) == 3  # four keys each
        found = await client.lookup(ranks, longest)
        assert (found.unreachable, found.refused) == ([], {})
        assert server.count(FrameType.LOOKUP) == 9  # the ids of 16 ranks leave room for one


@pytest.mark.asyncio
async def test_a_peer_that_says_how_long_it_took_is_quoted() -> None:
    answer = Done(outcomes=b"\1\1\1", queued_us=17, service_us=4)
    script = {FrameType.FETCH: ends_with(FrameType.DONE, answer)}
    async with scripted(script) as server, connected(server.uri) as client:
        namespace = await client.open_namespace("pool", LAYOUT)
        result = await client.fetch(namespace, KEYS, room(3, SIZE))
        assert [(run.queued_us, run.service_us) for run in result.runs] == [(17, 4)]
