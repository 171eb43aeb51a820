"""Regions and views of a client where somebody gives up, or a link goes down, in between."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.buffers import Region as Kernel
from kvstore.endpoint import parse_endpoint
from kvstore.errors import (
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from kvstore.memorymessages import RenewReply
from kvstore.messages import FetchOutcome, Message, ViewReply
from kvstore.protocol import client as client_protocol
from kvstore_client import Agent, AgentOptions, AsyncClient, Client, agreement as agreement_module
from kvstore_client.ctl import doctor_transfer
from kvstore_client.link import PeerLink
from kvstore_client.linkmemory import SharedMemory
from kvstore_client.memory import Region, Regions
from tests.integration.test_client_views import KEYS, host, store
from tests.support.cluster import MIB, connected, open_pool, serve, until
from tests.support.fakeverbs import FakeVerbs
from tests.support.links import cut, link_of, on_one_host, reconnected
from tests.support.loops import turns
from tests.support.memorypeer import descriptors
from tests.support.rdmaserved import passive_end, served


async def cancelled_after(count: int, task: asyncio.Task[Any]) -> bool:
    """Cancel a task after some turns of the loop; whether it had not ended by then."""
    await turns(count)
    early = task.cancel()
    await asyncio.wait([task])
    return early


# --- views ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_link_that_goes_down_with_the_answer_to_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is here, and the mapping is closed before anybody looks at it."""
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        link = link_of(client)
        ask = link.call

        async def answered_at_last(*asked: Any, **terms: Any) -> Message:
            reply = await ask(*asked, **terms)
            link._take_down(TransportError("cut by the test"))
            return reply

        monkeypatch.setattr(link, "call", answered_at_last)
        views = await client.view(namespace, KEYS[:2])
        assert views.blocks == [None, None]
        assert views.outcomes == [FetchOutcome.UNAVAILABLE] * 2
        assert "cut by the test" in str(views.errors)
        assert not views._leases


@pytest.mark.asyncio
async def test_release_that_is_cancelled_ends_the_leases() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        for count in range(6):
            views = await client.view(namespace, KEYS[:2])
            releasing = asyncio.ensure_future(views.release())
            await cancelled_after(count, releasing)
            if not count:  # it has not begun
                await views.release()
            await until(lambda: one.pins == 0, f"cancelled after {count} turns")
            for lease in views._leases:
                assert lease._timer.cancelled()


@pytest.mark.asyncio
async def test_late_renewal_does_not_make_a_lease_that_held_one_that_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RENEW and RELEASE travel on two connections: the server may see the second one first."""
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        (lease,) = views._leases
        link = link_of(client)
        ask = link.call

        async def overtaken(*asked: Any, **terms: Any) -> Message:
            reply = await ask(*asked, **terms)
            lease._renewed(RenewReply(held=(False,)))
            return reply

        monkeypatch.setattr(link, "call", overtaken)
        assert await views.release() is True


@pytest.mark.asyncio
async def test_questions_for_the_mapping_that_are_cancelled_leave_no_descriptor() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        link = link_of(client)
        memory = link.memory
        assert isinstance(memory, SharedMemory)
        async with AsyncClient(one.uris[0]) as other:  # once, the server opens its memory again
            await (await other.view(await store(other, KEYS[:2]), KEYS[:2])).release()
        await until(lambda: len(one.server.sessions) == 1)
        before = descriptors("self").count("/memfd")
        for _ in range(20):
            task = asyncio.ensure_future(memory.map(namespace.id))
            await turns(1)  # it is asked
            task.cancel()
            await asyncio.wait([task])
        views = await client.view(namespace, KEYS[:2])
        assert views.hit_count == 2, views.errors
        assert link.memory is memory, "the link was lost"
        assert descriptors("self").count("/memfd") == before + 1  # that of the mapping
        assert await views.release()


@pytest.mark.asyncio
@pytest.mark.parametrize("lie", ["beyond", "across", "outcome"])
async def test_answer_to_view_that_cannot_be(monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """Its blocks lie nowhere, or fared as none does: there are no views, and no lease is kept."""
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        link = link_of(client)
        ask = link.call
        first = {"beyond": 1 << 60, "across": one.arena.size_bytes - 1}.get(lie, 0)

        async def answer(*asked: Any, **terms: Any) -> Message:
            reply = await ask(*asked, **terms)
            if not isinstance(reply, ViewReply):
                return reply
            outcomes = bytes([200, 0]) if lie == "outcome" else reply.done.outcomes
            return msgspec.structs.replace(
                reply,
                done=msgspec.structs.replace(reply.done, outcomes=outcomes),
                offsets=struct.pack("<2Q", 0, first),
            )

        monkeypatch.setattr(link, "call", answer)
        views = await client.view(namespace, KEYS[:2])
        assert views.blocks == [None, None]
        assert views.hit_count == 0
        assert [type(error) for error in views.errors] == [RemoteProtocolError]
        await until(lambda: one.pins == 0, "the lease was given back")


# --- regions --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_free_that_is_cancelled_takes_the_region_back(tmp_path: Path) -> None:
    async with on_one_host(tmp_path) as (node, client):
        (session,) = node.server.sessions.values()
        for count in range(1, 6):
            region = await client.allocate(4096)
            assert len(session.memory.shared) == 1
            await cancelled_after(count, asyncio.ensure_future(client.free(region)))
            await until(lambda: len(session.memory.shared) == 0, f"after {count} turns")
            await until(lambda region=region: not region.view, "it is unmapped")


@pytest.mark.asyncio
async def test_region_that_a_new_link_has_handed_over_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link comes up between the moment that a region is listed and that in which its maker
    hands it over. It must be known as handed over, or nobody takes it back."""
    listed, go_on = threading.Event(), threading.Event()
    real = Regions.allocate

    def allocate(self: Regions, size_bytes: int) -> Region:
        region = real(self, size_bytes)
        listed.set()
        go_on.wait()
        return region

    async with on_one_host(tmp_path) as (node, client):
        link = link_of(client)
        await until(lambda: link.up, "the link")
        monkeypatch.setattr(Regions, "allocate", allocate)
        allocating = asyncio.ensure_future(client.allocate(4096))
        await until(listed.is_set, "it is listed")
        cut(client)
        await reconnected(client)
        go_on.set()
        region = await allocating
        assert link.memory is not None
        assert not link.memory.refusals
        (session,) = node.server.sessions.values()
        assert len(session.memory.shared) == 1
        await client.free(region)
        assert len(session.memory.shared) == 0


@pytest.mark.asyncio
async def test_region_that_could_not_be_handed_over_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The link stays up: nobody tries it again."""
    async with on_one_host(tmp_path) as (_, client):
        namespace = await open_pool(client)
        memory = link_of(client).memory

        async def add(region: Region) -> None:
            raise TransportError("descriptor 7: Too many open files")

        monkeypatch.setattr(memory, "add", add)
        region = await client.allocate(namespace.geometry.block_bytes)
        assert "Too many open files" in caplog.text
        result = await client.put(namespace, KEYS[:1], [region.view])
        assert "Too many open files" in str(result.errors)
        caplog.clear()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["fetch", "put"])
async def test_memory_of_a_request_that_was_not_sent_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The link is up: nobody would ever say of it that its peer touches the memory no more."""
    async with on_one_host(tmp_path) as (_, client):
        namespace = await open_pool(client)
        region = await client.allocate(namespace.geometry.block_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(client_protocol, "CALLS_MAX", 0)
            handle = getattr(client, kind)(namespace, KEYS[:1], [region.view], deadline_s=60)
            result = await handle
        assert "the limit is 0" in str(result.errors)
        await until(handle.quiet.done, "quiet")
        assert region.users == 0
        assert link_of(client).up


@pytest.mark.asyncio
async def test_allocate_with_a_peer_that_breaks_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with one that is down: when the link is up again it gets the region."""
    async with on_one_host(tmp_path) as (_, client):
        link = link_of(client)
        assert isinstance(link.memory, SharedMemory)

        async def ask(*request: object) -> Message:
            error = RemoteProtocolError("nonsense")
            link._take_down(error)
            raise error

        monkeypatch.setattr(link.memory, "_ask", ask)
        region = await client.allocate(4096)
        await until(lambda: link.memory is not None and link.memory.knows(region), "again")


@pytest.mark.asyncio
async def test_what_is_no_buffer_is_not_registered(tmp_path: Path) -> None:
    async with on_one_host(tmp_path) as (_, client):
        for buffer in (5, b"abc", bytearray(0), memoryview(bytearray(8))[::2], None):
            with pytest.raises(LocalProtocolError, match="register"):
                await client.register(buffer)
        assert not len(client.cluster.regions)


@pytest.mark.asyncio
async def test_closed_client_takes_no_memory(tmp_path: Path) -> None:
    async with serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,):
        before = len(os.listdir("/proc/self/fd"))
        async with connected([node]) as client:
            listed, go_on = threading.Event(), threading.Event()
            real = client.cluster.regions.allocate

            def allocate(size_bytes: int) -> Region:
                listed.set()
                go_on.wait()
                return real(size_bytes)

            client.cluster.regions.allocate = allocate  # type: ignore[method-assign]
            late = asyncio.ensure_future(client.allocate(4096))
            await until(listed.is_set, "it is being made")
        go_on.set()
        with pytest.raises(TransportError, match="closed"):
            await late
        for take in (lambda: client.allocate(4096), lambda: client.register(bytearray(64))):
            with pytest.raises(TransportError, match="closed"):
                await take()
        await node.left_alone()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left")
        assert not len(client.cluster.regions)


# --- the end --------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
async def test_close_that_is_cancelled_lets_go_of_all(system: FakeVerbs) -> None:
    for count in range(1, 8):
        async with served() as (_, client, _namespace):
            region = await client.allocate(4096)
            (registration,) = region.registrations.values()
            await cancelled_after(count, asyncio.ensure_future(client.cluster.close()))
            assert registration.closed, f"cancelled after {count} turns"
            assert not client.cluster._agreement._nodes._nodes, f"after {count} turns"
            await until(lambda region=region: not region.view, "it is unmapped")


@pytest.mark.asyncio
@pytest.mark.slow
async def test_queue_pairs_that_fail_before_the_link_is_up(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing could be moved by such a link, and nobody would look at it again."""
    monkeypatch.setattr(agreement_module, "LAST_WORDS_S", 0.001)
    real = agreement_module.Agreement.share_all
    broken: list[object] = []

    async def share_all(self: Any, memory: Any, peer: str) -> None:
        await real(self, memory, peer)
        if not broken:
            for queue in list(memory._end.queues):
                memory._end.fail(queue, TransportError("the device is broken"))
            broken.append(memory)
            over = asyncio.Event()
            asyncio.get_running_loop().call_later(0.02, over.set)
            await over.wait()

    monkeypatch.setattr(agreement_module.Agreement, "share_all", share_all)
    async with served() as (_, client, _namespace):
        link = link_of(client)
        await until(lambda: link.up and link.memory is not None, "the link")
        assert broken
        assert passive_end(client).failed is None
        assert link.memory not in broken


@pytest.mark.asyncio
async def test_agent_that_is_given_up_while_its_memory_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touching, go_on = threading.Event(), threading.Event()

    def touch(self: Kernel) -> None:
        touching.set()
        go_on.wait()

    monkeypatch.setattr(Kernel, "touch", touch)
    agent = Agent(AgentOptions(node_id="agent", storage=("tcp://127.0.0.1:1",), memory_bytes=MIB))
    starting = asyncio.ensure_future(agent.start())
    await until(touching.is_set, "it is being touched")
    starting.cancel()
    await asyncio.wait([starting])
    go_on.set()
    assert starting.cancelled(), starting.exception()
    assert agent._region is not None
    assert agent._region.closed


def test_call_that_is_interrupted_goes_on_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: what it would have allocated, or leased, nobody could give back."""
    asked, cancelled = threading.Event(), threading.Event()

    async def allocate(size_bytes: int) -> Region:
        asked.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    def interrupted(self: Future[Any], timeout: float | None = None) -> Any:
        asked.wait()
        raise KeyboardInterrupt

    with Client("tcp://127.0.0.1:1") as client:
        monkeypatch.setattr(client._client, "allocate", allocate)
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.allocate(4096)
        assert cancelled.wait(20)


# --- options and messages -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda uri: AsyncClient(uri), "endpoints"),
        (lambda uri: AsyncClient("tcp://127.0.0.1:1", relays=[uri]), "relays"),
    ],
)
def test_options_of_rdma_are_checked_when_a_client_is_made(
    make: Callable[[str], AsyncClient], option: str
) -> None:
    with pytest.raises(ConfigError, match="mtu=1000: must be") as caught:
        make("rdma://127.0.0.1:2?mtu=1000")
    assert caught.value.option == option


@pytest.mark.parametrize("option", ["storage", "relays", "listen"])
def test_options_of_rdma_are_checked_when_an_agent_is_made(option: str) -> None:
    uris: dict[str, Any] = {
        "storage": ("tcp://127.0.0.1:1",),
        option: ("rdma://127.0.0.1:2?mtu=7",),
    }
    with pytest.raises(ConfigError, match="mtu=7: must be") as caught:
        Agent(AgentOptions(node_id="agent", memory_bytes=MIB, **uris))
    assert caught.value.option == option


@pytest.mark.asyncio
async def test_views_that_transport_rules_out_say_so() -> None:
    async with host() as one, AsyncClient(one.uris[1], transport="tcp") as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        assert "transport=tcp" in str(views.errors[0])


@pytest.mark.asyncio
async def test_what_is_wanted_and_not_offered_has_a_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as (node,):
        for transport, remedy in (
            ("unix", "unix://"),
            ("shm", "unix://"),
            ("rdma", "rdma://"),
        ):
            async with connected([node], transport=transport) as client:
                error = str(link_of(client).last_error)
            assert f"transport={transport}" in error
            assert remedy in error
            assert "transport=auto" in error
    caplog.clear()


# --- kvctl doctor ---------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
async def test_doctor_does_not_wait_for_memory_that_a_peer_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that hangs in the middle of the transfer."""
    monkeypatch.setattr(doctor_transfer, "STALL_S", 0.0)
    monkeypatch.setattr(SharedMemory, "_ended", lambda self: None)
    real = PeerLink.put

    def put(self: PeerLink, *rest: Any) -> int:
        number = real(self, *rest)
        self._take_down(TransportError("cut by the test"))
        return number

    monkeypatch.setattr(PeerLink, "put", put)
    async with serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,):
        facts = await asyncio.wait_for(
            doctor_transfer.transfer(parse_endpoint(node.uri), "shm", 0.5), 15
        )
        assert "put:" in facts.error
