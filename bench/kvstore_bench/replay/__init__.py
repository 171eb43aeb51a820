"""`kvbench replay`: recorded requests against real daemons, every byte checked."""

from kvstore_bench.replay.command import add_replay_parser

__all__ = ["add_replay_parser"]
