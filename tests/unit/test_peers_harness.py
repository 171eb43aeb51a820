"""What a run of bench/peers asks for, in which order, and when it is content."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import ConfigError
from peers import harness
from peers.catalogue import BY_NAME
from peers.harness import Run
from peers.options import Options, parsed_options, parser
from peers.process import Missing, Process, RunFailed
from peers.table import OTHER_CORES_MAX


def options(*words: str) -> Options:
    return parsed_options(parser().parse_args(words))


def section(**words: float) -> dict[str, Any]:
    return {
        "bytes": 1 << 30,
        "seconds": 1.0,
        "client_s": 0.1,
        "server_s": 0.1,
        "other_cores": 0.0,
        "batch_ms": {"p50": 1.0, "p99": 1.0},
        "checked": 16,
        "wrong": 0,
        **words,
    }


class Asked(Process):
    """A process that is none: what it was asked, and what it answers in turn."""

    def __init__(self, name: str, *answers: dict[str, Any] | Exception) -> None:
        self.entry = BY_NAME[name]
        self.work = options().work(4096)
        self.asked: list[tuple[str, dict[str, object]]] = []
        self._answers = list(answers)

    async def ask(self, action: str, **words: object) -> dict[str, Any]:
        self.asked.append((action, words))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_all_peers_are_measured_unless_some_are_named() -> None:
    assert [entry.name for entry in options().peers] == list(BY_NAME)
    assert not options().named
    some = options("--peers", "redis", "raw")
    # In the order of the tables, in which the limit is first.
    assert [entry.name for entry in some.peers] == ["raw", "redis"]
    assert some.named


def test_the_work_holds_what_was_asked_for() -> None:
    work = options("--set", "64MiB", "--writes", "8MiB", "--depth", "1", "4").work(64 * 1024)
    assert work.batch_bytes == 1 << 20
    assert (work.read_batches, work.write_batches, work.lanes) == (64, 8, 4)


def test_every_lane_has_a_batch_of_its_own_however_little_is_asked_for() -> None:
    work = options("--set", "1", "--writes", "1", "--depth", "3").work(1 << 20)
    assert (work.read_batches, work.write_batches) == (3, 3)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--bs", "100"], "--bs"),
        (["--bs", "4"], "--bs"),
        (["--depth", "0"], "--depth"),
        (["--batch", "0"], "--batch"),
        (["--trials", "0"], "--trials"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--patience", "-1"], "--patience"),
        (["--set", "0"], "--set"),
        (["--writes", "100GiB"], "--writes"),
        (["--peers", "raw", "etcd"], "--peers"),
    ],
)
def test_what_means_nothing_is_refused(words: list[str], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        options(*words)


@pytest.mark.asyncio
async def test_a_turn_is_reads_and_then_writes() -> None:
    run, process = Run(options("--seconds", "2")), Asked("redis", section(), section())
    await run._turn(process, depth=2, trial=3)
    assert process.asked == [
        ("get", {"depth": 2, "seconds": 2.0, "ramp_s": 0.5}),
        ("put", {"depth": 2, "seconds": 1.0}),
    ]
    (cell,) = run.cells
    assert (cell.peer, cell.depth, cell.trial) == ("redis", 2, 3)
    assert run.good


@pytest.mark.asyncio
async def test_a_peer_that_fails_has_no_figure_of_that_turn() -> None:
    run = Run(options())
    await run._turn(Asked("redis", section(), RunFailed("redis: put: gone")), 1, 1)
    assert run.cells == []
    assert run.failed == {"redis": "redis: put: gone"}
    assert not run.good


@pytest.mark.asyncio
async def test_wrong_bytes_fail_the_run_and_are_told() -> None:
    run = Run(options())
    await run._turn(Asked("redis", section(wrong=2), section()), 1, 1)
    run.versions["redis"] = "redis 7"
    assert not run.good
    assert "redis: redis 7; 32 blocks compared, 2 wrong" in run.text()


@pytest.mark.asyncio
async def test_what_an_environment_lacks_is_told_with_what_to_type() -> None:
    run = Run(options())
    assert not await run._open(Asked("mooncake", Missing("its library")))
    assert "its library (bench/peers/prepare" in run.missing["mooncake"]
    assert run.good
    named = Run(options("--peers", "mooncake"))
    await named._open(Asked("mooncake", Missing("its library")))
    assert not named.good


@pytest.mark.asyncio
async def test_without_patience_nothing_is_measured_again() -> None:
    run, busy = Run(options()), section(other_cores=1.5)
    assert await run._quietly(Asked("redis", busy), "get") == busy
    assert run.repeated == 0


@pytest.mark.asyncio
async def test_with_patience_a_disturbed_section_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "QUIET_WINDOW_S", 0.001)
    monkeypatch.setattr(harness, "busy_s", lambda: 0.0)
    run = Run(options("--patience", "1.5"))
    disturbed, quiet = section(other_cores=1.5), section(other_cores=OTHER_CORES_MAX)
    process = Asked("redis", disturbed, quiet, disturbed, disturbed)
    assert await run._quietly(process, "get") == quiet
    assert run.repeated == 1
    # All of them were compared, whichever counts.
    assert run.checked == {"redis": 32}
    # It is used up by the second: a machine that is never quiet is measured as it is.
    assert await run._quietly(process, "get") == disturbed
    assert run.repeated == 2


@pytest.mark.asyncio
async def test_a_machine_in_use_is_waited_for_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent = iter(range(1000))
    monkeypatch.setattr(harness, "QUIET_WINDOW_S", 0.001)
    monkeypatch.setattr(harness, "busy_s", lambda: float(next(spent)))
    run, process = Run(options("--patience", "0.005")), Asked("redis", section())
    await run._quietly(process, "put")
    # Two looks for each window that was waited for.
    assert 10 <= next(spent) <= 12
    assert len(process.asked) == 1
