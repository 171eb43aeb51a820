"""Both paths at work: the same fetches directly, and spread over both.

::

    $ python -m kvstore_bench.shaped.demo --plot two-paths.png

One prefill node, one decode node whose agent relays and one storage host, in network namespaces
with rate-limited links. Where those cannot be made, both paths go over loopback: that shows that
they work, and not what the second one gains.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError, KVStoreError
from kvstore.units import format_size_bytes
from kvstore_bench.children import Child, stop_all
from kvstore_bench.daemons import Daemons
from kvstore_bench.replay.picture import check_picture
from kvstore_bench.replay.report import align
from kvstore_bench.shaped import MBIT, ShapingUnavailable
from kvstore_bench.shaped.bed import BLOCK_BYTES, LAYER_BYTES, MIB, Bed, BedPlan, Sample, bed
from kvstore_bench.shaped.clients import DIRECT
from kvstore_bench.shaped.network import QUEUE_S
from kvstore_bench.shaped.nodes import LISTEN_TIMEOUT_S, NodeFailed
from kvstore_bench.shaped.picture import Panel, draw
from kvstore_bench.shaped.traffic import Reading, watching
from kvstore_bench.shaped.worker import Fill, Load, Setup, Worker

# What the selector says of a fetch by which it finds out what splitting gains.
COMPARING = "to compare"
POLICIES = (DIRECT, "balanced")
STORAGE_NIC_BPS, COMPUTE_NIC_BPS = 400 * MBIT, 3200 * MBIT
FETCH_BYTES = 64 * MIB
FETCHES = 5
# More than fit into the agent's memory, and no more memory than a small machine has.
PREFIXES = 8
# Before the fetches that are shown: connections, and a first idea of the links.
WARM_FETCHES = 1
# Between two fetches, so that a person sees where one ends.
PAUSE_S = 0.3
# Over loopback nothing is to be seen in time.
LOOPBACK_FETCH_BYTES, LOOPBACK_FETCHES = 8 * MIB, 8
LOOPBACK_POLICY = "round_robin"
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_LISTENING = re.compile(r"listening on (\S+)")


@dataclass(frozen=True, slots=True)
class Shown:
    """What one policy did.

    Attributes:
        readings: Of the links, all the time.
    """

    policy: str
    samples: list[Sample]
    readings: list[Reading]

    @property
    def seconds(self) -> list[float]:
        """Of each fetch."""
        return [sample.done.elapsed_s[0] for sample in self.samples]

    @property
    def median_s(self) -> float:
        """The median time of a fetch."""
        return statistics.median(self.seconds)

    @property
    def trials(self) -> list[bool]:
        """Of each fetch: whether it went directly to show what the other path brings."""
        return [COMPARING in sample.done.plans[0] for sample in self.samples]

    @property
    def panel(self) -> Panel:
        """For the picture."""
        words = ["direct, to compare" if trial else "" for trial in self.trials]
        ends = [sample.done.ended_at[0] for sample in self.samples]
        spans = zip(ends, self.seconds, words, strict=True)
        fetches = [(end - took, end, word) for end, took, word in spans]
        title = f"policy {self.policy}: {self.median_s:.2f} s a fetch"
        return Panel(title, self.readings, fetches)


class Progress:
    """Says what is being done: a line that moves on a terminal, one a stage elsewhere."""

    def __init__(self) -> None:
        self._moves = sys.stderr.isatty()

    def stage(self, text: str) -> None:
        """Something takes a while from now on."""
        end = "" if self._moves else "\n"
        lead = "\r\033[K" if self._moves else ""
        print(f"{lead}  {text} ...", end=end, file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """Within a stage, for terminals alone."""
        if self._moves:
            self.stage(text)

    def done(self) -> None:
        """Leave the line to others."""
        if self._moves:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


async def show_shaped(progress: Progress) -> list[Shown]:
    """Fetch by each policy over links of known rates.

    Raises:
        ShapingUnavailable: There are no such links here; says what is missing.
        NodeFailed: A process has failed, or bytes are wrong.
    """
    plan = BedPlan(
        FETCH_BYTES, 1, True, STORAGE_NIC_BPS, COMPUTE_NIC_BPS, QUEUE_S, prefix_count=PREFIXES
    )
    progress.stage("three nodes with links of their own, and blocks to fetch")
    async with bed(plan) as on:
        return [await _show(on, policy, progress) for policy in POLICIES]


async def _show(on: Bed, policy: str, progress: Progress) -> Shown:
    progress.stage(f"{FETCHES} fetches of {format_size_bytes(FETCH_BYTES)}, policy {policy}")
    for _ in range(WARM_FETCHES):
        await on.load(policy, count=1, check=True)
    samples = []
    async with watching(on.carried) as readings:
        for number in range(FETCHES):
            await asyncio.sleep(PAUSE_S)
            samples.append(await on.load(policy, count=1, check=True))
            took_s = samples[-1].done.elapsed_s[0]
            progress.step(f"policy {policy}: fetch {number + 1} of {FETCHES} took {took_s:.2f} s")
        await asyncio.sleep(PAUSE_S)
    return Shown(policy, samples, readings)


async def show_loopback() -> dict[str, int]:
    """Fetch by turns over both paths on loopback; bytes by path.

    Raises:
        KVStoreError: A process has failed, or bytes are wrong.
    """
    size_bytes = LOOPBACK_FETCH_BYTES
    listening = asyncio.Event()
    uris: list[str] = []

    def hear(line: str) -> None:
        if found := _LISTENING.search(line):
            uris.append(found[1])
            listening.set()

    async with Daemons(1, PREFIXES * size_bytes + 64 * MIB) as daemons:
        arguments = [
            *("--storage", daemons.endpoints[0], "--listen", "tcp://127.0.0.1:0"),
            *("--memory", str(2 * size_bytes), "--node-id", "decode0"),
        ]
        agent = await Child.start("kvagent", "kvstore_client.agent", arguments, hear, hear)
        try:
            await _until_listening(agent, listening)
            setup = Setup(
                endpoints=tuple(daemons.endpoints),
                node_id="prefill0",
                layer_bytes=LAYER_BYTES,
                request_blocks=size_bytes // BLOCK_BYTES,
                relays=tuple(uris[:1]),
                decode_node="decode0",
            )
            worker = Worker(setup)
            try:
                await worker.do(Fill(PREFIXES))
                load = Load(LOOPBACK_POLICY, PREFIXES, count=LOOPBACK_FETCHES, check=True)
                done = await worker.do(load)
            finally:
                await worker.close()
        finally:
            await stop_all([agent])
    if done.error:
        raise NodeFailed(f"{done.failed_blocks} blocks failed: {done.error}")
    return done.path_bytes


async def _until_listening(agent: Child, listening: asyncio.Event) -> None:
    waits = [asyncio.create_task(listening.wait()), asyncio.create_task(agent.ended())]
    try:
        await asyncio.wait(waits, timeout=LISTEN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)
    if not listening.is_set():
        late = f"{agent.name} does not listen after {LISTEN_TIMEOUT_S:.0f} s"
        raise NodeFailed(late if agent.status is None else agent.story())


def shaped_rows(shown: Sequence[Shown]) -> list[str]:
    """The table of policies for people. Pure."""
    rows: list[tuple[str, ...]] = [
        (
            "policy",
            "s a fetch",
            "lowest",
            "highest",
            f"beside {shown[0].policy}",
            "prefill storage",
            "decode storage",
            "prefill compute",
        )
    ]
    first_s = shown[0].median_s
    for one in shown:
        carried = (
            sum(sample.prefill_bytes for sample in one.samples),
            sum(sample.decode_bytes for sample in one.samples),
            sum(sample.compute_bytes for sample in one.samples),
        )
        rows.append(
            (
                one.policy,
                *(f"{s:.3f}" for s in (one.median_s, min(one.seconds), max(one.seconds))),
                f"{one.median_s / first_s:.2f}",
                *(f"{size_bytes / MIB:.1f}" for size_bytes in carried),
            )
        )
    return align(rows, right=True)


def _tell_shaped(shown: Sequence[Shown], plot: Path | None) -> None:
    size = format_size_bytes(FETCH_BYTES)
    nics = (
        f"storage NICs {STORAGE_NIC_BPS // MBIT:,} Mbit/s, compute NICs"
        f" {COMPUTE_NIC_BPS // MBIT:,} Mbit/s"
    )
    print(f"  {FETCHES} fetches of {size} by each policy, one at a time, every byte compared;")
    print(f"  {nics}; MiB that each has received, by its own counter\n")
    for line in shaped_rows(shown):
        print(line)
    for one in shown:
        if any(one.trials):
            print(
                f"\n  {one.policy}: {sum(one.trials)} of {FETCHES} went directly, to compare with"
                " what splitting brings"
            )
    if plot is None:
        return
    direct, other = shown[0], shown[-1]
    draw(
        [one.panel for one in shown],
        f"{size} from storage: {direct.median_s:.2f} s by one path,"
        f" {other.median_s:.2f} s by policy {other.policy}",
        f"medians of {FETCHES} fetches, one at a time; {nics}",
        STORAGE_NIC_BPS,
        plot,
    )
    print(f"\n  picture in {plot}")


def _tell_loopback(reason: ShapingUnavailable, path_bytes: dict[str, int]) -> None:
    size = format_size_bytes(LOOPBACK_FETCH_BYTES)
    print(f"  no shaped links, so no picture: {' '.join(str(reason).split())}")
    print(f"  both paths over loopback instead: {LOOPBACK_FETCHES} fetches of {size},", end=" ")
    print(f"policy {LOOPBACK_POLICY}; every byte compared\n")
    rows = [("path", "MiB")]
    rows += [(path, f"{path_bytes[path] / MIB:.1f}") for path in sorted(path_bytes)]
    for line in align(rows, right=True):
        print(line)


async def demonstrate(plot: Path | None) -> None:
    """Show both paths, on shaped links where there are any.

    Raises:
        KVStoreError: A process has failed, bytes are wrong, or the picture cannot be written.
    """
    progress = Progress()
    try:
        shown = await show_shaped(progress)
    except ShapingUnavailable as error:
        progress.done()
        _tell_loopback(error, await show_loopback())
        return
    finally:
        progress.done()
    _tell_shaped(shown, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Returns:
        0: shown, be it over loopback. 1: something failed. 2: a wrong option. 130: interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_bench.shaped.demo",
        description="Fetch the same directly and by both paths, on rate-limited links in network"
        " namespaces; over loopback where there are none.",
        allow_abbrev=False,
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="what each NIC carried, .png")
    args = parser.parse_args(arguments)
    try:
        if args.plot is not None:
            check_picture(args.plot)
        asyncio.run(demonstrate(args.plot))
    except (KVStoreError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


__all__ = [
    "Progress",
    "Shown",
    "demonstrate",
    "main",
    "shaped_rows",
    "show_loopback",
    "show_shaped",
]

if __name__ == "__main__":
    sys.exit(main())
