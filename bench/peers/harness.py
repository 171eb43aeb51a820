"""Measures kvstored beside other stores: the same work, the same run, every byte compared.

::

    $ bench/peers/run --trials 5 --json peers.json

For each size of a block all peers are started, each in a process of its own with its server as a
child, and store the blocks that will be read. Then, in every trial and at every depth, they take
turns (in the other order in every second trial): reads for `--seconds`, after a ramp that does
not count, and writes until those took half of that. In the end everything is read once more into
blanked memory and compared byte for byte. All of it ends with this process.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TextIO

from kvstore.errors import ConfigError, KVStoreError
from kvstore.version import VERSION
from kvstore_bench.command import machine
from kvstore_bench.outputs import check_output, writing
from peers.catalogue import LIMIT
from peers.options import Options, parsed_options, parser
from peers.process import Missing, Process, RunFailed
from peers.table import OTHER_CORES_MAX, Cell, size_text, summary, tables, warnings
from peers.worker import busy_s

# The version of what --json writes.
# 1  the first
JSON_VERSION = 1
EXIT_FAILED, EXIT_USAGE, EXIT_SIGNAL = 1, 2, 128

RAMP_SHARE = 0.25
PUT_SHARE = 0.5
# As long as others must leave the machine alone: 25 ticks of its clock.
QUIET_WINDOW_S = 0.25


class Run:
    """One run: its options, and what it found.

    Attributes:
        missing: What has to be installed, by peer.
        failed: Why a peer has no more figures, by peer.
        checked, wrong: Blocks that were compared, and wrong ones among them, by peer.
        repeated: Sections that were measured again, since others used the machine.
    """

    def __init__(self, options: Options, progress: TextIO | None = None) -> None:
        self.options = options
        self.cells: list[Cell] = []
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.checked: dict[str, int] = {}
        self.wrong: dict[str, int] = {}
        self.repeated = 0
        self._patience_s = options.patience_s
        self._progress = progress

    async def measure(self) -> None:
        """All sizes."""
        for entry in self.options.peers:
            if missing := entry.missing(self.options.venvs):
                self.missing[entry.name] = missing
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            for block_bytes in self.options.sizes:
                await self._size(block_bytes, f"{folder}/{block_bytes}-")
        self._say("")

    async def _size(self, block_bytes: int, folder: str) -> None:
        options, work = self.options, self.options.work(block_bytes)
        async with AsyncExitStack() as stack:
            running: list[Process] = []
            for entry in options.peers:
                if entry.name in self.missing or entry.name in self.failed:
                    continue
                self._say(f"{size_text(block_bytes)}: {entry.name} starts")
                process = Process(entry, work, options.venvs, Path(folder + entry.name))
                await stack.enter_async_context(process)
                if await self._open(process):
                    running.append(process)
            for trial in range(1, options.trials + 1):
                turn = running if trial % 2 else running[::-1]
                for depth in options.depths:
                    for process in turn:
                        if process.entry.name not in self.failed:
                            self._say(
                                f"{size_text(block_bytes)}: trial {trial}/{options.trials},"
                                f" depth {depth}: {process.entry.name}"
                            )
                            await self._turn(process, depth, trial)
            for process in running:
                if process.entry.name not in self.failed:
                    self._say(f"{size_text(block_bytes)}: {process.entry.name} is compared")
                    await self._check(process)

    async def _open(self, process: Process) -> bool:
        name = process.entry.name
        try:
            self.versions[name] = (await process.ask("open"))["versions"]
        except Missing as error:
            remedy = f"bench/peers/prepare --venvs {self.options.venvs} {process.entry.venv}"
            self.missing[name] = f"{error} ({remedy})"
            return False
        except RunFailed as error:
            self.failed[name] = str(error)
            return False
        return True

    async def _turn(self, process: Process, depth: int, trial: int) -> None:
        name, seconds = process.entry.name, self.options.seconds
        try:
            ramp_s = RAMP_SHARE * seconds
            get = await self._quietly(process, "get", depth=depth, seconds=seconds, ramp_s=ramp_s)
            put = await self._quietly(process, "put", depth=depth, seconds=PUT_SHARE * seconds)
        except RunFailed as error:
            self.failed[name] = str(error)
            return
        self.cells.append(Cell(name, process.work.block_bytes, depth, trial, get, put))

    async def _quietly(self, process: Process, action: str, **words: float) -> dict[str, Any]:
        """Have a section measured; wait, and measure it again, while others use the machine and
        patience lasts.

        Raises:
            RunFailed: It failed.
        """
        while True:
            while self._patience_s > 0:
                before_s = busy_s()
                await asyncio.sleep(QUIET_WINDOW_S)
                if busy_s() - before_s <= OTHER_CORES_MAX * QUIET_WINDOW_S:
                    break
                self._patience_s -= QUIET_WINDOW_S
            answer = await process.ask(action, **words)
            if "wrong" in answer:
                self._compared(process.entry.name, answer)
            if answer["other_cores"] <= OTHER_CORES_MAX or self._patience_s <= 0:
                return answer
            self._patience_s -= answer["seconds"]
            self.repeated += 1

    async def _check(self, process: Process) -> None:
        name = process.entry.name
        try:
            self._compared(name, await process.ask("check"))
        except RunFailed as error:
            self.failed[name] = str(error)

    def _compared(self, name: str, answer: dict[str, Any]) -> None:
        self.checked[name] = self.checked.get(name, 0) + answer["checked"]
        self.wrong[name] = self.wrong.get(name, 0) + answer["wrong"]

    def _say(self, what: str) -> None:
        if self._progress is not None and self._progress.isatty():
            print(f"\r\033[K{what}", end="", file=self._progress, flush=True)
        elif self._progress is not None and what:
            print(what, file=self._progress, flush=True)

    @property
    def good(self) -> bool:
        """Whether all is there that should be, and every byte right."""
        absent = self.missing if self.options.named else {}
        return not (self.failed or absent or any(self.wrong.values()))

    def text(self) -> str:
        """All of it, for people."""
        lines = [tables(self.cells)]
        lines.append(f"Each at its better depth, of `{LIMIT}` [min–max], CPU-s/GiB:\n")
        lines.append(summary(self.cells))
        if self.repeated:
            lines.append(f"{self.repeated} sections were measured again: see --patience")
        for name, versions in self.versions.items():
            wrong = self.wrong.get(name, 0)
            verdict = f"{self.checked.get(name, 0):,} blocks compared, {wrong} wrong"
            lines.append(f"{name}: {versions}; {verdict}")
        lines += [f"{name}: NOT MEASURED, needs {what}" for name, what in self.missing.items()]
        lines += [f"{name}: FAILED: {why}" for name, why in self.failed.items()]
        return "\n".join([*lines, *warnings(self.cells)])

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        options = self.options
        return {
            "format": "kvbench-peers",
            "version": JSON_VERSION,
            "kvstore": VERSION,
            "machine": machine(),
            "trials": options.trials,
            "seconds": options.seconds,
            "patience_s": options.patience_s,
            "repeated": self.repeated,
            "works": [options.work(size).plain() for size in options.sizes],
            "versions": self.versions,
            "missing": self.missing,
            "failed": self.failed,
            "checked_blocks": self.checked,
            "wrong_blocks": self.wrong,
            "cells": [cell.plain() for cell in self.cells],
        }


class Interrupted(Exception):
    """Raised when a signal ended the run; carries its number."""


async def _until_signal(run: Run) -> None:
    """Measure; SIGTERM is as good as Ctrl-C.

    Raises:
        Interrupted: One of them came.
    """
    task = asyncio.ensure_future(run.measure())
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: all was measured that is installed. 1: a peer failed, gave wrong bytes, or was asked
        for by name and is not installed. 2: a wrong option. 130: interrupted.
    """
    args = parser().parse_args(arguments)
    to_stdout = args.json is not None and str(args.json) == "-"
    try:
        shown = args.eta == "always" or (args.eta == "auto" and sys.stderr.isatty())
        run = Run(parsed_options(args), sys.stderr if shown else None)
        if args.json is not None and not to_stdout:
            check_output("--json", args.json)
        asyncio.run(_until_signal(run))
        # With the figures on standard output, what is for people goes to the other one.
        print(run.text(), file=sys.stderr if to_stdout else sys.stdout)
        text = json.dumps(run.plain(), indent=1) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        elif args.json is not None:
            with writing("--json", args.json) as file:
                file.write(text.encode())
    except (KVStoreError, OSError) as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except Interrupted as error:
        (number,) = error.args
        print(f"peers: {signal.Signals(number).name}: stopped, no results", file=sys.stderr)
        return EXIT_SIGNAL + int(number)
    return 0 if run.good else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
