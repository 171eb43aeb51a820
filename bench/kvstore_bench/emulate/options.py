"""What `kvbench emulate` is told, and what of it can be."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.service.linkrate import parse_rate_Bps
from kvstore.units import parse_size_bytes
from kvstore_bench.emulate.records import ORACLE, Arrivals
from kvstore_bench.emulate.results import Links
from kvstore_bench.emulate.shape import Shape
from kvstore_bench.emulate.work import Compute, Scale, Work, make_work, shared_compute
from kvstore_bench.generate import DATASETS, generate
from kvstore_bench.shaped.network import NODES_MAX, check_rate
from kvstore_bench.trace import Trace, load_traces
from kvstore_client.selector import Policy

POLICIES = (*(policy.value for policy in Policy), ORACLE)
DEFAULT_POLICIES = "direct,shortest_queue,balanced,oracle"
# Sessions that are generated where no trace is given.
GENERATED_SESSIONS = 16
# Requests may take this many times as long as all of the work would, were it all in one queue:
# none is to be missed for being late.
DEADLINE_FACTOR = 10.0
DEADLINE_S_MIN, DEADLINE_S_MAX = 60.0, 600.0

DESCRIPTION = """\
Emulate a PD-split cluster on this machine, and compare what policies make of it.

Every node is a network namespace; its storage NIC and its compute NIC are rate-limited
in both directions by the kernel. Daemons, agents and clients are the real ones, bytes
are real and are compared at the end of each turn; only GPUs are emulated: they sleep.

A turn goes to the prefill node with the least under way. It loads the hits, computes
the rest layer by layer, the decode node pulls what it lacks from the prefill node,
decodes, and stores the new blocks: all of that counts. A session's next turn begins
when its last one has ended.

TRACE is a file of coding-agent sessions (github.com/callanjfox/kv-cache-tester) or of
Mooncake requests (github.com/kvcache-ai/Mooncake), plain or gzip, or a pattern in
quotes; without one, sessions are generated as `kvbench generate` does.
"""
EPILOG = """\
policies:
  direct          each prefill node loads by its own storage NIC
  round_robin     whole requests by all paths in turn
  shortest_queue  whole requests by the side with the shorter read queue (the paper)
  balanced        each request split so that all paths end together
  oracle          loads and transfers cost nothing: computing alone

GPUs: a prefill takes --prefill-share of the time that all loads take directly, spread
over all tokens that are computed, and decoding takes --decode-share; or say how long a
token takes. A node computes one group of layers of one turn at a time; turns decode
side by side.

examples:
  kvbench emulate 'traces/*.json.gz' --sessions 8 --turns 10
  kvbench emulate --decode 2 --storage-nic 200Mbit/s --policies direct,balanced
  kvbench emulate 'traces/*.json.gz' --trials 3 --plot cluster.png --json cluster.json
  kvbench emulate --nic decode0.storage=100Mbit/s        one slow link
  kvbench emulate --arrival-rate 0.5                     sessions come at random times
  kvbench emulate --ttft-limit 2x --policies direct,balanced
                                  how many sessions a second each policy can take

It needs network namespaces: run it as root, or where user namespaces are allowed.

exit status: 0 all well; 1 a run failed or is void (blocks were missed or wrong), or the
result could not be written; 2 a wrong option or trace; 3 this machine or user cannot
make such networks; 130 interrupted.
"""


@dataclass(frozen=True, slots=True)
class Limit:
    """Of the time to the first token of nine turns in ten.

    Attributes:
        value: Seconds; or times what `direct` takes where nothing else is under way.
        relative: Which of the two.
    """

    value: float
    relative: bool


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for, checked.

    Attributes:
        groups: Groups of layers.
        check: Whether all bytes are compared.
        limit: For which the highest rate of arrivals is to be found.
    """

    shape: Shape
    work: Work
    compute: Compute
    arrivals: Arrivals
    policies: tuple[str, ...]
    trials: int
    groups: int
    check: bool
    limit: Limit | None

    @property
    def links(self) -> Links:
        """The storage links that loads may come by."""
        plans = self.shape.plans()
        names = [plan.name for plan in plans if not plan.name.startswith("storage")]
        return Links(names, self.shape.storage_Bps("prefill", "decode"))

    @property
    def deadline_s(self) -> float:
        """Of each request of an engine."""
        slowest = min(
            (rate for plan in self.shape.plans() for rate in plan.rates_Bps.values() if rate),
            default=0.0,
        )
        if not slowest:
            return DEADLINE_S_MIN
        at_once = min(len(self.work.sessions), 64) * self.work.longest_bytes
        ideal_s = at_once / slowest + sum(map(self.compute.prefill_s, self.work.turns))
        return min(DEADLINE_S_MAX, max(DEADLINE_S_MIN, DEADLINE_FACTOR * ideal_s))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all of them but where results go."""
    parser.add_argument("traces", nargs="*", metavar="TRACE", help="file, or pattern in quotes")
    cluster = parser.add_argument_group("cluster")
    for name, text in (
        ("prefill", "prefill nodes"),
        ("decode", "decode nodes"),
        ("storage", "storage hosts, whose own links are not limited"),
    ):
        cluster.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{text} (default: 1)"
        )
    cluster.add_argument(
        "--storage-nic",
        default="400Mbit/s",
        metavar="RATE",
        help="of each GPU node (default: 400Mbit/s)",
    )
    cluster.add_argument(
        "--compute-nic",
        default="",
        metavar="RATE",
        help="of each GPU node (default: 8 times --storage-nic)",
    )
    cluster.add_argument(
        "--nic",
        action="append",
        default=[],
        metavar="NODE.NETWORK=RATE",
        help="another rate for one link, as decode0.storage=100Mbit/s; repeatable",
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        metavar="LIST",
        help=f"(default: {DEFAULT_POLICIES})",
    )
    runs.add_argument(
        "--trials", type=int, default=1, metavar="N", help="all policies in turn N times (1)"
    )
    runs.add_argument(
        "--check",
        type=int,
        choices=(0, 1),
        default=1,
        help="1: compare all bytes of every prompt with what was computed (default: 1)",
    )
    _add_work(parser)


def _add_work(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work, and how much smaller than life it is")
    work.add_argument(
        "--bytes-per-token",
        default="512",
        metavar="SIZE",
        help="KV of a token, all layers (default: 512)",
    )
    work.add_argument(
        "--token-scale",
        type=int,
        default=32,
        metavar="N",
        help="one block stands for N blocks of the trace (default: 32)",
    )
    work.add_argument("--sessions", type=int, default=0, metavar="N", help="only the first N")
    work.add_argument(
        "--turns", type=int, default=0, metavar="N", help="only the first N of each session"
    )
    work.add_argument(
        "--layers", type=int, default=8, metavar="N", help="layers of a block (default: 8)"
    )
    work.add_argument(
        "--groups",
        type=int,
        default=0,
        metavar="N",
        help="groups of layers that are loaded and computed step by step (default: all layers)",
    )
    work.add_argument(
        "--dataset",
        choices=DATASETS,
        default="32k",
        help=f"of generated sessions (default: 32k, {GENERATED_SESSIONS} of them)",
    )
    work.add_argument(
        "--arrival-rate",
        type=float,
        default=0.0,
        metavar="R",
        help="sessions that begin in a second, at random; 0: all at once (default: 0)",
    )
    work.add_argument(
        "--ttft-limit",
        default="",
        metavar="T",
        help="find the highest arrival rate at which 9 of 10 turns have their first token within T"
        " seconds, or within Tx: times what `direct` takes for one session at a time, as 2x",
    )
    work.add_argument(
        "--seed", type=int, default=1, metavar="S", help="of arrivals and generated sessions (1)"
    )
    _add_gpus(parser)


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument(
        "--prefill-share", type=float, default=0.05, metavar="X", help="(default: 0.05)"
    )
    gpus.add_argument("--decode-share", type=float, default=0.2, metavar="X", help="(default: 0.2)")
    gpus.add_argument(
        "--prefill-token-us",
        type=float,
        metavar="T",
        help="time of a token that is computed, in place of --prefill-share",
    )
    gpus.add_argument(
        "--attention-ns",
        type=float,
        default=0.0,
        metavar="T",
        help="beside that, for each token of its context (default: 0)",
    )
    gpus.add_argument(
        "--decode-token-us",
        type=float,
        metavar="T",
        help="time of a token that is generated, in place of --decode-share",
    )
    gpus.add_argument(
        "--no-overlap",
        action="store_true",
        help="compute when all layers are loaded, not layer by layer",
    )


def make_options(args: argparse.Namespace) -> Options:
    """Check what was typed.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    for name in ("prefill", "decode", "storage", "trials", "token_scale", "layers"):
        _at_least(args, name, 1)
    for name in ("sessions", "turns", "groups", "seed", "arrival_rate"):
        _at_least(args, name, 0)
    for name in ("prefill_share", "decode_share", "attention_ns"):
        _at_least(args, name, 0)
    for name in ("prefill_token_us", "decode_token_us"):
        if getattr(args, name) is not None:
            _at_least(args, name, 0)
    groups = args.groups or args.layers
    if args.layers % groups:
        raise ConfigError("--groups", groups, f"must divide --layers, {args.layers}")
    shape = _shape(args)
    scale = Scale(
        bytes_per_token=parse_size_bytes(args.bytes_per_token, "--bytes-per-token"),
        token_scale=args.token_scale,
        sessions=args.sessions,
        turns=args.turns,
        layers=args.layers,
    )
    work = make_work(_traces(args), scale)
    return Options(
        shape=shape,
        work=work,
        compute=_compute(args, work, shape),
        arrivals=Arrivals(args.arrival_rate, args.seed),
        policies=_policies(args.policies),
        trials=args.trials,
        groups=groups,
        check=bool(args.check),
        limit=_limit(args),
    )


def _at_least(args: argparse.Namespace, name: str, least: int) -> None:
    value = getattr(args, name)
    if not value >= least or value == float("inf"):
        raise ConfigError(f"--{name.replace('_', '-')}", value, f"must be at least {least}")


def _shape(args: argparse.Namespace) -> Shape:
    storage_Bps = float(parse_rate_Bps(args.storage_nic, "--storage-nic"))
    compute_Bps = 8 * storage_Bps
    if args.compute_nic:
        compute_Bps = float(parse_rate_Bps(args.compute_nic, "--compute-nic"))
    check_rate("--storage-nic", storage_Bps)
    check_rate("--compute-nic", compute_Bps)
    shape = Shape(args.prefill, args.decode, args.storage, storage_Bps, compute_Bps, {})
    known = {(plan.name, network) for plan in shape.plans() for network in plan.rates_Bps}
    if len(shape.plans()) > NODES_MAX:
        raise ConfigError("--prefill", len(shape.plans()), f"nodes in all: at most {NODES_MAX}")
    rates: dict[tuple[str, str], float] = {}
    for text in args.nic:
        link, equals, rate = text.partition("=")
        node, _, network = link.partition(".")
        if not equals or (node, network) not in known:
            names = ", ".join(sorted(".".join(one) for one in known))
            raise ConfigError("--nic", text, f"is NODE.NETWORK=RATE; there are {names}")
        rates[node, network] = float(parse_rate_Bps(rate, "--nic"))
        check_rate("--nic", rates[node, network])
    return Shape(args.prefill, args.decode, args.storage, storage_Bps, compute_Bps, rates)


def _traces(args: argparse.Namespace) -> list[Trace]:
    if args.traces:
        return load_traces(args.traces)
    with tempfile.TemporaryDirectory(prefix="kvbench-") as home:
        path = Path(home) / f"generated-{args.dataset}.json"
        generate(path, args.dataset, args.sessions or GENERATED_SESSIONS, args.seed)
        return load_traces([path])


def _compute(args: argparse.Namespace, work: Work, shape: Shape) -> Compute:
    direct_Bps = shape.storage_Bps("prefill")
    shares = (args.prefill_token_us, args.decode_token_us).count(None)
    if shares and not direct_Bps:
        raise ConfigError(
            "--storage-nic", 0, "takes no time to load by: say --prefill-token-us and"
            " --decode-token-us"
        )  # fmt: skip
    load_s = work.hit_bytes / direct_Bps if direct_Bps else 0.0
    shared = shared_compute(
        work, load_s, args.prefill_share, args.decode_share, not args.no_overlap
    )
    given_s = args.prefill_token_us, args.decode_token_us
    return Compute(
        token_s=shared.token_s if given_s[0] is None else given_s[0] / 1e6,
        attention_s=args.attention_ns / 1e9,
        decode_s=shared.decode_s if given_s[1] is None else given_s[1] / 1e6,
        overlap=shared.overlap,
    )


def _limit(args: argparse.Namespace) -> Limit | None:
    text = args.ttft_limit
    if not text:
        return None
    if args.arrival_rate or args.trials != 1:
        option, value = ("--arrival-rate", args.arrival_rate)
        if not args.arrival_rate:
            option, value = "--trials", args.trials
        raise ConfigError(option, value, "cannot be given with --ttft-limit, which tries rates")
    relative = text.endswith("x")
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError("--ttft-limit", text, "is a number of seconds above 0, or as 2x")
    return Limit(value, relative)


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in POLICIES:
            raise ConfigError("--policies", name, f"is none of {', '.join(POLICIES)}")
    if not names:
        raise ConfigError("--policies", text, f"names none of {', '.join(POLICIES)}")
    return names


__all__ = ["DESCRIPTION", "EPILOG", "POLICIES", "Options", "add_options", "make_options"]
