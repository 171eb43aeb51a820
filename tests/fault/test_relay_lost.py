"""Relays that die, stop, lie, crawl or come back, and the networks on both of their sides.

`test_client_paths.py` has the same for the reader alone. Here the relay is a real agent: what it
held of the request must be gone from it too.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from kvstore.blocksource import FetchStream
from kvstore.loadreport import LinkLoad, LoadReport, NodeState
from kvstore.messages import Done, FetchOutcome, ServedBy, decode
from kvstore.wire import HEADER_BYTES, FrameType, Header
from kvstore_client.selector import Plan, PlannedRun, choice
from tests.support.cluster import (
    chain,
    check_hits,
    room,
    store_blocks,
    until,
)
from tests.support.frames import frame
from tests.support.peers import FETCH
from tests.support.processes import agent, daemon
from tests.support.relayed import AGENT, BLOCK_BYTES, Bed, beside, in_process, in_processes

pytestmark = pytest.mark.asyncio

HIT, MISS, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.UNAVAILABLE
DIRECT, RELAY = ServedBy.DIRECT, ServedBy.RELAY
KEYS = chain(64)
# Of 4 MiB: some frames have come, and there are more.
MID_STREAM_BYTES = 40 * BLOCK_BYTES + 2000
PATTERN = bytes(range(256)) * (BLOCK_BYTES // 256)
ORDERS = pytest.mark.parametrize("order", ["block", "layer"])


class Asked:
    """A fetch that the relay is in the middle of."""

    def __init__(self, bed: Bed, **options: Any) -> None:
        self.bed = bed
        self.into = room(len(bed.keys), BLOCK_BYTES)
        self.handle = bed.client.fetch(bed.namespace, bed.keys, self.into, **options)

    async def ended(self) -> Any:
        """Its result; the memory is ours again, and is filled with a pattern."""
        result = await self.handle
        await self.handle.quiesced()
        check_hits(result, self.bed.keys, self.into)
        for block in self.into:
            block[:] = PATTERN
        return result

    @property
    def untouched(self) -> bool:
        """Whether nothing was written since."""
        return all(block == PATTERN for block in self.into)


async def in_mid_stream(bed: Bed, **options: Any) -> Asked:
    """A fetch of which the relay has passed on some blocks, and has no more of them."""
    await bed.relay_next()
    bed.hold_in_mid_stream(bed.storage, MID_STREAM_BYTES)
    passed = bed.compute.passed["down", FETCH]
    asked = Asked(bed, **options)
    await until(lambda: bed.compute.passed["down", FETCH] > passed + 8 * BLOCK_BYTES)
    await until(lambda: not bed.storage.hold_at)
    return asked


def paths(result: Any) -> set[tuple[str, str]]:
    """Path and peer of each run of a result."""
    return {(run.path, run.peer) for run in result.runs}


# --- the relay's process -----------------------------------------------------------------------


@pytest.mark.slow
@ORDERS
async def test_a_relay_that_is_killed_in_mid_stream_costs_no_answer(order: str) -> None:
    async with in_processes(KEYS) as (bed, _, kvagent):
        asked = await in_mid_stream(bed, order=order)
        kvagent.signal(signal.SIGKILL)
        result = await asked.ended()
        assert result.ok, result.errors
        assert DIRECT in result.served_by
        assert paths(result) == {("relay", AGENT), ("direct", bed.daemon_link.peer)}
        assert result.plan.startswith("round_robin: ")
        assert result.errors
        counters = bed.client.counters()
        assert counters["fetch_bytes_relay"] >= 8 * BLOCK_BYTES
        assert counters["fetch_bytes_direct"] >= result.served_by.count(DIRECT) * BLOCK_BYTES // 2
        assert not bed.client.cluster.relays.inflight.relays[AGENT].inflight_bytes
        # Nobody is waited for that is known to be down.
        bed.client.cluster.relays._selector._turn = 1
        assert (await bed.fetched(order=order)).served_by == [DIRECT] * len(KEYS)
        assert asked.untouched
        bed.storage.let_go()


@pytest.mark.slow
@ORDERS
async def test_late_bytes_of_a_relay_that_was_stopped_land_nowhere(order: str) -> None:
    async with in_processes(KEYS) as (bed, _, kvagent):
        size_bytes = len(KEYS) * BLOCK_BYTES
        passed = bed.compute.passed["down", FETCH]
        asked = await in_mid_stream(bed, order=order)
        kvagent.signal(signal.SIGSTOP)
        # It does not hear of the cancellation before it has sent everything.
        bed.compute.hold("up")
        bed.storage.let_go()
        result = await asked.ended()
        assert result.ok, result.errors
        assert DIRECT in result.served_by
        assert paths(result) == {("relay", AGENT), ("direct", bed.daemon_link.peer)}
        assert bed.client.counters()["blocks_moved"] == result.served_by.count(DIRECT)
        kvagent.signal(signal.SIGCONT)
        await until(lambda: bed.compute.passed["down", FETCH] > passed + size_bytes)
        bed.compute.let_go()
        status = await bed.settled()
        assert status.counters["relay_bytes_out"] == size_bytes
        assert asked.untouched
        assert not bed.client.cluster.relays.inflight.relays[AGENT].inflight_bytes
        again = await bed.relays_again()
        assert again.served_by == [RELAY] * len(KEYS)


@pytest.mark.slow
async def test_a_relay_that_comes_back_under_its_name_is_used_again() -> None:
    async with in_processes(KEYS) as (bed, _, kvagent):
        asked = await in_mid_stream(bed)
        uri, boot_id = kvagent.uri, bed.agent_link.welcome.boot_id  # type: ignore[union-attr]
        kvagent.signal(signal.SIGKILL)
        assert kvagent.wait() == -signal.SIGKILL
        assert (await asked.ended()).ok
        bed.storage.let_go()
        options = ("--storage", bed.storage.uri, "--node-id", AGENT, "--listen", uri)
        async with beside(agent(*options)):
            await bed.connected()
            result = await bed.relays_again()
            assert ("relay", AGENT) in paths(result)
            assert bed.agent_link.welcome.boot_id != boot_id  # type: ignore[union-attr]
            assert bed.client.counters()["reconnects"] == 1
            assert list(bed.client.cluster.relays.inflight.relays) == [AGENT]
            await bed.settled()


# --- what a relay says and sends ---------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("checksums", ["theirs", "ours"])
async def test_another_blocks_bytes_by_a_relay_are_fetched_direct(
    checksums: str, order: str
) -> None:
    async with in_process(KEYS) as (bed, node, relay):
        await bed.relay_next()
        assert (await bed.fetched()).ok  # what is relayed stays there
        first, second = (relay.block(bed.namespace, KEYS[at]) for at in (3, 4))
        assert first is not None
        assert second is not None
        first.view[:], second.view[:] = bytes(second.view), bytes(first.view)
        if checksums == "theirs":
            first.checksums, second.checksums = second.checksums, first.checksums
        await bed.relay_next()
        result = await bed.fetched(order=order)
        assert result.ok, result.errors
        assert result.served_by == [RELAY] * 3 + [DIRECT] * 2 + [RELAY] * (len(KEYS) - 5)
        assert bed.client.counters()["corrupt_blocks"] == 2
        # It was told, has dropped both, and takes good ones from storage.
        await until(lambda: relay.counter("blocks_corrupt") == 2)
        await until(lambda: node.counter("requests_corrupt_report"))
        assert node.counter("blocks_corrupt") == 0
        again = await bed.relays_again()
        assert again.served_by == [RELAY] * len(KEYS)
        await bed.settled()


@pytest.mark.slow
@ORDERS
async def test_a_relay_that_mixes_blocks_up_is_found_out_each_time(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process(KEYS) as (bed, node, relay):
        fetch = relay.agent.source.fetch
        others = {KEYS[0]: KEYS[1], KEYS[1]: KEYS[0]}

        def mixed(namespace: bytes, keys: Sequence[bytes], *terms: Any) -> FetchStream:
            return fetch(namespace, [others.get(name, name) for name in keys], *terms)

        monkeypatch.setattr(relay.agent.source, "fetch", mixed)
        for count in (2, 4):
            await bed.relay_next()
            result = await bed.fetched(order=order)
            assert result.ok, result.errors
            assert result.served_by == [DIRECT] * 2 + [RELAY] * (len(KEYS) - 2)
            assert bed.client.counters()["corrupt_blocks"] == count
        # Each of them is good, where it belongs.
        await until(lambda: relay.counter("requests_corrupt_report") == 2)
        assert relay.counter("blocks_corrupt") == 0
        assert node.counter("requests_corrupt_report") == 0


class Liar:
    """Changes the load reports that pass.

    Attributes:
        change: What becomes of each; None lets none pass.
    """

    def __init__(self) -> None:
        self.change: Callable[[LoadReport], LoadReport | None] = lambda report: report

    def __call__(self, header: Header, data: bytearray) -> bytes | bytearray:
        metadata = bytes(data[HEADER_BYTES : HEADER_BYTES + header.metadata_length])
        message: LoadReport | Done | None
        if header.type is FrameType.LOAD_REPORT:
            message = self.change(decode(metadata, LoadReport))
            if message is None:
                return b""
        elif header.type is FrameType.DONE:
            done = decode(metadata, Done)
            told = self.change(done.report) if done.report is not None else None
            message = msgspec.structs.replace(done, report=told)
        else:
            return data
        return frame(header.type, header.request_id, message, flags=header.flags)


def frozen(reports: list[LoadReport], report: LoadReport) -> LoadReport | None:
    """The first one, again and again."""
    return reports[0]


def absent(reports: list[LoadReport], report: LoadReport) -> LoadReport | None:
    return None


def from_the_future(reports: list[LoadReport], report: LoadReport) -> LoadReport | None:
    """One that is a million reports ahead of all that follow."""
    ahead = 10**6 if len(reports) == 1 else 0
    return msgspec.structs.replace(report, seq=report.seq + ahead, interval_ms=2**31)


def of_the_life_before(reports: list[LoadReport], report: LoadReport) -> LoadReport | None:
    """One of another life, and then those of this one: as if that were over."""
    return msgspec.structs.replace(report, boot_id=bytes(16)) if len(reports) == 2 else report


@pytest.mark.slow
@pytest.mark.parametrize("lie", [frozen, absent, from_the_future, of_the_life_before])
async def test_without_news_a_relay_is_used_where_nothing_else_is_left(lie: Any) -> None:
    async with in_process(KEYS) as (bed, _, _):
        told: list[LoadReport] = []
        liar = Liar()

        def change(report: LoadReport) -> LoadReport | None:
            told.append(report)
            return lie(told, report)  # type: ignore[no-any-return]

        liar.change = change
        bed.compute.mangle["down"] = liar
        # Nothing of the reports stops the requests that are under way meanwhile.
        while bed.willing:
            bed.client.cluster.relays._selector._turn = 1
            assert (await bed.fetched()).ok
        assert told
        served = (await bed.fetched()).served_by
        assert served == [DIRECT] * len(KEYS)
        bed.direct.refuse()
        bed.direct.cut()
        await until(lambda: not bed.daemon_link.up)
        relays = bed.client.cluster.relays
        # Plans that do not know of it yet, and those that do.
        for refreshed_at, reason in ((math.inf, "direct"), (-math.inf, "daemons that are down")):
            relays._refreshed_at = refreshed_at
            result = await bed.fetched()
            assert result.ok, result.errors
            assert result.served_by == [RELAY] * len(KEYS)
            assert reason in result.plan
        bed.direct.refuse(False)
        await until(lambda: bed.daemon_link.up)
        await bed.settled()


@pytest.mark.slow
async def test_a_relay_speaks_for_nobody_else() -> None:
    async with in_process(KEYS) as (bed, node, _):
        reports = bed.client.cluster.reports
        liar = Liar()
        told: list[LoadReport] = []

        def change(report: LoadReport) -> LoadReport | None:
            told.append(report)
            lie = {"node_id": node.name, "seq": 10**6, "state": NodeState.DRAINING}
            return msgspec.structs.replace(report, **lie)

        liar.change = change
        bed.compute.mangle["down"] = liar
        await until(lambda: told)
        assert (await bed.fetched()).ok
        await until(lambda: len(told) > 3)
        known = reports.report(node.name)
        assert known is not None
        assert known.boot_id == node.server.report().boot_id
        assert known.state is NodeState.READY
        assert bed.client.counters()["reports_refused"] >= 3
        # Its own reports still count.
        seq = known.seq
        await until(lambda: reports.report(node.name).seq > seq)  # type: ignore[union-attr]


def boasting(report: LoadReport) -> LoadReport:
    """A hundred times as fast as storage links are, and nothing to do."""
    link = LinkLoad(name="storage", capacity_Bps=100 * 10**9, sent_Bps=0, queued_bytes=0)
    return msgspec.structs.replace(report, links=(link,), relay_queued_bytes=0, willing=True)


def of_minus_work(report: LoadReport) -> LoadReport:
    """Less than nothing to do."""
    link = LinkLoad(name="storage", capacity_Bps=-1, sent_Bps=-1, queued_bytes=-(10**12))
    return msgspec.structs.replace(report, links=(link,), relay_queued_bytes=-(10**12))


def complaining(report: LoadReport) -> LoadReport:
    """A hundred requests wait."""
    return msgspec.structs.replace(report, relay_queued_bytes=100 * len(KEYS) * BLOCK_BYTES)


def modest(report: LoadReport) -> LoadReport:
    """A hundredth of the rate that the reader's own link has."""
    link = LinkLoad(name="storage", capacity_Bps=OWN_BPS // 100)
    return msgspec.structs.replace(report, links=(link,))


# Of the own link, as believed: a request takes 0.2 s, so that splitting it is worth while.
OWN_BPS = 20_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lie", "least", "most"),
    [
        # What a relay claims is believed up to the rate of our own link.
        (boasting, 24, 32),
        (of_minus_work, 24, 32),
        (complaining, 0, 0),
        (modest, 0, 1),
    ],
)
async def test_a_report_that_lies_by_a_hundred_costs_no_answer(
    lie: Callable[[LoadReport], LoadReport],
    least: int,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "EXPLORE_EVERY", math.inf)  # reports are believed in each plan
    async with in_process(KEYS, policy="balanced") as (bed, _, _):
        liar = Liar()
        told: list[LoadReport] = []

        def change(report: LoadReport) -> LoadReport | None:
            told.append(lie(report))
            return told[-1]

        liar.change = change
        bed.compute.mangle["down"] = liar
        await until(lambda: bed.client.cluster.reports.report(AGENT) in told)
        inflight = bed.client.cluster.relays.inflight
        for number in range(4):
            inflight.direct.observed_Bps = OWN_BPS
            inflight.relays[AGENT].observed_Bps = 0.0
            result = await bed.fetched(order=("block", "layer")[number % 2])
            assert result.ok, result.errors
            planned = re.search(rf"(\d+) by {AGENT}", result.plan)
            if not number:
                assert least <= (int(planned[1]) if planned else 0) <= most, result.plan
        assert inflight.relays[AGENT].inflight_bytes == 0
        await until(lambda: not bed.client.cluster.reports.requesters(bed.daemon_link.peer))


# --- the networks ------------------------------------------------------------------------------


def halves(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every plan send one half of the blocks each way."""
    plan, count = bed.client.cluster.relays.plan, len(bed.keys)

    def half(spans: Sequence[Any], *rest: Any) -> Plan:
        made = plan(spans, *rest)
        runs = [PlannedRun(0, count // 2, 0), PlannedRun(count // 2, count, 0, AGENT)]
        return made._replace(runs=runs)

    monkeypatch.setattr(bed.client.cluster.relays, "plan", half)


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("boasts", [False, True], ids=["honest", "boasting"])
async def test_a_relay_whose_storage_link_crawls_is_left_for_the_idle_path(
    boasts: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process(KEYS, policy="balanced") as (bed, _, relay):
        liar = Liar()
        liar.change = boasting if boasts else lambda report: report
        bed.compute.mangle["down"] = liar
        halves(bed, monkeypatch)
        bed.storage.rate_Bps["down"] = 40e6
        assert (await bed.fetched(order=order)).ok
        # What has come by the relay stays there: others.
        bed.keys = chain(64, start=1000)
        await store_blocks(bed.client, bed.namespace, bed.keys)
        bed.storage.rate_Bps["down"] = 0.01 * 40e6
        before = bed.client.counters().get("blocks_moved", 0)
        result = await bed.fetched(order=order)
        assert result.ok, result.errors
        assert result.served_by.count(RELAY) < 32
        assert bed.client.counters()["blocks_moved"] > before
        assert paths(result) == {("relay", AGENT), ("direct", bed.daemon_link.peer)}
        # Nobody waits for what was asked for there.
        await until(lambda: relay.counter("fills_cancelled"))
        bed.storage.rate_Bps.clear()
        await bed.settled()


@pytest.mark.slow
@ORDERS
async def test_storage_that_is_killed_under_a_relay_costs_what_had_not_come(order: str) -> None:
    async with in_processes(KEYS) as (bed, kvstored, _):
        asked = await in_mid_stream(bed, order=order)
        uri = kvstored.uri
        kvstored.signal(signal.SIGKILL)
        assert kvstored.wait() == -signal.SIGKILL
        bed.storage.cut()  # with what was on its way
        bed.storage.let_go()
        async with beside(daemon("--listen", uri)):
            result = await asked.ended()
            assert set(result.outcomes) <= {HIT, MISS, UNAVAILABLE}
            assert not result.ok
            assert result.errors
            lost = len(KEYS) - result.outcomes.count(HIT) - result.outcomes.count(MISS)
            assert bed.client.counters().get("fetch_blocks_unavailable", 0) == lost
            if order == "block":
                assert HIT in result.outcomes
            await bed.connected()
            await until(lambda: bed.willing)
            # Storage has lost everything, and takes it again.
            await bed.stored_again()
            again = await bed.relays_again(always=False)
            assert ("relay", AGENT) in paths(again)
            await bed.settled()
            assert asked.untouched


@pytest.mark.slow
@ORDERS
async def test_a_compute_link_that_passes_nothing_for_a_while_is_left_and_used_again(
    order: str,
) -> None:
    async with in_process(KEYS) as (bed, _, relay):
        size_bytes = len(KEYS) * BLOCK_BYTES
        passed = bed.compute.passed["down", FETCH]
        await bed.relay_next()
        bed.hold_in_mid_stream(bed.compute, MID_STREAM_BYTES)
        asked = Asked(bed, order=order)
        await until(lambda: not bed.compute.hold_at)
        bed.compute.hold("up", "down")
        result = await asked.ended()
        assert result.ok, result.errors
        assert DIRECT in result.served_by
        assert paths(result) == {("relay", AGENT), ("direct", bed.daemon_link.peer)}
        assert bed.client.counters()["blocks_moved"] == result.served_by.count(DIRECT)
        # The agent sends all of it before it hears that nobody waits.
        bed.compute.let_go("down")
        await until(lambda: bed.compute.passed["down", FETCH] > passed + size_bytes)
        bed.compute.let_go()
        assert relay.counter("relay_bytes_out") == size_bytes
        again = await bed.relays_again()
        assert ("relay", AGENT) in paths(again)
        assert asked.untouched
        assert "reconnects" not in bed.client.counters()
        await bed.settled()


@pytest.mark.slow
@ORDERS
async def test_a_compute_link_that_breaks_is_left_and_used_again(order: str) -> None:
    async with in_process(KEYS) as (bed, _, relay):
        asked = await in_mid_stream(bed, order=order)
        bed.compute.refuse()
        bed.compute.cut()
        # Nobody is there any more for whom the agent would load.
        await until(lambda: relay.counter("fills_cancelled"))
        result = await asked.ended()
        assert result.ok, result.errors
        assert DIRECT in result.served_by
        assert result.errors
        bed.storage.let_go()
        bed.client.cluster.relays._selector._turn = 1
        assert (await bed.fetched(order=order)).served_by == [DIRECT] * len(KEYS)
        bed.compute.refuse(False)
        await bed.connected()
        again = await bed.relays_again()
        assert ("relay", AGENT) in paths(again)
        assert bed.client.counters()["reconnects"] == 1
        assert asked.untouched
        await bed.settled()
