"""What a run is asked for, on its command line."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.units import parse_size_bytes
from peers.catalogue import BY_NAME, ENTRIES, Entry
from peers.table import OTHER_CORES_MAX
from peers.work import Work

DEPTH_MAX = 64
BATCH_MAX = 256
TRIALS_MAX = 1000
SECONDS_MAX = 60.0
PATIENCE_S_MAX = 24 * 3600.0
SET_BYTES_MAX = 64 * 1024**3
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dualpath-kvstore")


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        sizes: Bytes of a block, each measured by itself.
        depths: Batches under way, each measured by itself.
        read_bytes: What is read.
        write_bytes: What is written in every round.
        patience_s: How long the run may wait in all until others leave the machine alone.
        named: Whether the peers were named, so that none may be missing.
    """

    peers: tuple[Entry, ...]
    venvs: Path
    sizes: tuple[int, ...]
    depths: tuple[int, ...]
    batch: int
    read_bytes: int
    write_bytes: int
    trials: int
    seconds: float
    patience_s: float = 0.0
    named: bool = False

    def work(self, block_bytes: int) -> Work:
        """What is done with blocks of that size."""
        batch_bytes = self.batch * block_bytes
        return Work(
            block_bytes=block_bytes,
            batch=self.batch,
            lanes=max(self.depths),
            read_batches=max(max(self.depths), self.read_bytes // batch_bytes),
            write_batches=max(max(self.depths), self.write_bytes // batch_bytes),
        )


def parsed_options(args: argparse.Namespace) -> Options:
    """What the words on the command line mean.

    Raises:
        ConfigError: One of them means nothing.
    """
    sizes = tuple(dict.fromkeys(parse_size_bytes(word, "--bs") for word in args.bs))
    depths = tuple(dict.fromkeys(args.depth))
    read_bytes = parse_size_bytes(args.set, "--set")
    write_bytes = parse_size_bytes(args.writes, "--writes")
    for option, value, lowest, highest in (
        *(("--bs", size, 8, SET_BYTES_MAX) for size in sizes),
        *(("--depth", depth, 1, DEPTH_MAX) for depth in depths),
        ("--batch", args.batch, 1, BATCH_MAX),
        ("--set", read_bytes, 1, SET_BYTES_MAX),
        ("--writes", write_bytes, 1, SET_BYTES_MAX),
        ("--trials", args.trials, 1, TRIALS_MAX),
        ("--seconds", args.seconds, 0.001, SECONDS_MAX),
        ("--patience", args.patience, 0, PATIENCE_S_MAX),
    ):
        if not lowest <= value <= highest:
            raise ConfigError(option, value, f"is {lowest:,} to {highest:,}")
    if any(size % 8 for size in sizes):
        raise ConfigError("--bs", " ".join(args.bs), "is a multiple of 8")
    unknown = [name for name in args.peers or () if name not in BY_NAME]
    if unknown:
        raise ConfigError("--peers", " ".join(unknown), f"are some of {', '.join(BY_NAME)}")
    peers = tuple(e for e in ENTRIES if not args.peers or e.name in args.peers)
    return Options(
        peers=peers,
        venvs=args.venvs,
        sizes=sizes,
        depths=depths,
        batch=args.batch,
        read_bytes=read_bytes,
        write_bytes=write_bytes,
        trials=args.trials,
        seconds=args.seconds,
        patience_s=args.patience,
        named=bool(args.peers),
    )


def parser() -> argparse.ArgumentParser:
    """The words that there are."""
    made = argparse.ArgumentParser(
        prog="bench/peers/run",
        description="Measure kvstored beside Redis, memcached, Mooncake Store and LMCache: the"
        " same blocks in the same run, every byte compared. How each is driven, and why so:"
        " bench/peers/README.md. Whatever else runs on the machine goes into the figures.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--trials", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--seconds", type=float, default=1.0, metavar="S", help="of reads (default: %(default)s)")
    add(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="wait so long in all for others to leave the machine alone, and measure again what"
        f" they were in the way of: {OTHER_CORES_MAX} of a core or more (default: not at all)",
    )
    add("--bs", nargs="+", default=["1MiB", "64KiB"], metavar="SIZE", help="of a block")
    add("--batch", type=int, default=16, metavar="N", help="blocks of one (default: %(default)s)")
    add("--depth", type=int, nargs="+", default=[1, 2], metavar="N", help="batches under way")
    add("--set", default="512MiB", metavar="SIZE", help="what is read (default: %(default)s)")
    add("--writes", default="256MiB", metavar="SIZE", help="what is written a round (%(default)s)")
    add("--peers", nargs="+", metavar="NAME", help=f"some of {' '.join(BY_NAME)}")
    add(
        "--venvs",
        type=Path,
        default=CACHE / "peers",
        metavar="DIR",
        help="where `prepare` made their environments (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="all figures; - for stdout")
    add("--eta", choices=("auto", "always", "never"), default="auto", help="what is done now")
    return made
