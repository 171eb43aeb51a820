"""What pyverbs brings with it: rights, limits, and processes that end without closing.

Each in a process of its own: they lose rights, or end by a signal if something is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.tree import ROOT
from tests.support.verbsdevices import in_guest, real_rails

RAILS = real_rails()

pytestmark = pytest.mark.slow

PROLOGUE = f"""
import gc, os, resource, sys, threading
from kvstore.buffers import Region
from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore.transport.verbs import *
from tests.support.verbsends import *
verbs = PyVerbs()
setup = RailSetup(*{tuple(RAILS[0])!r})
def refused(call):
    try:
        call()
    except VerbsError as error:
        print(type(error).__name__, error)
    else:
        print("not refused")
def become_nobody():
    verbs.devices()  # who is nobody may not read where pyverbs lies
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
    os.setgid(65534)
    os.setuid(65534)
"""


def output(program: str) -> str:
    """What a program says, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done
    assert done.stderr == ""
    return done.stdout.strip()


needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not in_guest(), reason="changes device files as root"
)


@needs_root
def test_limit_on_locked_memory_is_named() -> None:
    told = output(
        """
        become_nobody()
        rail = verbs.open(setup)
        memory = Region(32 << 20)
        rail.register(address_of(memory.view), 1 << 20).close()
        refused(lambda: rail.register(address_of(memory.view), 32 << 20))
        rail.close()
        """
    )
    assert told.startswith("VerbsForbidden")
    assert "8388608 bytes; set LimitMEMLOCK=infinity" in told


@needs_root
def test_device_file_without_rights_is_named() -> None:
    told = output(
        """
        assert setup.device == "rxe0"
        paths = ["/dev/infiniband/uverbs0", "/dev/infiniband/uverbs1"]
        mode = os.stat(paths[0]).st_mode
        try:
            for path in paths:
                os.chmod(path, 0o600)
                if os.fork() == 0:
                    become_nobody()
                    print([device.name for device in verbs.devices()]) if path == paths[0] else (
                        refused(verbs.devices)
                    )
                    refused(lambda: verbs.open(setup))
                    sys.stdout.flush()
                    os._exit(0)
                os.wait()
        finally:
            for path in paths:
                os.chmod(path, mode)
        """
    )
    left, first, none, second = told.splitlines()
    assert left == "['rxe1']"
    assert first.startswith("VerbsForbidden rxe0: /dev/infiniband/uverbs0 must be readable")
    assert none.startswith("VerbsForbidden rxe1: /dev/infiniband/uverbs1 must be readable")
    assert second == first


@needs_root
def test_device_file_that_is_missing_is_named() -> None:
    told = output(
        """
        path = "/dev/infiniband/uverbs0"
        os.rename(path, path + ".away")
        try:
            refused(lambda: verbs.open(setup))
        finally:
            os.rename(path + ".away", path)
        """
    )
    assert told.startswith("VerbsForbidden rxe0: its device file /dev/infiniband/uverbs0 is mi")


def test_process_may_end_with_everything_open() -> None:
    told = output(
        """
        ends = [End(verbs, setup) for _ in range(4)]
        connect(*ends[:2])
        ends[1].queue.post_receives(5)
        ends[0].post(*[write(ends[0], ends[1].far, 0, 100)] * 50)
        cycle = [ends]
        cycle.append(cycle)
        del ends, cycle
        gc.collect()
        print("end")
        """
    )
    assert told == "end"


def test_threads_may_open_rails_at_once() -> None:
    told = output(
        """
        fds, go = [], threading.Barrier(4)
        def run():
            go.wait()
            for _ in range(5):
                rails = [verbs.open(setup) for _ in range(3)]
                verbs.devices()
                assert len({rail.fileno() for rail in rails}) == 3
                for rail in rails:
                    assert rail.poll() == []
                    rail.close()
            fds.append(1)
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(len(fds), sum("infiniband" in os.readlink(f"/proc/self/fd/{fd}")
              for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")))
        """
    )
    assert told == "4 0"


def test_logging_of_the_process_is_left_alone() -> None:
    told = output(
        """
        import logging
        verbs.devices()
        print(logging.getLogger().handlers, logging.getLogger().level)
        """
    )
    assert told == "[] 30"
