"""What a job is: options in fio's words. Pure.

Rule: an option that is listed here works, and one that works is listed here. The words and
their meaning are fio's (fio.readthedocs.io) wherever fio has them; `batch`, `layers`, `order`,
`ack`, `path`, `transport`, `verify_checksums`, `endpoint`, `deadline`, `held`, `spin` and
`spin_outside` are ours.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.layout import BLOCK_BYTES_MAX, LAYERS_MAX
from kvstore.messages import DEADLINE_MS_MAX, KEYS_PER_REQUEST_MAX
from kvstore.units import format_size_bytes, parse_size_bytes

# More than one job writes at once into as many buffers, and each clone is a process.
IODEPTH_MAX = 1024
NUMJOBS_MAX = 64
# Of one job. A thread more that spins changes nothing but whose turn it is.
SPIN_MAX = 8
# Blocks are stamped a word at a time.
BLOCK_STEP_BYTES = 8

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h|d)?")
_DURATION_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

#: What moves payload, as the client knows it.
TRANSPORTS = ("auto", "tcp", "unix", "shm", "rdma")
# What the hop to us may go by, on each path.
_HOPS = {
    "direct": TRANSPORTS,
    "relay": ("auto", "tcp", "rdma"),
    "agent": ("auto", "unix", "shm"),
    "views": ("auto", "shm"),
}
_HOP_REASONS = {
    "relay": "another node's agent is reached over the network",
    "agent": "the agent of this node listens on a unix socket",
    "views": "blocks are read where they lie, in memory that this process has mapped",
}
_READ_ONLY_REASONS = {
    "relay": "what is written goes to the daemon",
    "views": "nobody may write where a daemon keeps its blocks",
}

#: Where an option was given that stood in no file.
COMMAND_LINE = "command line"


class JobError(ConfigError):
    """Raised for an option of a job that cannot be; says where it was given.

    Attributes:
        where: File, line and section, or `COMMAND_LINE`.
    """

    def __init__(self, where: str, option: str, value: object, remedy: str) -> None:
        super().__init__(option, value, remedy)
        self.where = where

    def __str__(self) -> str:
        if self.where == COMMAND_LINE:
            return f"--{self.option}={self.value}: {self.remedy}"
        return f"{self.where}: {self.option}={self.value}: {self.remedy}"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job, all options decided. Sizes in bytes, times in seconds.

    Attributes:
        name: What reports call it.
        given: The options as they were written, for reports.
    """

    name: str
    ioengine: str = "kv"
    rw: str = "read"
    rwmixread: int = 50
    bs: int = 1024 * 1024
    batch: int = 16
    size: int = 2 * 1024**3
    iodepth: int = 2
    numjobs: int = 1
    runtime: float = 0.0
    time_based: bool = False
    ramp_time: float = 0.0
    stonewall: bool = False
    verify: bool = False
    randseed: int = 1
    endpoint: tuple[str, ...] = ()
    path: str = "direct"
    transport: str = "auto"
    verify_checksums: bool = True
    layers: int = 1
    order: str = "block"
    ack: str = "memory"
    deadline: float = 5.0
    held: bool = False
    spin: int = 0
    spin_outside: bool = False
    given: tuple[tuple[str, str], ...] = ()

    @property
    def io_bytes(self) -> int:
        """Bytes of one I/O."""
        return self.bs * self.batch

    @property
    def io_count(self) -> int:
        """I/Os that go through `size` once."""
        return self.size // self.io_bytes

    @property
    def reads(self) -> bool:
        """Whether some of its I/Os are reads."""
        return self.rw not in ("write", "randwrite")

    @property
    def writes(self) -> bool:
        """Whether some of its I/Os are writes."""
        return self.rw not in ("read", "randread")

    @property
    def client_transport(self) -> str:
        """What its clients are told to use.

        A daemon that is started for a job without a word about transports is reached by TCP, as
        ever, so that results stay comparable.
        """
        if self.path == "views":
            return "shm"
        ours = self.transport == "auto" and not self.endpoint and self.path != "agent"
        return "tcp" if ours else self.transport

    @property
    def random(self) -> bool:
        """Whether its I/Os go through `size` in random order."""
        return self.rw.startswith("rand")


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
    "size": Option(
        parse_size_bytes, "SIZE", "working set of each clone, and how much it does (2g)"
    ),
    "iodepth": Option(_number(1, IODEPTH_MAX), "N", "I/Os in flight of each clone (2)"),
    "numjobs": Option(
        _number(1, NUMJOBS_MAX), "N", "clones: processes that do the same; reported together (1)"
    ),
    "runtime": Option(parse_duration_s, "TIME", "end after this time even if size is not done"),
    "time_based": Option(_flag, "0|1", "go through size again and again until runtime (0)"),
    "ramp_time": Option(parse_duration_s, "TIME", "run that long before anything is counted (0)"),
    "stonewall": Option(_flag, "0|1", "begin when all jobs before have ended (0: beside them)"),
    "verify": Option(
        _flag,
        "0|1",
        "compare every byte read with what was written, on top of the checksums that the client"
        " verifies; a job that only writes reads back what is still stored (0)",
    ),
    "randseed": Option(_number(0, 2**32 - 1), "N", "seed of contents and of random orders (1)"),
    "endpoint": Option(
        _endpoints,
        "URI[,URI]",
        "daemons to use, kv only; without it the job starts one with room for size, and it ends"
        " with the job",
    ),
    "path": Option(
        _choice(*_HOPS),
        "|".join(_HOPS),
        "how blocks travel, kv only. direct: from the daemon to us; relay: from the daemon to the"
        " agent of another node and from there to us, all of them, reads only; agent: by the agent"
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
        " way. path=relay goes by tcp or rdma, path=agent by unix or shm. auto: tcp to a daemon of"
        " the job's own, else the best that is offered; results say which (auto)",
    ),
    "verify_checksums": Option(
        _flag,
        "0|1",
        "0: the client does not compare what it reads with the checksums of who wrote it, kv only:"
        " what moving alone costs, never for use. Daemons and agents go on verifying (1)",
    ),
    "layers": Option(_number(1, LAYERS_MAX), "N", "layers of a block, each with a checksum (1)"),
    "order": Option(
        _choice("block", "layer"), "block|layer", "order in which the bytes of a read come (block)"
    ),
    "ack": Option(_choice("memory"), "memory", "a write is done when it is in the daemon's memory"),
    "deadline": Option(_deadline, "TIME", "an I/O that takes longer ends the job (5)"),
    "held": Option(
        _flag,
        "0|1",
        "path=agent and relay: the agent has memory for the working set, so that from the second"
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


class Assignment(NamedTuple):
    """One option as it was written somewhere."""

    where: str
    option: str
    value: str


def known(assignment: Assignment) -> Assignment:
    """The same assignment, if there is such an option.

    Raises:
        JobError: There is none; names those that are.
    """
    where, option, value = assignment
    if option not in OPTIONS:
        close = difflib.get_close_matches(option, OPTIONS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        remedy = f"no such option; {meant}there are {', '.join(OPTIONS)}"
        raise JobError(where, option, value, remedy)
    return assignment


def build_job(name: str, assignments: Sequence[Assignment]) -> Job:
    """Decide all options of a job; of an option given twice the last one counts.

    Raises:
        JobError: Names where, the option, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    sources: dict[str, Assignment] = {}
    for where, option, text in assignments:
        known(Assignment(where, option, text))
        try:
            if not text and not OPTIONS[option].is_flag:
                raise ConfigError(option, text, f"needs a value: {OPTIONS[option].metavar}")
            values[option] = OPTIONS[option].parse(text, option)
        except ConfigError as error:
            raise JobError(where, error.option, error.value, error.remedy) from error
        sources[option] = Assignment(where, option, text)
    if values.get("rw") == "readwrite":
        values["rw"] = "rw"
    given = tuple((option, text or "1") for option, (_, _, text) in sources.items())
    job = Job(name=name, given=given, **values)
    _check_together(job, sources)
    return job


def _check_together(job: Job, sources: Mapping[str, Assignment]) -> None:
    """Refuse options that are right alone and wrong together."""

    def refuse(option: str, value: object, remedy: str) -> None:
        where, _, text = sources.get(option, Assignment(f"[{job.name}]", option, str(value)))
        raise JobError(where, option, text, remedy)

    if job.io_count < 1:
        needed = format_size_bytes(job.io_bytes)
        refuse("size", format_size_bytes(job.size), f"must hold one I/O: bs * batch = {needed}")
    if job.time_based and not job.runtime:
        refuse("time_based", 1, "needs runtime=TIME")
    if job.bs % job.layers:
        refuse("layers", job.layers, f"must divide bs={job.bs}: layers are equally large")
    if job.verify and job.ioengine != "kv":
        refuse("verify", 1, f"ioengine={job.ioengine} stores nothing that could be compared")
    if job.ioengine == "raw" and job.rw not in ("read", "write"):
        refuse("rw", job.rw, "must be read or write: raw is one stream of bytes in order")
    if job.spin_outside and not job.spin:
        refuse("spin_outside", 1, "needs spin=N")
    if job.ioengine != "kv":  # the others have no paths
        return
    if job.transport not in _HOPS[job.path]:
        reason = f"path={job.path} goes by {' or '.join(_HOPS[job.path][1:])}"
        refuse("transport", job.transport, f"{reason}: {_HOP_REASONS[job.path]}")
    if job.path in _READ_ONLY_REASONS and job.writes:
        reason = _READ_ONLY_REASONS[job.path]
        refuse("rw", job.rw, f"path={job.path} carries reads only: {reason}")
    if job.held and job.path in ("direct", "views"):
        refuse("held", 1, f"path={job.path} has no agent that could hold anything")
    if job.path == "views" and job.order == "layer":
        refuse("order", job.order, "path=views has all layers of a block at once")
