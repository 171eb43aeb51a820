"""The command `kvbench run`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore_bench.fiojson import as_json
from kvstore_bench.job import Job
from kvstore_bench.jobfile import assemble, groups
from kvstore_bench.options import OPTIONS
from kvstore_bench.outputs import check_output, write_output
from kvstore_bench.progress import ProgressLine, Quiet
from kvstore_bench.report import as_text, describe
from kvstore_bench.runner import JobResult, Watcher, run_jobs
from kvstore_bench.trials import summarize, summary_text, unstable

TRIALS_MAX = 1000
_FORMATS = ("normal", "json", "json+")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

EXAMPLES = """
examples:
  kvbench run limits.ini
      the data path beside a bare socket pair; starts its own daemon
  kvbench run limits.ini --trials=5 --output-format=json --output=limits.json
      five trials in turn, medians and ratios to the job raw
  kvbench run limits.ini --section=kv-read --runtime=2s --size=256m
      one job of a file, some of its options replaced
  kvbench run --name=a --rw=randread --bs=64k --batch=64 --size=512m --verify=1
      a job without a file: every byte is compared with what was written
  kvbench run shm.ini --trials=3
      the ways from a daemon on the same host: tcp, unix sockets, shared memory
  kvbench run busy.ini --trials=3
      what fetches keep while a thread of pure Python spins in the engine's process
  kvbench run --rw=randread --size=512m --stonewall --name=tcp --transport=tcp \\
              --name=relay --transport=tcp --path=relay --name=agent --transport=shm --path=agent
      straight, by another node's agent, and by our own: the job starts what it needs, and the
      lines "transport" and "path" of the results say how the bytes came
  kvbench run --name=a --model=llama-3.1-8b --page_tokens=16 --batch=128 --rw=randread \\
              --layout=layer --order=layer --hit_rate=98.7 --size=2g --verify=1
      blocks of a model, 2,048 tokens a fetch into one tensor a layer, 98.7 % of them stored
  kvbench run --name=a --rw=randread --rate_iops=50 --rate_process=poisson --iodepth=8 \\
              --runtime=10 --time_based
      fifty fetches a second that come as requests do; latencies from when each was due
  kvbench run --name=a --endpoint=tcp://10.0.0.7:7450 --relay=tcp://10.0.0.9:7460 --path=auto \\
              --require_transport=rdma
      daemon and agent run already: both paths, as the selector decides, and nothing but RDMA
  kvbench run --endpoint=tcp://10.0.0.7:7450 --size=8g --name=fill --rw=write \\
              --name=load --rw=randread --numjobs=4 --runtime=30 --time_based --stonewall
      two jobs one after the other, against a daemon that runs already

A job file is fio's: [global] and one [section] a job, option=value, # or ; before a comment.
JOBFILE is a path, or the name of a file that came with kvbench (busy.ini, layers.ini, limits.ini,
model.ini, poisson.ini, rdma.ini, shm.ini, small.ini).
Options in front of the first --name hold for all jobs and replace what a file says. Jobs run
at the same time; stonewall makes a job wait for those before it, and begins a group. The
clones of a job (numjobs) are reported together. Sizes: k = 1024. Times: seconds.

fio's options and JSON mean what they mean there, but for a few: an I/O is a batch of blocks, and
rate counts reads and writes together. `kvbench compare` says how two results differ, `kvbench
plot` draws one; fio's own fio_jsonplus_clat2csv reads json+.

With --trials a job is compared with the first job of ioengine=raw that has the same bs and
batch; without one it has no ratio, nor has a job with a rate. A job with spin=N is compared with
the first that is the same without it. If that raw job itself is more than 10 % off its median in
some trial, a warning says so: the machine was too busy for its ratios to mean much.

exit status: 0 all jobs ran; 1 a job failed, or read wrong bytes; 2 an option cannot be;
130 after Ctrl-C, 143 after SIGTERM. No process is left behind.
"""


class _Assign(argparse.Action):
    """Keeps options in the order in which they stand: those after --name belong to it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.words = [*namespace.words, (self.dest.removeprefix("job_"), values)]


def add_run_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run` to the commands of `kvbench`."""
    parser = subparsers.add_parser(
        "run",
        help="run fio-style jobs against daemons, and against the limit of this host",
        usage="kvbench run [JOBFILE ...] [--name=NAME --rw=KIND --bs=SIZE ...] [option ...]",
        description="Run jobs in fio's words: reads and writes of blocks of KV-cache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", metavar="JOBFILE", help="job files")
    output = parser.add_argument_group("what to run, and where the results go")
    for flag, metavar, default, text in (
        ("--trials", "N", "1", "run all jobs in turn N times; adds medians and ratios (1)"),
        ("--output", "FILE", "", "write results to a file, at the end, instead of standard output"),
        ("--output-format", "|".join(_FORMATS), "normal", "json+ adds all buckets (normal)"),
    ):
        output.add_argument(flag, metavar=metavar, default=default, help=text)
    output.add_argument(
        "--section",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this job; may be given again",
    )
    output.add_argument(
        "--eta",
        choices=("auto", "always", "never"),
        default="auto",
        help="show progress: auto does on a terminal",
    )
    options = parser.add_argument_group("options of jobs, in files and here (default)")
    options.add_argument("--name", action=_Assign, dest="job_name", help="begins a job")
    for name, option in OPTIONS.items():
        options.add_argument(
            f"--{name}",
            action=_Assign,
            dest=f"job_{name}",
            metavar=option.metavar,
            help=option.help.replace("%", "%%"),
        )
    parser.set_defaults(run=run, words=[])


def flags_with_values(arguments: Sequence[str]) -> list[str]:
    """`--time_based` alone means `--time_based=1`, as in fio; argparse would take the next word."""
    flags = {f"--{name}" for name, option in OPTIONS.items() if option.is_flag}
    return [f"{word}=1" if word in flags else word for word in arguments]


def run(args: argparse.Namespace) -> int:
    """Run what the arguments say; the exit status.

    Raises:
        ConfigError: An option, or a job file, cannot be.
        OutputError: The results could not be written.
    """
    trials = _trials(args.trials)
    if args.output_format not in _FORMATS:
        raise ConfigError("--output-format", args.output_format, f"must be {' or '.join(_FORMATS)}")
    jobs = assemble([_job_file(name) for name in args.files], args.words, args.section)
    output = Path(args.output) if args.output else None
    if output is not None:
        check_output("--output", output)
    head = ""
    if args.output_format == "normal":
        head = "".join(
            f"{describe(job, n)}\n" for n, group in enumerate(groups(jobs)) for job in group
        )
    if output is None:
        print(head, end="", flush=True)
    show = args.eta == "always" or (args.eta == "auto" and sys.stderr.isatty())
    watcher = ProgressLine(sys.stderr, trials) if show else Quiet(sys.stderr)
    try:
        results = asyncio.run(_until_signal(jobs, trials, watcher))
    except Interrupted as interrupt:
        print(f"{os.linesep if show else ''}kvbench run: {interrupt}", file=sys.stderr)
        return 128 + interrupt.number
    text = _result_text(results, trials, args.output_format)
    if output is None:
        print(text, end="")
    else:
        write_output("--output", output, (head + text).encode())
    if args.output_format != "normal" or output is not None:
        _report_on_stderr(results, trials)
    return 1 if any(result.error for result in results) else 0


def _result_text(results: Sequence[JobResult], trials: int, kind: str) -> str:
    summary = summarize(results) if trials > 1 else []
    if kind == "normal":
        text = "\n" + as_text(results, trials)
        return text + ("\n" + summary_text(summary) if summary else "")
    document = as_json(results, time.time(), machine(), kind == "json+")
    if summary:
        document |= {"summary": summary, "warnings": unstable(summary)}
    return json.dumps(document, indent=2) + "\n"


def _report_on_stderr(results: Sequence[JobResult], trials: int) -> None:
    """What somebody should see who sees no text of the results."""
    for result in results:
        if result.error:
            print(f"kvbench run: {result.job.name}: {result.error}", file=sys.stderr)
    for warning in unstable(summarize(results)) if trials > 1 else []:
        print(f"kvbench run: {warning}", file=sys.stderr)


class Interrupted(Exception):
    """A signal has ended the run.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped, no results")
        self.number = number


async def _until_signal(jobs: Sequence[Job], trials: int, watcher: Watcher) -> list[JobResult]:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run_jobs(jobs, trials, watcher))
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def machine() -> dict[str, Any]:
    """What the results depend on beside our own code."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model or platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _trials(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= TRIALS_MAX):
        raise ConfigError("--trials", text, f"must be a whole number from 1 to {TRIALS_MAX}")
    return int(text)


def _job_file(name: str) -> tuple[str, str]:
    """Name and text of a job file; the ones that came with us are found by name."""
    candidates = [Path(name)]
    if Path(name).name == name:
        with_suffix = name if name.endswith(".ini") else f"{name}.ini"
        candidates += [directory / with_suffix for directory in _job_directories()]
    for path in candidates:
        if path.is_file():
            try:
                return str(path), path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError("JOBFILE", name, f"cannot be read: {error}") from error
    raise ConfigError("JOBFILE", name, f"no such file; ours are {', '.join(_own_job_files())}")


def _job_directories() -> list[Path]:
    """bench/jobs of a checkout; of an installation, where setup.cfg puts them."""
    checkout = Path(__file__).resolve().parents[1] / "jobs"
    return [checkout, Path(sysconfig.get_path("data")) / "share" / "dualpath-kvstore" / "jobs"]


def _own_job_files() -> list[str]:
    found = {path.name for directory in _job_directories() for path in directory.glob("*.ini")}
    return sorted(found) or ["not installed"]
