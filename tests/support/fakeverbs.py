"""Verbs without a device: the interface of `kvstore.transport.verbs` over memory and sockets.

All processes that make `FakeVerbs` of one directory are on one network. What a device does is
done by `tests.support.fakedevice`; here are the devices there are, and what a test does to all
of them together, in whichever process they are:

::

    fake = FakeVerbs(directory)
    fake.hold()             # when this returns, no byte moves any more, in any process
    ...                     # work is posted, and waits: fake.waiting()
    fake.step(3)            # three packets move, and no more
    fake.release()          # everything moves again

A work request is as many packets as it has `PACKET_BYTES`, at least one: so a test can cut in
the middle of a request.

A process uses it in place of the system's verbs when it is started by this file::

    python -m tests.support.fakeverbs kvstore_daemon --listen ...

with the directory in the environment as `VARIABLE`.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import runpy
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvstore.transport import verbs
from kvstore.transport.verbs import DeviceInfo, Gid, NoDevice, PortInfo, Rail, RailSetup, Verbs

VARIABLE = "KVSTORE_FAKE_VERBS"
PACKET_BYTES = 64 * 1024
# A test that waits this long for a packet has failed.
PATIENCE_S = 20.0

DEVICES_MAX = 8
# A rail's slot is the upper byte of the numbers of its queue pairs.
RAILS_MAX = 256

WORKING, DOWN, REMOVED = range(3)

# | held | packets allowed | jitter seed | jitter us | device states | slots of rails |
_HEAD = struct.Struct("<QQQQ8B")
_SLOT = struct.Struct("<QQQ")
_SIZE = _HEAD.size + RAILS_MAX * _SLOT.size


class Slot(NamedTuple):
    """What a rail says of itself.

    Attributes:
        pid: Process that it is in, 0 for none.
        waiting: Work requests posted and not executed.
        executed: Packets.
    """

    pid: int
    waiting: int
    executed: int


class Head(NamedTuple):
    """What a test says to all rails."""

    held: int
    allowed: int
    seed: int
    jitter_us: int
    states: tuple[int, ...]


class Control:
    """Memory that all rails of a directory share, and the lock under which packets move.

    The lock belongs to this object: two threads need two of them.
    """

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / "control", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self.locked(fcntl.LOCK_EX):
            if os.fstat(self._fd).st_size < _SIZE:
                os.ftruncate(self._fd, _SIZE)
        self._memory = mmap.mmap(self._fd, _SIZE)

    @contextlib.contextmanager
    def locked(self, kind: int) -> Iterator[None]:
        """Hold the lock, shared by rails that move a packet or alone."""
        fcntl.flock(self._fd, kind)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def head(self) -> Head:
        """What a test has said last."""
        held, allowed, seed, jitter_us, *states = _HEAD.unpack_from(self._memory)
        return Head(held, allowed, seed, jitter_us, tuple(states))

    def set_head(self, head: Head) -> None:
        """Say something to all rails; the lock is held alone."""
        _HEAD.pack_into(self._memory, 0, *head[:-1], *head.states)

    def slot(self, index: int) -> Slot:
        """What a rail says."""
        return Slot(*_SLOT.unpack_from(self._memory, _HEAD.size + index * _SLOT.size))

    def set_slot(self, index: int, slot: Slot) -> None:
        """Say something; only the rail whose slot it is."""
        _SLOT.pack_into(self._memory, _HEAD.size + index * _SLOT.size, *slot)

    def claim_slot(self) -> int:
        """A slot that nobody has who is alive."""
        with self.locked(fcntl.LOCK_EX):
            for index in range(RAILS_MAX):
                if not _alive(self.slot(index).pid):
                    self.set_slot(index, Slot(os.getpid(), 0, 0))
                    return index
        raise AssertionError(f"more than {RAILS_MAX} rails")

    def close(self) -> None:
        """Let go of file and memory."""
        self._memory.close()
        os.close(self._fd)


class FakeVerbs(Verbs):
    """See the module.

    Args:
        directory: Of the network; exists.
        device_count: They are called fake0, fake1, …; each reaches devices of its own name
            only, as two networks would.
    """

    def __init__(self, directory: Path, device_count: int = 2) -> None:
        assert 1 <= device_count <= DEVICES_MAX
        self.directory = Path(directory).resolve()
        self._names = [f"fake{index}" for index in range(device_count)]
        self._control = Control(self.directory)

    def devices(self) -> list[DeviceInfo]:
        states = self._control.head().states
        return [
            DeviceInfo(
                name,
                (
                    PortInfo(
                        number=1,
                        active=states[index] == WORKING,
                        link_layer="Ethernet",
                        lid=0,
                        mtu_bytes=4096,
                        netdev=f"fakenet{index}",
                        gids=(
                            Gid(0, f"fe80::{index + 1}", "RoCE v2"),
                            Gid(1, f"::ffff:10.77.{index}.1", "RoCE v2"),
                        ),
                    ),
                ),
            )
            for index, name in enumerate(self._names)
            if states[index] != REMOVED
        ]

    def open(self, setup: RailSetup) -> Rail:
        from tests.support.fakedevice import FakeRail

        devices = {device.name: device for device in self.devices()}
        if setup.device not in devices:
            raise NoDevice(f"no device {setup.device!r}; there are: {', '.join(devices) or 'none'}")
        if setup.port != 1:
            raise NoDevice(f"{setup.device} has no port {setup.port}; it has port 1")
        gids = {gid.number: gid for gid in devices[setup.device].ports[0].gids}
        if setup.gid_index not in gids:
            raise NoDevice(f"{setup.device}:1 has no gid {setup.gid_index}; it has {list(gids)}")
        index = self._names.index(setup.device)
        return FakeRail(self.directory, index, setup, gids[setup.gid_index].address)

    # --- what a test does ------------------------------------------------------------------

    def hold(self) -> None:
        """From here on no packet moves."""
        # Said before all packets under way are waited for: else those that come could keep
        # this from ever being alone.
        self._control.set_head(self._control.head()._replace(held=1, allowed=0))
        with self._control.locked(fcntl.LOCK_EX):
            pass

    def step(self, packets: int = 1) -> None:
        """While held: let so many packets move, and return when they have."""
        self._change(allowed=packets)
        self.wait(lambda: self._control.head().allowed == 0, f"{packets} packets to move")

    def release(self) -> None:
        """Everything moves again."""
        self._change(held=0, allowed=0)

    def jitter(self, seed: int, delay_us_max: int) -> None:
        """Wait before each packet, up to so long, as numbers drawn from `seed` say."""
        self._change(seed=seed, jitter_us=delay_us_max)

    def remove(self, device: str) -> None:
        """The device is gone: its rails fail, and nothing on them completes any more."""
        self._set_state(device, REMOVED)

    def take_down(self, device: str) -> None:
        """The device's port is down: packets are lost."""
        self._set_state(device, DOWN)

    def bring_up(self, device: str) -> None:
        """The device is there, and its port is up."""
        self._set_state(device, WORKING)

    def waiting(self) -> int:
        """Work requests posted and not executed, in all processes that are alive."""
        return sum(slot.waiting for slot in self._slots())

    def executed(self) -> int:
        """Packets that have moved, in all processes that are alive."""
        return sum(slot.executed for slot in self._slots())

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Return when `condition()` is true; not for what this thread's event loop must do."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}"
            time.sleep(0.0005)

    def close(self) -> None:
        """Let go of the directory; rails that were opened stay open."""
        self._control.close()

    def _slots(self) -> list[Slot]:
        slots = (self._control.slot(index) for index in range(RAILS_MAX))
        return [slot for slot in slots if _alive(slot.pid)]

    def _set_state(self, device: str, state: int) -> None:
        with self._control.locked(fcntl.LOCK_EX):
            head = self._control.head()
            states = list(head.states)
            states[self._names.index(device)] = state
            self._control.set_head(head._replace(states=tuple(states)))

    def _change(self, **changes: int) -> None:
        with self._control.locked(fcntl.LOCK_EX):
            self._control.set_head(self._control.head()._replace(**changes))


def _alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A process that was killed and not waited for holds nothing any more.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    """Run a module as `python -m` does, with these verbs in place of the system's."""
    fake = FakeVerbs(Path(os.environ[VARIABLE]))
    verbs.system_verbs = lambda: fake  # type: ignore[assignment]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
