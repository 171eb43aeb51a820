"""`kvctl doctor` on the way to real nodes, with RDMA imitated."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.endpoint import parse_endpoint
from kvstore.transport import verbs
from kvstore.transport.verbs import VerbsMissing
from kvstore_client.ctl import doctor
from kvstore_client.ctl.doctor_transfer import POOL, source_address, transfer
from kvstore_client.ctl.options import Common
from tests.support.agents import run_agents
from tests.support.cluster import Node, serve
from tests.support.fakeverbs import FakeVerbs
from tests.support.peers import scripted

#: Nobody listens there: the port is reserved.
NOBODY = "tcp://127.0.0.1:1"
PATIENCE_S = 20.0
# The arena has room for the block and its like.
ARENA_BYTES = 4 * 1024 * 1024
MOVED = ("transport", "rails", "block_bytes", "put_ms", "fetch_ms")


@pytest.fixture
def none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device, and no pyverbs."""

    class Missing(FakeVerbs):
        """A system without."""

        def __init__(self) -> None:
            """Nothing is there."""

        def devices(self) -> Any:
            raise VerbsMissing("the package pyverbs is not installed: install it")

    monkeypatch.setattr(verbs, "system_verbs", Missing)
    monkeypatch.setattr("kvstore.transport.pyverbs_sysfs.device_names", list)


async def run(
    *uris: str, transport: tuple[str, ...] = (), timeout_s: float = PATIENCE_S
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command; its exit status, and what it found about the peer, by check."""
    given = argparse.Namespace(
        peer=uris[0], endpoints=[], after_endpoints=[], memory="64KiB", transport=list(transport)
    )
    common = Common(endpoints=(), timeout_s=timeout_s, json=True)
    output = io.StringIO()
    ended = await doctor.run(common, given, output)
    told = json.loads(output.getvalue())["checks"]
    return ended, {one["check"]: one for one in told}


def verdicts(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    """How the checks of the peer ended, by their names."""
    return {name: one["verdict"] for name, one in checks.items() if one["endpoint"]}


def holds_nothing(node: Node) -> bool:
    """Whether no block is left there."""
    return node.stored_count() == 0


@pytest.mark.asyncio
async def test_a_block_goes_there_and_back_by_tcp(none: None) -> None:
    async with serve(arena_bytes=ARENA_BYTES) as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0
        assert verdicts(checks) == {
            "connection": "ok",
            "offer": "ok",
            "transfer by tcp": "ok",
        }
        values = checks["transfer by tcp"]["values"]
        assert set(values) == set(MOVED)
        assert (values["transport"], values["rails"]) == ("tcp", [])
        assert checks["connection"]["values"]["node_id"] == "node-0"
        assert (node.counter("put_blocks_stored"), node.counter("fetch_blocks_hit")) == (1, 1)
        assert holds_nothing(node)


@pytest.mark.asyncio
async def test_a_block_goes_by_each_transport_that_a_unix_socket_offers(
    none: None, tmp_path: Path
) -> None:
    async with serve(arena_bytes=ARENA_BYTES, listen=f"unix://{tmp_path}/k.sock") as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0
        for name in ("unix", "shm"):
            found = checks[f"transfer by {name}"]
            assert (found["verdict"], found["values"]["transport"]) == ("ok", name)
        ended, checks = await run(node.uri, transport=("shm",))
        assert "transfer by unix" not in checks
        assert holds_nothing(node)


@pytest.mark.asyncio
async def test_memory_is_not_shared_with_another_user(none: None, tmp_path: Path) -> None:
    listen = f"unix://{tmp_path}/k.sock"
    options = {"memory_uids": frozenset({os.geteuid() + 1})}
    async with serve(arena_bytes=ARENA_BYTES, listen=listen, **options) as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0
        assert checks["offer"]["verdict"] == "warning"
        ended, checks = await run(node.uri, transport=("shm",))
        assert ended == 1
        assert checks["transfer by shm"]["verdict"] == "failed"
        assert "as the same user" in checks["transfer by shm"]["remedy"]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_block_goes_by_rdma_on_all_rails(system: FakeVerbs) -> None:
    async with serve(arena_bytes=ARENA_BYTES, listen="rdma://127.0.0.1:0") as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0, checks
        found = checks["transfer by rdma"]
        assert found["verdict"] == "ok"
        assert found["values"]["transport"] == "rdma"
        assert found["values"]["rails"] == ["fake0:1", "fake1:1"]
        assert checks["gid fake0:1"]["values"]["index"] == 1
        assert holds_nothing(node)
        ended, checks = await run(f"{node.uri}?device=fake0", transport=("rdma",))
        assert ended == 0, checks
        assert checks["transfer by rdma"]["values"]["rails"] == ["fake0:1"]
        assert "port fake1:1" not in checks
        assert "transfer by tcp" not in checks


@pytest.mark.slow
@pytest.mark.asyncio
async def test_rails_that_do_not_meet_fail_and_the_remedy_names_their_order(
    system: FakeVerbs,
) -> None:
    async with serve(arena_bytes=ARENA_BYTES, listen="rdma://127.0.0.1:0") as (node,):
        ended, checks = await run(f"{node.uri}?device=fake1", transport=("rdma",))
        assert ended == 1
        assert checks["transfer by rdma"]["verdict"] == "failed"
        assert "rails pair in their order" in checks["transfer by rdma"]["remedy"]


@pytest.mark.asyncio
async def test_a_gid_that_is_not_there_is_told_and_no_block_is_sent(system: FakeVerbs) -> None:
    async with serve(arena_bytes=ARENA_BYTES, listen="rdma://127.0.0.1:0") as (node,):
        ended, checks = await run(f"{node.uri}?gid_index=9", transport=("rdma",))
        assert ended == 1
        assert checks["gid fake0:1"]["verdict"] == checks["rails"]["verdict"] == "failed"
        assert checks["transfer by rdma"]["verdict"] == "not_checked"
        assert node.counter("requests_put") == 0


@pytest.mark.asyncio
async def test_a_port_that_is_down_is_told_and_the_other_one_carries(system: FakeVerbs) -> None:
    system.take_down("fake1")
    async with serve(arena_bytes=ARENA_BYTES, listen="rdma://127.0.0.1:0") as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0, checks
        assert checks["port fake1:1"]["verdict"] == "warning"
        assert checks["transfer by rdma"]["values"]["rails"] == ["fake0:1"]


@pytest.mark.asyncio
async def test_rdma_is_missed_where_the_uri_asks_for_it(system: FakeVerbs) -> None:
    async with serve(arena_bytes=ARENA_BYTES) as (node,):
        ended, checks = await run(node.uri.replace("tcp://", "rdma://"))
        assert ended == 1
        assert checks["transfer by tcp"]["verdict"] == "ok"
        assert checks["transfer by rdma"]["verdict"] == "failed"
        assert "--listen rdma://HOST:PORT" in checks["transfer by rdma"]["remedy"]
        ended, checks = await run(node.uri)
        assert ended == 0
        assert "transfer by rdma" not in checks


@pytest.mark.asyncio
async def test_rdma_that_is_offered_to_a_host_without_devices_is_no_failure(
    system: FakeVerbs, request: pytest.FixtureRequest
) -> None:
    async with serve(arena_bytes=ARENA_BYTES, listen="rdma://127.0.0.1:0") as (node,):
        request.getfixturevalue("none")
        ended, checks = await run(node.uri.replace("rdma://", "tcp://"))
        assert ended == 0, checks
        assert checks["pyverbs"]["verdict"] == "not_checked"
        assert checks["transfer by rdma"]["verdict"] == "not_checked"
        assert checks["transfer by tcp"]["verdict"] == "ok"
        ended, checks = await run(node.uri)
        assert ended == 1
        assert checks["pyverbs"]["verdict"] == "failed"


@pytest.mark.asyncio
async def test_a_pool_of_its_own_is_told_and_not_checked(none: None) -> None:
    async with serve(arena_bytes=ARENA_BYTES, pool="llama") as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0
        assert checks["transfer by tcp"]["verdict"] == "not_checked"
        assert "serves pool 'llama' alone (--pool)" in checks["transfer by tcp"]["found"]


@pytest.mark.asyncio
async def test_an_arena_that_is_too_small_is_told(none: None) -> None:
    async with serve(arena_bytes=8 * 4096) as (node,):
        ended, checks = await run(node.uri)
        assert ended == 1
        found = checks["transfer by tcp"]
        assert found["verdict"] == "failed"
        assert found["found"].count("does not fit into an arena of 32768") == 1


@pytest.mark.asyncio
async def test_an_agent_is_checked_by_its_socket(none: None, tmp_path: Path) -> None:
    async with (
        serve(arena_bytes=ARENA_BYTES) as nodes,
        run_agents(nodes, local=tmp_path) as (agent,),
    ):
        ended, checks = await run(agent.local)
        assert ended == 0, checks
        assert checks["connection"]["values"]["role"] == "agent"
        assert checks["transfer by unix"]["verdict"] == "ok"
        ended, checks = await run(agent.uri)
        assert ended == 0
        assert checks["transfer"]["verdict"] == "not_checked"


@pytest.mark.asyncio
async def test_nobody_at_the_endpoint(none: None) -> None:
    ended, checks = await run(NOBODY)
    assert ended == 1
    assert verdicts(checks) == {"connection": "failed"}
    assert NOBODY in checks["connection"]["found"]


@pytest.mark.asyncio
async def test_a_peer_that_hangs_is_given_up(none: None) -> None:
    async with scripted({}) as hangs:
        ended, checks = await run(hangs.uri, timeout_s=0.05)
        assert ended == 1
        assert verdicts(checks) == {"connection": "failed"}
        # On a busy machine it may be the question before.
        assert re.search(r"no answer to \w+ in 0.05 s|connect", checks["connection"]["found"])


@pytest.mark.asyncio
async def test_warnings_are_found_and_not_written_to_the_screen(
    none: None, capfd: pytest.CaptureFixture[str]
) -> None:
    facts = await transfer(parse_endpoint(NOBODY), "tcp", 0.5)
    assert "is down" in facts.error
    assert any("connect to" in text for text in facts.warnings)
    assert capfd.readouterr() == ("", "")


@pytest.mark.asyncio
async def test_only_a_pool_of_its_own_is_opened(none: None) -> None:
    async with serve(arena_bytes=ARENA_BYTES) as (node,):
        await run(node.uri)
        assert [pool.name for pool in node.store.pools] == [POOL]


@pytest.mark.asyncio
async def test_our_address_towards_a_peer_is_found_without_a_packet() -> None:
    assert await source_address(parse_endpoint("tcp://127.0.0.1:1")) == "127.0.0.1"
    assert await source_address(parse_endpoint("unix:///nowhere")) == ""
    assert await source_address(parse_endpoint("tcp://no.such.host.invalid:1")) == ""
