"""Network namespaces without names: each is held by a process, and the kernel removes it with it.

Rule: nothing here leaves a trace in the host. A namespace lives as long as its holder and what
runs in it; holders and everything that `command` starts get SIGKILL when the thread that
started them ends, however it ends. So neither Ctrl-C nor `kill -9` leaves a namespace, a link
or a process behind, and runs beside each other cannot meet.

As root the namespaces belong to the host's user namespace; otherwise the first one makes a user
namespace of its own (user_namespaces(7)), and all others are made inside it.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.errors import KVStoreError

# An interpreter and a few system calls: far below a second.
START_TIMEOUT_S = 20.0
# `ip` and `tc` answer in milliseconds, but a batch may be long and the machine busy.
COMMAND_TIMEOUT_S = 60.0
# Where administrators' programs lie that a user's PATH may not name.
_PROGRAM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

# <linux/sched.h> and <linux/prctl.h>: CLONE_NEWUSER, CLONE_NEWNET, PR_SET_PDEATHSIG.
#
# The signal is asked for after namespaces were changed, which may forget it (prctl(2)); the
# look at the parent closes the gap in which it may have ended before.
_BASE = """
import ctypes, os, sys
NEWUSER, NEWNET = 0x10000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
def fail(text):
    print(text, flush=True)
    os._exit(1)
def check(result, what):
    if result:
        fail(f"{what}: {os.strerror(ctypes.get_errno())}")
def enter(pid, kind, flag):
    if os.readlink(f"/proc/self/ns/{kind}") != os.readlink(f"/proc/{pid}/ns/{kind}"):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        check(libc.setns(fd, flag), f"setns ({kind} namespace)")
        os.close(fd)
def bind(parent):
    check(libc.prctl(1, 9, 0, 0, 0), "prctl")
    if os.getppid() != int(parent):
        os._exit(1)
"""

# The holder of a new namespace: says that it is ready, then waits for its end.
#
# IPv6 is off because its announcements would count as traffic; a kernel may have none.
_HOLDER = (
    _BASE
    + """
parent, user = sys.argv[1:]
uid, gid = os.geteuid(), os.getegid()
if user == "new":
    check(libc.unshare(NEWUSER), "unshare (user namespace)")
    for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
elif user:
    enter(user, "user", NEWUSER)
check(libc.unshare(NEWNET), "unshare (network namespace)")
for scope in "all", "default":
    try:
        with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as file:
            file.write("1")
    except OSError:
        pass
bind(parent)
print("ready", flush=True)
os.read(0, 1)
"""
)

# Runs a program inside.
_ENTER = (
    _BASE
    + """
parent, holder, *command = sys.argv[1:]
enter(holder, "user", NEWUSER)
enter(holder, "net", NEWNET)
bind(parent)
os.execv(command[0], command)
"""
)


class ShapingUnavailable(KVStoreError):
    """Raised where links cannot be shaped; says what is missing."""


class InterfaceCounters(NamedTuple):
    """What the kernel has counted on one interface, link-layer headers included."""

    received_bytes: int
    received_packets: int
    sent_bytes: int
    sent_packets: int


class NetworkNamespace:
    """One network namespace, held by a process of its own.

    Thread rule: the thread that makes it must live as long as it does.

    Args:
        user: Empty: in the user namespace of this process. "new": in a new one. Else the pid
            of the holder whose user namespace it shares.

    Attributes:
        holder_pid: The process that holds it.
    """

    def __init__(self, user: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", _HOLDER, str(os.getpid()), user],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.holder_pid = self._process.pid

    def wait_until_ready(self) -> None:
        """Return when the namespace is there.

        Raises:
            ShapingUnavailable: It could not be made; says which call failed and why.
        """
        output = self._process.stdout
        assert output is not None
        # To its end, and not as far as one read gets: a traceback comes in pieces.
        deadline = time.monotonic() + START_TIMEOUT_S
        heard = bytearray()
        while heard != b"ready\n":
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([output], [], [], left_s)[0]:
                break
            part = os.read(output.fileno(), 4096)
            if not part:
                break
            heard += part
        said = heard.decode(errors="replace").strip()
        if said != "ready":
            self.close()
            raise ShapingUnavailable(
                f"no network namespace: {said or f'no answer within {START_TIMEOUT_S:.0f} s'}"
            )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs a program inside, bound to the process that starts it.

        Args:
            arguments: Path of the program, and its own arguments.
        """
        entering = [sys.executable, "-IS", "-c", _ENTER, str(os.getpid()), str(self.holder_pid)]
        return [*entering, *arguments]

    def run(self, program: str, arguments: Sequence[str], batch: Sequence[str] = ()) -> str:
        """Run `ip` or `tc` inside; its output.

        Args:
            batch: Lines for its standard input.

        Raises:
            ShapingUnavailable: The program is missing, or what it said when it failed.
        """
        path = shutil.which(program, path=_PROGRAM_PATH)
        if path is None:
            raise ShapingUnavailable(f"the program {program} is missing (package iproute2)")
        try:
            done = subprocess.run(
                self.command([path, *arguments]),
                input="".join(f"{line}\n" for line in batch),
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ShapingUnavailable(f"{program} {' '.join(arguments)}: {error}") from error
        if done.returncode:
            said = (done.stderr + done.stdout).strip()
            raise ShapingUnavailable(f"{program} {' '.join(arguments)} failed: {said}")
        return done.stdout

    def counters(self, interface: str) -> InterfaceCounters:
        """What one of its interfaces has carried so far.

        Raises:
            ShapingUnavailable: The interface or the namespace is gone.
        """
        try:
            # Not /sys, which shows the namespace in which it was mounted.
            table = Path(f"/proc/{self.holder_pid}/net/dev").read_text()
        except OSError as error:
            raise ShapingUnavailable(f"the namespace of {interface} is gone: {error}") from error
        for line in table.splitlines():
            name, found, numbers = line.partition(":")
            if found and name.strip() == interface:
                values = [int(number) for number in numbers.split()]
                return InterfaceCounters(values[0], values[1], values[8], values[9])
        raise ShapingUnavailable(f"there is no interface {interface}")

    def close(self) -> None:
        """End the holder; the namespace goes when nothing runs in it any more."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def first_namespace() -> tuple[NetworkNamespace, str]:
    """A namespace in which others may be made, and the `user` argument for those.

    Raises:
        ShapingUnavailable: Neither as we are nor in a user namespace; says both reasons.
    """
    reasons = []
    for user in ("", "new"):
        namespace = NetworkNamespace(user)
        try:
            namespace.wait_until_ready()
        except ShapingUnavailable as error:
            reasons.append(str(error))
            continue
        return namespace, str(namespace.holder_pid) if user else ""
    raise ShapingUnavailable(f"{reasons[0]}; and inside a user namespace {reasons[1]}")


__all__ = ["InterfaceCounters", "NetworkNamespace", "ShapingUnavailable", "first_namespace"]
