"""`kvbench simulate`: hit rates of eviction policies over recorded requests."""

from kvstore_bench.simulate.command import add_simulate_parser

__all__ = ["add_simulate_parser"]
