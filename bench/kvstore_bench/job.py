"""What a job is: options decided, and refused where they cannot be together. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec

from kvstore.errors import ConfigError
from kvstore.units import format_size_bytes
from kvstore_bench.models import MODELS
from kvstore_bench.options import BLOCK_STEP_BYTES, HOPS, OPTIONS

# Of a block, where a model is given: what SGLang and the DualPath paper use.
PAGE_TOKENS = 64
# An I/O that is due more seldom than this is nothing that a job waits for.
IO_INTERVAL_MAX_S = 5.0

_HOP_REASONS = {
    "relay": "another node's agent is reached over the network",
    "auto": "another node's agent is reached over the network",
    "agent": "the agent of this node listens on a unix socket",
    "views": "blocks are read where they lie, in memory that this process has mapped",
}
_READ_ONLY_REASONS = {
    "relay": "what is written goes to the daemon",
    "views": "nobody may write where a daemon keeps its blocks",
}
# What follows from a model.
_OF_MODEL = ("bs", "layers")

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
    model: str = ""
    page_tokens: int = PAGE_TOKENS
    size: int = 2 * 1024**3
    iodepth: int = 2
    numjobs: int = 1
    runtime: float = 0.0
    time_based: bool = False
    rate: int = 0
    rate_iops: int = 0
    rate_process: str = "linear"
    ramp_time: float = 0.0
    stonewall: bool = False
    verify: bool = False
    randseed: int = 1
    hit_rate: float = 100.0
    endpoint: tuple[str, ...] = ()
    relay: tuple[str, ...] = ()
    path: str = "direct"
    transport: str = "auto"
    require_transport: tuple[str, ...] = ()
    verify_checksums: bool = True
    layers: int = 1
    layout: str = "block"
    order: str = "block"
    group_layers: int = 1
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
    def io_interval_s(self) -> float:
        """Mean seconds from I/O to I/O of a clone; 0 if one begins when another has ended."""
        if self.rate_iops:
            return 1 / self.rate_iops
        return self.io_bytes / self.rate if self.rate else 0.0

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
    # In the order in which the last value of each was given.
    sources: dict[str, Assignment] = {}
    for where, option, text in assignments:
        known(Assignment(where, option, text))
        try:
            if not text and not OPTIONS[option].is_flag:
                raise ConfigError(option, text, f"needs a value: {OPTIONS[option].metavar}")
            values[option] = OPTIONS[option].parse(text, option)
        except ConfigError as error:
            raise JobError(where, error.option, error.value, error.remedy) from error
        sources.pop(option, None)
        sources[option] = Assignment(where, option, text)
    if values.get("rw") == "readwrite":
        values["rw"] = "rw"
    _apply_model(values, sources)
    given = tuple((option, text or "1") for option, (_, _, text) in sources.items())
    job = Job(name=name, given=given, **values)
    _check_together(job, sources)
    return job


def _apply_model(values: dict[str, Any], sources: dict[str, Assignment]) -> None:
    """Let a model decide what follows from it, instead of what was said before.

    Raises:
        JobError: Something else was said after it; tokens of a page are given without it.
    """
    if "model" not in values:
        if "page_tokens" in values:
            where, option, text = sources["page_tokens"]
            raise JobError(where, option, text, "needs model=NAME, whose tokens they are")
        return
    order = list(sources)
    for option in _OF_MODEL:
        if option not in sources:
            continue
        where, _, text = sources[option]
        if order.index(option) > order.index("model"):
            remedy = f"follows from model={values['model']} before it; leave one of them out"
            raise JobError(where, option, text, remedy)
        del sources[option]
    model = MODELS[values["model"]]
    tokens = values.get("page_tokens", PAGE_TOKENS)
    where, _, text = sources["model"]
    values["layers"] = model.layers
    try:
        values["bs"] = OPTIONS["bs"].parse(str(model.token_bytes * tokens), "bs")
    except ConfigError as error:
        remedy = f"blocks of {tokens} tokens (page_tokens) have {error.value} bytes: {error.remedy}"
        raise JobError(where, "model", text, remedy) from error


_Refuse = Callable[[str, object, str], NoReturn]


def _check_together(job: Job, sources: Mapping[str, Assignment]) -> None:
    """Refuse options that are right alone and wrong together."""

    def refuse(option: str, value: object, remedy: str) -> NoReturn:
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
    _check_rate(job, refuse)
    if job.ioengine == "kv":  # the others have no paths
        _check_paths(job, refuse)


def _check_rate(job: Job, refuse: _Refuse) -> None:
    if job.rate and job.rate_iops:
        refuse("rate_iops", job.rate_iops, "rate says the same in bytes; leave one of them out")
    option = "rate" if job.rate else "rate_iops"
    if job.io_interval_s and job.ioengine == "raw":
        refuse(option, "", "ioengine=raw is the limit of this host: it goes as fast as it can")
    if job.io_interval_s > IO_INTERVAL_MAX_S:
        seconds = f"{job.io_interval_s:.0f} s; at most {IO_INTERVAL_MAX_S:.0f} s"
        refuse(
            option, "", f"an I/O of {format_size_bytes(job.io_bytes)} would be due every {seconds}"
        )
    if job.rate_process != "linear" and not job.io_interval_s:
        refuse("rate_process", job.rate_process, "needs rate=SIZE or rate_iops=N")


def _check_paths(job: Job, refuse: _Refuse) -> None:
    if job.transport not in HOPS[job.path]:
        reason = f"path={job.path} goes by {' or '.join(HOPS[job.path][1:])}"
        refuse("transport", job.transport, f"{reason}: {_HOP_REASONS[job.path]}")
    if job.require_transport and job.transport != "auto":
        remedy = f"transport={job.transport} requires it already; leave one of them out"
        refuse("require_transport", "", remedy)
    if job.require_transport and not job.endpoint and job.path in ("direct", "relay", "auto"):
        remedy = "needs endpoint=URI: transport=NAME decides for a daemon of the job's own"
        refuse("require_transport", "", remedy)
    if not set(job.require_transport) <= set(HOPS[job.path]):
        refuse(
            "require_transport", "", f"path={job.path} goes by {' or '.join(HOPS[job.path][1:])}"
        )
    if job.path in _READ_ONLY_REASONS and job.writes:
        reason = _READ_ONLY_REASONS[job.path]
        refuse("rw", job.rw, f"path={job.path} carries reads only: {reason}")
    if job.relay and job.path not in ("relay", "auto"):
        refuse("relay", "", f"path={job.path} goes by no agent of another node")
    if job.relay and not job.endpoint:
        refuse("relay", "", "needs endpoint=URI: an agent that runs reads from daemons that run")
    if job.held and job.path in ("direct", "views"):
        refuse("held", 1, f"path={job.path} has no agent that could hold anything")
    if job.held and job.relay:
        refuse("held", 1, "the agents of relay=URI have the memory that they were given")
    if job.path == "views" and job.order == "layer":
        refuse("order", job.order, "path=views has all layers of a block at once")
    _check_layout(job, refuse)


def _check_layout(job: Job, refuse: _Refuse) -> None:
    if job.group_layers > 1 and job.order != "layer":
        refuse("group_layers", job.group_layers, "needs order=layer")
    if job.group_layers > job.layers:
        refuse("group_layers", job.group_layers, f"a block has {job.layers} layers")
    if job.layout == "block":
        return
    if job.path == "views":
        refuse("layout", job.layout, "path=views leaves blocks in the daemon's memory")
    if job.layers == 1:
        refuse(
            "layout", job.layout, "a block of one layer is one piece; give layers=N or model=NAME"
        )
    if job.bs // job.layers % BLOCK_STEP_BYTES:
        remedy = f"layers of {job.bs // job.layers} bytes are no multiple of {BLOCK_STEP_BYTES}"
        refuse("layout", job.layout, remedy)
