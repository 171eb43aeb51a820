"""The options of a job: what each may be, and what its help says. Pure.

Rule: an option that is listed here works, and one that works is listed here. The words and
their meaning are fio's (fio.readthedocs.io) wherever fio has them; `batch`, `layers`, `model`,
`page_tokens`, `layout`, `order`, `group_layers`, `ack`, `path`, `transport`, `require_transport`,
`hit_rate`, `verify_checksums`, `endpoint`, `relay`, `deadline`, `held`, `spin` and `spin_outside`
are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.layout import BLOCK_BYTES_MAX, LAYERS_MAX
from kvstore.messages import DEADLINE_MS_MAX, KEYS_PER_REQUEST_MAX
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore_bench.models import MODELS

# More than one job writes at once into as many buffers, and each clone is a process.
IODEPTH_MAX = 1024
NUMJOBS_MAX = 64
# Of one job. A thread more that spins changes nothing but whose turn it is.
SPIN_MAX = 8
# Blocks are stamped a word at a time.
BLOCK_STEP_BYTES = 8
# More tokens than any engine keeps in a page.
PAGE_TOKENS_MAX = 65536
# Far more than one process can begin.
RATE_IOPS_MAX = 1_000_000

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h|d)?")
_DURATION_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%?")

#: What moves payload, as the client knows it.
TRANSPORTS = ("auto", "tcp", "unix", "shm", "rdma")
#: What the hop to us may go by, on each path.
HOPS = {
    "direct": TRANSPORTS,
    "relay": ("auto", "tcp", "rdma"),
    "auto": ("auto", "tcp", "rdma"),
    "agent": ("auto", "unix", "shm"),
    "views": ("auto", "shm"),
}


def parse_duration_s(text: str, option: str) -> float:
    """Read a time as fio does: seconds, or a number with us, ms, s, m, h or d.

    Raises:
        ConfigError: Names the option, the text and what is allowed.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(option, text, "a time is a number of seconds, or one with us ms s m h d")
    return float(match[1]) * _DURATION_UNITS[match[2] or "s"]


def _choice(*allowed: str) -> Callable[[str, str], str]:
    def parse(text: str, option: str) -> str:
        if text not in allowed:
            raise ConfigError(option, text, f"must be {' or '.join(allowed)}")
        return text

    return parse


def _number(low: int, high: int) -> Callable[[str, str], int]:
    def parse(text: str, option: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ConfigError(option, text, f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _flag(text: str, option: str) -> bool:
    if text not in ("", "0", "1"):
        raise ConfigError(option, text, "must be 0 or 1; the word alone means 1")
    return text != "0"


def _endpoints(text: str, option: str) -> tuple[str, ...]:
    return tuple(str(parse_endpoint(part.strip(), option)) for part in text.split(","))


def _deadline(text: str, option: str) -> float:
    value = parse_duration_s(text, option)
    if not 0 < value <= DEADLINE_MS_MAX / 1e3:
        raise ConfigError(option, text, f"must be above 0 and at most {DEADLINE_MS_MAX // 1000} s")
    return value


def _block_size(text: str, option: str) -> int:
    value = parse_size_bytes(text, option)
    if not BLOCK_STEP_BYTES <= value <= BLOCK_BYTES_MAX or value % BLOCK_STEP_BYTES:
        limit = format_size_bytes(BLOCK_BYTES_MAX)
        raise ConfigError(option, text, f"must be a multiple of {BLOCK_STEP_BYTES}, up to {limit}")
    return value


def _rate(text: str, option: str) -> int:
    value = parse_size_bytes(text, option)
    if not value:
        raise ConfigError(option, text, "must be above 0: bytes a second, as in 200m")
    return value


def _percent(text: str, option: str) -> float:
    match = _PERCENT.fullmatch(text.strip())
    if match is None or float(match[1]) > 100:
        raise ConfigError(option, text, "must be a percentage from 0 to 100, as in 98.7")
    return float(match[1])


def _model(text: str, option: str) -> str:
    if text.lower() not in MODELS:
        raise ConfigError(option, text, f"must be {' or '.join(MODELS)}")
    return text.lower()


def _transports(text: str, option: str) -> tuple[str, ...]:
    choose = _choice(*TRANSPORTS[1:])
    return tuple(choose(part.strip(), option) for part in text.split(","))


def models_text() -> str:
    """The models, with what a token of each takes."""
    return ", ".join(f"{name} {model.token_bytes:,}" for name, model in MODELS.items())


class Option(NamedTuple):
    """One option of a job."""

    parse: Callable[[str, str], Any]
    metavar: str
    help: str

    @property
    def is_flag(self) -> bool:
        """Whether the word alone has a meaning."""
        return self.parse is _flag


OPTIONS: dict[str, Option] = {
    "ioengine": Option(
        _choice("kv", "raw", "null"),
        "kv|raw|null",
        "kv: the client library and a daemon; raw: a bare TCP socket pair on loopback, the limit"
        " of what kv can reach; null: nothing, the cost of this tool itself (kv)",
    ),
    "rw": Option(
        _choice("read", "write", "randread", "randwrite", "rw", "readwrite", "randrw"),
        "KIND",
        "read, write, randread, randwrite, rw, randrw. Reads go through a working set that was"
        " stored before; every write stores blocks under fresh keys (read)",
    ),
    "rwmixread": Option(_number(0, 100), "PERCENT", "reads of rw and randrw (50)"),
    "bs": Option(_block_size, "SIZE", "bytes of a block (1m)"),
    "batch": Option(
        _number(1, KEYS_PER_REQUEST_MAX), "N", "blocks of one I/O: a prefix of its own (16)"
    ),
    "model": Option(
        _model,
        "NAME",
        "blocks of a model's KV-cache: bs and layers follow from it and page_tokens, and replace"
        " those that stand before it; as model=llama-3.1-8b page_tokens=16. Bytes of a token, all"
        f" layers, all tensor-parallel ranks together: {models_text()}",
    ),
    "page_tokens": Option(
        _number(1, PAGE_TOKENS_MAX),
        "N",
        "with model: tokens of a block. 16 are vLLM's pages, 64 those of SGLang and of the DualPath"
        " paper, 256 LMCache's (64)",
    ),
    "size": Option(
        parse_size_bytes, "SIZE", "working set of each clone, and how much it does (2g)"
    ),
    "iodepth": Option(_number(1, IODEPTH_MAX), "N", "I/Os in flight of each clone (2)"),
    "numjobs": Option(
        _number(1, NUMJOBS_MAX), "N", "clones: processes that do the same; reported together (1)"
    ),
    "runtime": Option(parse_duration_s, "TIME", "end after this time even if size is not done"),
    "time_based": Option(_flag, "0|1", "go through size again and again until runtime (0)"),
    "rate": Option(
        _rate,
        "SIZE",
        "bytes a second that each clone begins to move, reads and writes together, as rate=200m:"
        " I/Os begin when they are due and not when others have ended. One that is due while all"
        " iodepth are under way waits, and lat, unlike clat, is counted from when it was due",
    ),
    "rate_iops": Option(
        _number(1, RATE_IOPS_MAX), "N", "the same in I/Os a second of each clone, as rate_iops=50"
    ),
    "rate_process": Option(
        _choice("linear", "poisson"),
        "linear|poisson",
        "with rate or rate_iops: I/Os are due at even distances, or as independent requests come:"
        " rate_iops=50 rate_process=poisson (linear)",
    ),
    "ramp_time": Option(parse_duration_s, "TIME", "run that long before anything is counted (0)"),
    "stonewall": Option(_flag, "0|1", "begin when all jobs before have ended (0: beside them)"),
    "verify": Option(
        _flag,
        "0|1",
        "compare every byte read with what was written, on top of the checksums that the client"
        " verifies; a job that only writes reads back what is still stored (0)",
    ),
    "randseed": Option(_number(0, 2**32 - 1), "N", "seed of contents and of random orders (1)"),
    "hit_rate": Option(
        _percent,
        "PERCENT",
        "of the blocks that are read, how many were stored: the first ones of each prefix; those"
        " behind them are misses. hit_rate=98.7 is the mean of agents' turns (arXiv 2602.21548)."
        " Misses are no bytes and no errors; kv only (100)",
    ),
    "endpoint": Option(
        _endpoints,
        "URI[,URI]",
        "daemons to use, kv only; without it the job starts one with room for size, and it ends"
        " with the job",
    ),
    "relay": Option(
        _endpoints,
        "URI[,URI]",
        "path=relay or auto: agents of other nodes that run already, instead of one that the job"
        " starts; needs endpoint=, the daemons that they read from. Reads of path=relay go by the"
        " first: endpoint=tcp://10.0.0.7:7450 relay=tcp://10.0.0.9:7460 path=relay",
    ),
    "path": Option(
        _choice(*HOPS),
        "|".join(HOPS),
        "how blocks travel, kv only. direct: from the daemon to us; relay: from the daemon to the"
        " agent of another node and from there to us, all of them, reads only; auto: by both, split"
        " as the client's selector decides (policy balanced); agent: by the agent"
        " of our own node, reads and writes; views: not at all, reads only: they are leased where"
        " they lie in a daemon of this host, and given back at once, unread unless verify=1 (the"
        " daemon verifies them; one that is given must be for --pool kvbench alone). The job"
        " starts the agent, on this host, with memory for what is under way and no more, so that"
        " it holds little of what it is asked for: but see held (direct)",
    ),
    "transport": Option(
        _choice(*TRANSPORTS),
        "|".join(TRANSPORTS),
        "what moves the bytes of the hop to us, kv only; bytes that come by another one end the"
        " job. tcp, unix: sockets; shm: memory that the daemon or our agent, on this host, writes"
        " and reads itself; rdma: the same by a network card. A daemon that the job starts listens"
        " on loopback, or in a temporary folder for unix and shm; an agent reaches it in the same"
        " way. path=relay and auto go by tcp or rdma, path=agent by unix or shm. auto: tcp to a"
        " daemon of the job's own, else the best that is offered; results say which (auto)",
    ),
    "require_transport": Option(
        _transports,
        "NAME[,NAME]",
        "with transport=auto: bytes that come by any other end the job, so that a fallback is no"
        " result: endpoint=tcp://10.0.0.7:7450 require_transport=rdma,shm",
    ),
    "verify_checksums": Option(
        _flag,
        "0|1",
        "0: the client does not compare what it reads with the checksums of who wrote it, kv only:"
        " what moving alone costs, never for use. Daemons and agents go on verifying (1)",
    ),
    "layers": Option(_number(1, LAYERS_MAX), "N", "layers of a block, each with a checksum (1)"),
    "layout": Option(
        _choice("block", "layer"),
        "block|layer",
        "where blocks lie in our memory. block: each is one piece; layer: as in the KV tensors of"
        " an engine, one a layer: all blocks' first layers, then all their second ones, so that a"
        " block is scattered into as many pieces as it has layers (block)",
    ),
    "order": Option(
        _choice("block", "layer"), "block|layer", "order in which the bytes of a read come (block)"
    ),
    "group_layers": Option(
        _number(1, LAYERS_MAX),
        "N",
        "order=layer: layers that come together, of all blocks, before the next ones. Results say"
        " as `first` when the first group of an I/O was there, so that an engine could begin:"
        " model=deepseek-v3 order=layer group_layers=8 (1)",
    ),
    "ack": Option(_choice("memory"), "memory", "a write is done when it is in the daemon's memory"),
    "deadline": Option(_deadline, "TIME", "an I/O that takes longer ends the job (5)"),
    "held": Option(
        _flag,
        "0|1",
        "path=agent, relay, auto: the agent has memory for the working set, so that from the second"
        " time on it sends what it holds and asks no daemon (0)",
    ),
    "spin": Option(
        _number(0, SPIN_MAX),
        "N",
        "threads of pure Python that count for ever in each clone's process while it runs, as an"
        " engine's scheduler does: what a busy interpreter costs its fetches. Their processor time"
        " is shown apart and is not the client's (0)",
    ),
    "spin_outside": Option(
        _flag,
        "0|1",
        "they spin in a process beside the clone: what the core that they take costs, without the"
        " interpreter (0)",
    ),
}

__all__ = [
    "HOPS",
    "OPTIONS",
    "TRANSPORTS",
    "Option",
    "models_text",
    "parse_duration_s",
]
