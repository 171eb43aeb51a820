"""Measures what the second path gains, and what it costs, on links of known rates.

::

    $ python -m kvstore_bench.two_paths --json two_paths.json

A cluster of network namespaces (`kvstore_bench.shaped`): one prefill node, one decode node whose
agent relays, and one storage host whose own link is not shaped.

relay     a stream of fetches, all by the relay, beside the same directly; all links equal
single    one fetch at a time and nothing else: each policy beside `direct`
loopback  a stream of fetches where no link is the limit, so that the relay can only cost
reports   how old load reports are when they arrive over a link that is kept busy

A ratio is taken within a trial, in which the policies take turns, in the other order in every
second one; of those the median, the lowest and the highest are told. Fetches go through more
prefixes than fit into the agent's memory, so that it reads from storage what it sends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError, KVStoreError
from kvstore_bench.shaped import MBIT, STORAGE, ShapedNetwork, cluster_plans
from kvstore_bench.shaped.bed import MIB, Bed, BedPlan, Sample, bed, fill, worker_setup
from kvstore_bench.shaped.clients import DIRECT, POLICIES, RELAY, relays_supported
from kvstore_bench.shaped.figures import Figure, table
from kvstore_bench.shaped.network import QUEUE_S
from kvstore_bench.shaped.session import WorkerSession
from kvstore_bench.shaped.worker import Load, Reports

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

TRIALS_MAX = 1000
SECONDS_MAX = 3600.0
# A stream has found its rate by then, and a selector has learnt what it can.
WARM_S = 2.0
# Before a fetch that shall find everything idle: two intervals of load reports, so that nobody
# has heard of anything else.
IDLE_S = 0.4
# Each policy's own fetches before those that count.
WARM_FETCHES = 2
# Large enough to be split, and enough of them to keep every link busy.
STREAM_BYTES, STREAM_DEPTH = 16 * MIB, 4
SINGLE_BYTES = 64 * MIB
# Small, so that requests begin and end often: that is what reports tell of.
REPORT_BYTES, REPORT_DEPTH = 1 * MIB, 4


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; rates in bytes a second.

    Attributes:
        seconds: Of each stream.
        policies: To be compared with `direct`.
    """

    trials: int
    seconds: float
    policies: tuple[str, ...]
    storage_nic_Bps: float
    compute_nic_Bps: float
    report_nic_Bps: float
    queue_s: float


# --- measurements ------------------------------------------------------------------------------


async def _rounds(
    on: Bed, policies: Sequence[str], trials: int, load: Callable[[str], Awaitable[Sample]]
) -> dict[str, list[Sample]]:
    """Each policy's samples, one a trial."""
    samples: dict[str, list[Sample]] = {policy: [] for policy in policies}
    for trial in range(trials):
        for policy in policies if trial % 2 == 0 else tuple(reversed(policies)):
            samples[policy].append(await load(policy))
    return samples


def _streams(
    measurement: str, samples: dict[str, list[Sample]], at_least: dict[str, float]
) -> list[Figure]:
    """Rates of all policies, and of each beside `direct`."""
    figures = []
    for policy, found in samples.items():
        rates = [sample.rate_Bps / 1e6 for sample in found]
        figures.append(Figure(measurement, policy, "MB/s", rates))
    for policy, found in samples.items():
        if policy != DIRECT:
            pairs = zip(found, samples[DIRECT], strict=True)
            ratios = [one.rate_Bps / direct.rate_Bps for one, direct in pairs]
            name = f"{policy} beside {DIRECT}"
            figures.append(Figure(measurement, name, "ratio", ratios, at_least.get(policy)))
    return figures


def _relayed(measurement: str, samples: dict[str, list[Sample]], **limits: float) -> list[Figure]:
    """Shares of the relay, and whether what it sent came from storage."""
    figures = []
    for policy, found in samples.items():
        if policy == DIRECT:
            continue
        shares = [sample.relay_share for sample in found]
        at_most = limits.get(policy)
        name = f"{policy}: share of the relay"
        figures.append(Figure(measurement, name, "ratio", shares, at_most=at_most))
        read = [s.decode_bytes / s.compute_bytes for s in found if s.compute_bytes > MIB]
        if read:
            name = f"{policy}: read from storage of what was relayed"
            figures.append(Figure(measurement, name, "ratio", read))
    return figures


async def relay(options: Options) -> list[Figure]:
    """All by the relay, beside the same directly; every link has the rate of the storage NIC."""
    rate_Bps = options.storage_nic_Bps
    policies = (DIRECT, RELAY) if relays_supported() else (DIRECT,)
    plan = BedPlan(
        STREAM_BYTES, STREAM_DEPTH, len(policies) > 1, rate_Bps, rate_Bps, options.queue_s
    )
    async with bed(plan) as on:
        samples = await _rounds(
            on,
            policies,
            options.trials,
            lambda policy: on.load(policy, warm_s=WARM_S, seconds=options.seconds),
        )
    return [*_streams("relay", samples, {RELAY: 0.9}), *_relayed("relay", samples)]


async def single(options: Options) -> list[Figure]:
    """Fetches of 64 MiB, one at a time."""
    policies = (DIRECT, *options.policies) if relays_supported() else (DIRECT,)
    plan = BedPlan(
        SINGLE_BYTES,
        1,
        len(policies) > 1,
        options.storage_nic_Bps,
        options.compute_nic_Bps,
        options.queue_s,
    )
    figures = []
    async with bed(plan) as on:

        async def fetch_one(policy: str) -> Sample:
            await asyncio.sleep(IDLE_S)
            return await on.load(policy, count=1, check=True)

        for policy in policies:
            first = await fetch_one(policy)
            times = [first.done.elapsed_s[0] * 1e3]
            figures.append(Figure("single", f"{policy}, the first of all", "ms", times))
            for _ in range(WARM_FETCHES):
                await fetch_one(policy)
        samples = await _rounds(on, policies, options.trials, fetch_one)
    return [*figures, *_single_times(samples), *_relayed("single", samples)]


def _single_times(samples: dict[str, list[Sample]]) -> list[Figure]:
    """Times of all policies, of each beside `direct`, and beside what was estimated."""
    figures, ratios = [], []
    for policy, found in samples.items():
        times = [sample.done.elapsed_s[0] for sample in found]
        notes = [sample.done.plans[0] for sample in found]
        milliseconds = [time_s * 1e3 for time_s in times]
        figures.append(Figure("single", policy, "ms", milliseconds, notes=notes))
        if policy == DIRECT:
            continue
        directly = [sample.done.elapsed_s[0] for sample in samples[DIRECT]]
        found_ratios = [one / other for one, other in zip(times, directly, strict=True)]
        at_most = 0.56 if policy == "balanced" else None
        name = f"{policy} beside {DIRECT}"
        ratios.append(Figure("single", name, "ratio", found_ratios, at_most=at_most))
        estimates = [sample.done.estimates_s[0] for sample in found]
        if all(estimates):
            beside = [one / other for one, other in zip(times, estimates, strict=True)]
            ratios.append(Figure("single", f"{policy} beside its estimate", "ratio", beside))
    return [*figures, *ratios]


async def loopback(options: Options) -> list[Figure]:
    """Streams where the processors are the limit."""
    policies = (DIRECT, *options.policies) if relays_supported() else (DIRECT,)
    plan = BedPlan(STREAM_BYTES, STREAM_DEPTH, len(policies) > 1, 0, 0, options.queue_s)
    async with bed(plan) as on:
        samples = await _rounds(
            on,
            policies,
            options.trials,
            lambda policy: on.load(policy, warm_s=WARM_S, seconds=options.seconds),
        )
    return [
        *_streams("loopback", samples, {"balanced": 0.9}),
        *_relayed("loopback", samples, balanced=0.05),
    ]


async def reports(options: Options) -> list[Figure]:
    """Ages of load reports at their arrival, the link idle and busy."""
    rate_Bps = options.report_nic_Bps
    plan = BedPlan(REPORT_BYTES, REPORT_DEPTH, False, rate_Bps, rate_Bps, options.queue_s)
    plans = cluster_plans(1, 0, 1, rate_Bps, rate_Bps)
    async with ShapedNetwork(plans, options.queue_s) as network:
        prefill, storage = network["prefill0"], network["storage0"]
        said: list[str] = []
        daemon = await storage.serve(
            "kvstore_bench.shaped.reporting",
            [storage.uri(STORAGE), str(plan.daemon_bytes), storage.name],
            said,
        )
        await fill(storage, plan)
        worker = await WorkerSession.start(prefill, worker_setup(plan, prefill.name, storage))
        load = Load(DIRECT, plan.prefixes, plan.depth, warm_s=WARM_S, seconds=options.seconds)
        await worker.do(load, WARM_S + options.seconds)
        await worker.do(Reports())
        began_at, before = time.monotonic(), prefill.links[STORAGE].counters()
        done = await worker.do(load, WARM_S + options.seconds)
        ended_at, after = time.monotonic(), prefill.links[STORAGE].counters()
        busy = (await worker.do(Reports())).arrivals
        await asyncio.sleep(options.seconds)
        idle = (await worker.do(Reports())).arrivals
        daemon.say("end")
        pushed = await storage.answer_of(daemon, said, 60)
    times: dict[int, float] = dict(pushed["pushed"])
    share = (after.received_bytes - before.received_bytes) / (ended_at - began_at) / rate_Bps
    figures = [
        Figure("reports", "payload on the busy link", "MB/s", [done.bytes / done.seconds / 1e6]),
        Figure("reports", "the busy link's use", "ratio", [share]),
    ]
    for name, arrivals in (("busy", busy), ("idle", idle)):
        figures += _ages(name, times, arrivals)
    return figures


def _ages(
    name: str, pushed: dict[int, float], arrivals: Sequence[tuple[str, str, int, float]]
) -> list[Figure]:
    """How old reports are when they are first known, and how many never were."""
    first: dict[int, float] = {}
    for _, _, seq, at in arrivals:
        first[seq] = min(at, first.get(seq, at))
    known = sorted(set(first) & set(pushed))
    if not known:
        return []
    ages_ms = sorted((first[seq] - pushed[seq]) * 1e3 for seq in known)
    expected = [seq for seq in pushed if known[0] <= seq <= known[-1]]
    p99 = ages_ms[min(len(ages_ms) - 1, int(0.99 * len(ages_ms)))]
    at_most = 30.0 if name == "busy" else None
    return [
        Figure("reports", f"age, {name}: median", "ms", ages_ms),
        Figure("reports", f"age, {name}: p99", "ms", ages_ms, at_most=at_most, value=p99),
        Figure("reports", f"reports that came, {name}", "", [len(known)]),
        Figure("reports", f"reports that did not, {name}", "", [len(expected) - len(known)]),
    ]


MEASUREMENTS = {"relay": relay, "single": single, "loopback": loopback, "reports": reports}


def as_json(options: Options, figures: Sequence[Figure]) -> dict[str, Any]:
    """All figures for programs."""
    return {
        "format": "kvbench-two-paths",
        "version": JSON_VERSION,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "trials": options.trials,
        "seconds": options.seconds,
        "storage_nic_Bps": options.storage_nic_Bps,
        "compute_nic_Bps": options.compute_nic_Bps,
        "report_nic_Bps": options.report_nic_Bps,
        "queue_s": options.queue_s,
        "figures": [figure.plain() for figure in figures],
    }


async def measure(options: Options, names: Sequence[str]) -> list[Figure]:
    """Do some of the measurements, one after the other."""
    figures: list[Figure] = []
    for name in names:
        if sys.stderr.isatty():
            print(f"{name} ...", file=sys.stderr, flush=True)
        figures += await MEASUREMENTS[name](options)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: all was measured, whether or not targets are met. 1: something failed, or links
        cannot be shaped here. 2: a wrong option. 130: interrupted.
    """
    args = _parser().parse_args(arguments)
    try:
        options = _options(args)
        figures = asyncio.run(measure(options, args.only or list(MEASUREMENTS)))
        text = json.dumps(as_json(options, figures), indent=2) + "\n"
        to_stdout = args.json is not None and str(args.json) == "-"
        # With the figures on standard output, what is for people goes to the other one.
        people = sys.stderr if to_stdout else sys.stdout
        print("\n".join(table(figures)), file=people)
        if not relays_supported():
            print("\nrelays: not measured, this client knows none", file=people)
        if to_stdout:
            sys.stdout.write(text)
        elif args.json is not None:
            args.json.write_text(text)
    except (KVStoreError, OSError) as error:
        print(f"two_paths: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("two_paths: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _options(args: argparse.Namespace) -> Options:
    if not 1 <= args.trials <= TRIALS_MAX:
        raise ConfigError("--trials", args.trials, f"is 1 to {TRIALS_MAX:,}")
    if not 0.5 <= args.seconds <= SECONDS_MAX:
        raise ConfigError("--seconds", args.seconds, f"is 0.5 to {SECONDS_MAX:,.0f}")
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError("--json", args.json, "lies in a directory that exists")
    if not 0.001 <= args.queue_ms / 1e3 <= 1:
        raise ConfigError("--queue-ms", args.queue_ms, "is 1 to 1,000")
    for option, rate_mbit in (
        ("--storage-nic", args.storage_nic),
        ("--compute-nic", args.compute_nic),
        ("--report-nic", args.report_nic),
    ):
        if not 1 <= rate_mbit <= 100_000:
            raise ConfigError(option, rate_mbit, "is 1 to 100,000 Mbit/s")
    return Options(
        trials=args.trials,
        seconds=args.seconds,
        policies=tuple(policy for policy in args.policies if policy != DIRECT),
        storage_nic_Bps=args.storage_nic * MBIT,
        compute_nic_Bps=args.compute_nic * MBIT,
        report_nic_Bps=args.report_nic * MBIT,
        queue_s=args.queue_ms / 1e3,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvstore_bench.two_paths",
        description="Measure what the second path gains and what it costs: one prefill node,"
        " one decode node that relays, one storage host, in network namespaces with rate-limited"
        " links. Needs root, or user namespaces, and iproute2.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = list(MEASUREMENTS)
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    add("--trials", type=int, default=5, metavar="N", help="of each policy (default: 5)")
    add("--seconds", type=float, default=5, metavar="S", help="of each stream (default: 5)")
    add(
        "--policies",
        nargs="+",
        default=["balanced", "shortest_queue"],
        choices=POLICIES,
        metavar="POLICY",
        help="to compare with direct (default: balanced shortest_queue)",
    )
    mbit = "Mbit/s, in each direction (default: %(default)s)"
    add("--storage-nic", type=float, default=400, metavar="MBIT", help=mbit)
    add("--compute-nic", type=float, default=3200, metavar="MBIT", help=mbit)
    add("--report-nic", type=float, default=100, metavar="MBIT", help=f"for reports: {mbit}")
    add(
        "--queue-ms",
        type=float,
        default=QUEUE_S * 1e3,
        metavar="MS",
        help="what a link queues before it drops (default: %(default)g)",
    )
    add("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    return parser


__all__ = ["Options", "as_json", "main", "measure"]

if __name__ == "__main__":
    sys.exit(main())
