"""Ends of connections for tests of verbs: memory, a rail and queue pairs, and waiting for them.

As a program (`python -m tests.support.verbsends`) it is a peer in another process: it prints
where it is as one line of JSON, connects to the address that comes as a line, says "ready",
and stays until its input ends or it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.buffers import Region
from kvstore.transport.verbs import (
    Completion,
    Opcode,
    Piece,
    QueueAddress,
    QueuePair,
    QueueSetup,
    QueueTuning,
    Rail,
    RailSetup,
    Verbs,
    Work,
)
from tests.support.fakeverbs import VARIABLE, FakeVerbs

# A test that waits this long for what should take a moment has failed.
PATIENCE_S = 30.0
MEMORY_BYTES = 1024 * 1024
SETUP = QueueSetup(sends_max=300, receives_max=64, pieces_max=4)
# A peer that does not answer is given up after about a quarter of a second.
TUNING = QueueTuning(timeout=13, retry_count=3)


def the_verbs() -> Verbs:
    """Those that the environment chooses."""
    directory = os.environ.get(VARIABLE)
    if directory:
        return FakeVerbs(Path(directory))
    from kvstore.transport.pyverbs_layer import PyVerbs

    return PyVerbs()


def rail_setups(verbs: Verbs) -> list[RailSetup]:
    """One for each active port that has an IPv4 gid, or any."""
    found = []
    for device in verbs.devices():
        for port in device.ports:
            gids = sorted(port.gids, key=lambda gid: not gid.is_ipv4)
            if port.active and gids:
                found.append(RailSetup(device.name, port.number, gids[0].number))
    return found


def address_of(view: memoryview) -> int:
    """Where memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Far(NamedTuple):
    """What a peer must know of an end to reach its memory."""

    queue: QueueAddress
    address: int
    rkey: int


class End:
    """A rail with registered memory and a queue pair.

    Attributes:
        view: The memory.
        far: What a peer must know.
        found: Completions that were polled and that nobody has asked for yet.
    """

    def __init__(
        self,
        verbs: Verbs,
        setup: RailSetup,
        queue: QueueSetup = SETUP,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._parts = contextlib.ExitStack()
        self.memory = Region(memory_bytes, "test")
        self._parts.callback(self.memory.close)
        self.view = self.memory.view
        self.address = address_of(self.view)
        self.rail: Rail = verbs.open(setup)
        self._parts.callback(self.rail.close)
        self.region = self.rail.register(
            self.address, memory_bytes, remote_write=True, remote_read=True
        )
        self.queue: QueuePair = self.rail.queue_pair(queue)
        self.far = Far(self.queue.address(), self.address, self.region.rkey)
        self.found: list[Completion] = []

    def piece(self, offset: int, length: int) -> Piece:
        """Some of its memory."""
        return Piece(self.address + offset, length, self.region.lkey)

    def post(self, *works: Work) -> None:
        """Post work on its queue pair."""
        self.queue.post(works)

    def take(self, count: int) -> list[Completion]:
        """So many completions, as soon as they are there; waits as an event loop does."""
        end = time.monotonic() + PATIENCE_S
        while len(self.found) < count:
            batch = self.rail.poll()
            self.found += batch
            if not batch and len(self.found) < count:
                left_s = max(0.0, end - time.monotonic())
                ready = select.select([self.rail], [], [], left_s)[0]
                assert ready, f"{len(self.found)} of {count} completions: {self.found}"
        taken, self.found = self.found[:count], self.found[count:]
        return taken

    def close(self) -> None:
        """Close everything."""
        self._parts.close()


def write(near: End, far: Far, offset: int, length: int, **more: int | bool) -> Work:
    """A signalled write of memory to the same offset over there."""
    return work(near, far, Opcode.WRITE, offset, length, **more)


def work(near: End, far: Far, opcode: Opcode, offset: int, length: int, **more: int | bool) -> Work:
    """A signalled request between the same offsets of both memories."""
    made = Work(
        id=offset,
        opcode=opcode,
        pieces=[near.piece(offset, length)] if length else [],
        remote_address=far.address + offset,
        rkey=far.rkey,
        signalled=True,
    )
    return made._replace(**more)  # type: ignore[arg-type]


def connect(near: End, far: End, tuning: QueueTuning = TUNING) -> None:
    """Connect two ends to each other."""
    near.queue.connect(far.queue.address(), tuning)
    far.queue.connect(near.queue.address(), tuning)


@contextlib.contextmanager
def connected(verbs: Verbs, setup: RailSetup, **options: object) -> Iterator[tuple[End, End]]:
    """Two connected ends on the same port."""
    with contextlib.ExitStack() as stack:
        ends = []
        for _ in range(2):
            end = End(verbs, setup, **options)  # type: ignore[arg-type]
            stack.callback(end.close)
            ends.append(end)
        near, far = ends
        connect(near, far)
        yield near, far


def statuses(completions: Sequence[Completion]) -> list[int]:
    """How they have ended."""
    return [completion.status for completion in completions]


def main() -> None:
    """Be a peer."""
    verbs = the_verbs()
    end = End(verbs, RailSetup(*json.loads(sys.argv[1])))
    print(json.dumps(end.far), flush=True)
    end.queue.connect(QueueAddress(*json.loads(sys.stdin.readline())), TUNING)
    print("ready", flush=True)
    sys.stdin.read()
    end.close()


if __name__ == "__main__":
    main()
