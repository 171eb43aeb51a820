"""Regions of clients: whether anybody writes into one after its owner, and which are mapped."""

from __future__ import annotations

import gc
import threading

from kvstore_client import Region
from tests.support.memorypeer import mappings

STAIN = 0xA5
#: What the kernel calls the memory of a region.
NAME = "kvstore-region"


def stain(region: Region) -> None:
    """Use memory that is ours again for something else."""
    region.view[:] = bytes([STAIN]) * region.size_bytes


def stained(region: Region) -> bool:
    """Whether nobody has written there since."""
    return bytes(region.view) == bytes([STAIN]) * region.size_bytes


def mapped() -> list[str]:
    """Regions that are mapped in this process, by a client or by a daemon."""
    gc.collect()  # handles and their jobs know each other
    for thread in threading.enumerate():
        if thread.name == "unmap":
            thread.join()
    return mappings("self", NAME)
