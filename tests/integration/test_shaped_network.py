"""The rig of shaped links itself: what it promises must be so before a figure means anything.

Ratios of bytes and seconds are the subject here, so this is the place that looks at a clock; the
bounds are wide enough for a machine that is busy with other things.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.shaped import (
    COMPUTE,
    MBIT,
    STORAGE,
    NodeFailed,
    NodePlan,
    ShapedNetwork,
    ShapingUnavailable,
    cluster_plans,
    namespaces,
)
from tests.support.cluster import until
from tests.support.orphans import TIMEOUT_S, has_ended
from tests.support.shaped import (
    BULK,
    BulkStream,
    bulk,
    host_interfaces,
    named_namespaces,
    network_of,
    processes_in,
    require_shaping,
)

MB = 1_000_000
RATE_BPS = 400 * MBIT
# Of the rate: the bucket lets a few percent of a short stream through at once, and no more. How
# much less comes is a matter of the machine.
MOST = 1.02

slow = pytest.mark.slow


def plans() -> list[NodePlan]:
    return cluster_plans(1, 1, 1, storage_nic_Bps=RATE_BPS, compute_nic_Bps=8 * RATE_BPS)


@slow
@pytest.mark.asyncio
async def test_a_link_carries_no_more_than_its_rate_in_both_directions() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        # The storage host is not shaped: towards it the node's own end paces, from it the
        # switch's.
        prefill, storage = network["prefill0"], network["storage0"]
        towards = await bulk(storage, prefill, STORAGE, 40 * MB)
        away = await bulk(prefill, storage, STORAGE, 40 * MB)
    assert 0 < towards.share(RATE_BPS) <= MOST
    assert 0 < away.share(RATE_BPS) <= MOST


@slow
@pytest.mark.asyncio
async def test_both_directions_carry_no_more_than_their_rate_at_once() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        prefill, decode = network["prefill0"], network["decode0"]
        there = await BulkStream(prefill, decode, STORAGE).start(40 * MB)
        back = await BulkStream(decode, prefill, STORAGE).start(40 * MB)
        shares = [(await stream.end()).share(RATE_BPS) for stream in (there, back)]
    # Each carries the other's acknowledgements too, and one may end before the other.
    assert all(0 < share <= MOST + 0.02 for share in shares), shares


@slow
@pytest.mark.asyncio
async def test_an_unshaped_link_is_not_the_limit() -> None:
    require_shaping()
    async with ShapedNetwork(cluster_plans(0, 0, 2, RATE_BPS, RATE_BPS)) as network:
        found = await bulk(network["storage0"], network["storage1"], STORAGE, 200 * MB)
    assert found.share(RATE_BPS) > MOST


@slow
@pytest.mark.asyncio
async def test_counters_agree_with_what_was_sent() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        compute = network["prefill0"].links[COMPUTE]
        before = compute.counters()
        found = await bulk(network["storage0"], network["prefill0"], STORAGE, 20 * MB)
        after = compute.counters()
    assert found.size_bytes == 20 * MB
    # 66 bytes of headers on a frame of 9,014; what the queue dropped was sent twice.
    assert 20 * MB < found.received_bytes < 1.02 * 20 * MB
    assert found.received_bytes <= found.sent_bytes < 1.05 * 20 * MB
    assert before == after, "the other network carried something"


@slow
@pytest.mark.asyncio
async def test_a_cut_link_carries_nothing_until_it_is_restored() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        prefill, storage = network["prefill0"], network["storage0"]
        link = prefill.links[STORAGE]
        stream = await BulkStream(storage, prefill, STORAGE).start(40 * MB)
        await until(lambda: stream.received_bytes() > MB, "the stream")
        link.cut()
        at_cut = link.counters()
        # Other links work, for much longer than what was under way would have needed.
        other = await bulk(network["decode0"], prefill, COMPUTE, 20 * MB)
        assert other.size_bytes == 20 * MB
        assert link.counters() == at_cut
        assert 0 < stream.received_bytes() < 40 * MB
        link.restore()
        assert (await stream.end()).size_bytes == 40 * MB


@slow
@pytest.mark.asyncio
async def test_a_rate_is_changed_while_the_link_is_in_use() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        prefill, storage = network["prefill0"], network["storage0"]
        link = prefill.links[STORAGE]
        stream = await BulkStream(storage, prefill, STORAGE).start(20 * MB)
        await until(lambda: stream.received_bytes() > MB, "the stream")
        link.set_rate(RATE_BPS / 4)
        assert (await stream.end()).share(RATE_BPS) < 0.9
        for source, target in ((storage, prefill), (prefill, storage)):
            found = await bulk(source, target, STORAGE, 10 * MB)
            assert 0 < found.share(link.rate_Bps) <= MOST
        link.set_rate(RATE_BPS / 100)
        assert 0 < (await bulk(storage, prefill, STORAGE, 1 * MB)).share(RATE_BPS / 100) <= MOST
        link.set_rate(0)
        assert (await bulk(storage, prefill, STORAGE, 100 * MB)).share(RATE_BPS) > MOST
        link.set_rate(RATE_BPS)
        assert 0 < (await bulk(storage, prefill, STORAGE, 40 * MB)).share(RATE_BPS) <= MOST


@slow
@pytest.mark.asyncio
async def test_runs_beside_each_other_do_not_meet() -> None:
    require_shaping()
    interfaces, names = host_interfaces(), named_namespaces()
    async with ShapedNetwork(plans()) as one, ShapedNetwork(plans()) as two:
        assert one["prefill0"].address(STORAGE) == two["prefill0"].address(STORAGE)
        before = two["prefill0"].links[STORAGE].counters()
        await bulk(one["storage0"], one["prefill0"], STORAGE, 1 * MB)
        assert two["prefill0"].links[STORAGE].counters() == before
        # Not even the bridges are to be seen from outside.
        assert host_interfaces() == interfaces
        assert named_namespaces() == names


@slow
@pytest.mark.asyncio
async def test_daemons_and_workers_run_inside() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        storage, prefill = network["storage0"], network["prefill0"]
        daemon = await storage.daemon(STORAGE, "8MiB")
        status = await prefill.answer(
            "kvstore_client.ctl", ["--endpoint", storage.uri(STORAGE), "status", "--json"], 60
        )
        assert "storage0" in str(status)
        assert prefill.links[STORAGE].counters().received_bytes > 0
    assert daemon.status == 0, daemon.story()


@slow
@pytest.mark.asyncio
async def test_a_process_that_fails_in_a_node_says_why() -> None:
    require_shaping()
    async with ShapedNetwork(plans()) as network:
        with pytest.raises(NodeFailed, match=r"kvstore_daemon in storage0 ended with.*\n.*lots"):
            await network["storage0"].daemon(STORAGE, "lots")
        with pytest.raises(NodeFailed, match=r"bulk in decode0 ended with status 1:\n"):
            await network["decode0"].answer(BULK, ["send", "10.9.9.9:1", "1"], TIMEOUT_S)


# A creator that builds a network, runs a daemon in it, says which processes there are, and waits.
CREATOR = """
import asyncio
from kvstore_bench.shaped import STORAGE, ShapedNetwork, cluster_plans

async def main():
    async with ShapedNetwork(cluster_plans(1, 0, 1, 5e7, 5e7)) as network:
        daemon = await network["storage0"].daemon(STORAGE, "1MiB")
        pids = [node.namespace.holder_pid for node in network.nodes.values()]
        print(*pids, daemon.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_creator_ends(number: signal.Signals) -> None:
    require_shaping()
    interfaces, names = host_interfaces(), named_namespaces()
    creator = subprocess.Popen(
        [sys.executable, "-c", CREATOR], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with creator:
        assert creator.stdout is not None
        pids = [int(pid) for pid in creator.stdout.readline().split()]
        assert len(pids) == 3
        tasks = Path(f"/proc/{creator.pid}/task/{creator.pid}/children")
        children = [int(pid) for pid in tasks.read_text().split()]
        networks = {network_of(pid) for pid in children}
        assert len(networks) == 3, "two nodes and the switch"
        assert network_of(os.getpid()) not in networks
        creator.send_signal(number)
        creator.communicate(timeout=TIMEOUT_S)
    assert creator.returncode != 0
    assert all(map(has_ended, children))
    assert processes_in(networks) == []
    assert host_interfaces() == interfaces
    assert named_namespaces() == names


@slow
def test_a_user_without_rights_makes_a_user_namespace() -> None:
    require_shaping()
    # What root has without these is what an ordinary user has here.
    setpriv = ["setpriv", "--bounding-set", "-sys_admin,-net_admin", "--inh-caps", "-all"]
    inner = "import os; from kvstore_bench.shaped import *\n"
    inner += "with ShapedNetwork(cluster_plans(1, 0, 1, 5e7, 5e7)) as network:\n"
    inner += "    pid = network['prefill0'].namespace.holder_pid\n"
    inner += "    print(os.readlink(f'/proc/{pid}/ns/user'))\n"
    command = [sys.executable, "-c", inner]
    if os.geteuid() == 0:
        command = [*setpriv, *command]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        pytest.skip("the program setpriv is missing (package util-linux)")
    if "inside a user namespace" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in ("", os.readlink("/proc/self/ns/user"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_shaping()
    interfaces = host_interfaces()
    with monkeypatch.context() as patch:
        patch.setattr(namespaces, "_PROGRAM_PATH", str(tmp_path))
        with (
            pytest.raises(ShapingUnavailable, match=r"program ip is missing \(package iproute2\)"),
            ShapedNetwork(plans()),
        ):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(namespaces, "_HOLDER", "raise SystemExit('unshare: no')")
        with (
            pytest.raises(ShapingUnavailable, match="unshare: no; and inside a user namespace"),
            ShapedNetwork(plans()),
        ):
            pass
    assert host_interfaces() == interfaces


@pytest.mark.parametrize(
    ("name", "rates_Bps", "message"),
    [
        ("", {STORAGE: 0}, "unique name"),
        ("Node", {STORAGE: 0}, "unique name"),
        ("node; true", {STORAGE: 0}, "unique name"),
        ("a", {"lo": 0}, "network"),
        ("a", {"a-name-of-16-bytes": 0}, "network"),
        ("a", {"x y": 0}, "network"),
        ("a", {STORAGE: -1}, "rate of a on storage"),
        ("a", {STORAGE: 999}, "1,000 to"),
        ("a", {STORAGE: float("nan")}, "rate of a on storage"),
        ("a", {STORAGE: 1e12}, "rate of a on storage"),
        ("a", {f"n{place}": 0 for place in range(9)}, "networks=9"),
    ],
)
def test_impossible_plans_are_refused(
    name: str, rates_Bps: Mapping[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ShapedNetwork([NodePlan(name, rates_Bps)])


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="unique name"):
        ShapedNetwork([NodePlan("a", {}), NodePlan("a", {})])


def test_plans_of_a_cluster_name_its_nodes_and_rates() -> None:
    found = cluster_plans(2, 1, 1, storage_nic_Bps=5e7, compute_nic_Bps=4e8, storage_host_Bps=1e8)
    assert [plan.name for plan in found] == ["prefill0", "prefill1", "decode0", "storage0"]
    assert found[2].rates_Bps == {STORAGE: 5e7, COMPUTE: 4e8}
    assert found[3].rates_Bps == {STORAGE: 1e8}
