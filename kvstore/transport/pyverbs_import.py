"""The optional package pyverbs: found when it is first used, and what is wrong if it is not.

It comes with the system's rdma-core and fits that release of libibverbs only: its symbols are
versioned by release (`IBVERBS_PRIVATE_44`). What the package index has under this name builds
and imports on few systems, so that it is no dependency of ours.
"""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import logging
import re
import resource
import sys
import threading
from typing import Any, NamedTuple

from kvstore.transport.verbs import VerbsError, VerbsForbidden, VerbsMissing

_INSTALL = (
    "install the distribution's package (Debian, Ubuntu: apt install python3-pyverbs; "
    "RHEL, Fedora: dnf install python3-pyverbs) and make it visible to this Python"
)

_load_lock = threading.Lock()


class Modules(NamedTuple):
    """What is used of pyverbs."""

    enums: Any
    addr: Any
    cq: Any
    device: Any
    mr: Any
    pd: Any
    qp: Any
    wr: Any
    error: type[Exception]


@functools.cache
def _modules() -> Modules:
    if importlib.util.find_spec("pyverbs") is None:
        raise VerbsMissing(f"the package pyverbs is not installed: {_INSTALL}")
    try:
        parts = ("addr", "cq", "device", "mr", "pd", "qp", "wr")
        found: dict[str, Any] = {name: importlib.import_module(f"pyverbs.{name}") for name in parts}
        error = importlib.import_module("pyverbs.pyverbs_error").PyverbsError
        return Modules(enums=_enums(), error=error, **found)
    except ImportError as error:
        raise VerbsMissing(_why(str(error))) from error


def _enums() -> Any:
    """The constants; they have moved between releases."""
    try:
        return importlib.import_module("pyverbs.libibverbs_enums")
    except ModuleNotFoundError:
        return importlib.import_module("pyverbs.enums")


def _why(text: str) -> str:
    if "IBVERBS_PRIVATE" in text:
        return (
            f"pyverbs is of another release than this system's libibverbs ({text}): "
            f"remove it and {_INSTALL}"
        )
    if "libibverbs" in text:
        return f"pyverbs does not find libibverbs ({text}): {_INSTALL}"
    version = ".".join(map(str, sys.version_info[:2]))
    return (
        f"pyverbs does not load into Python {version} ({text}): the distribution's package is "
        "built for the distribution's own python3; run this with it, or with one of its version"
    )


def load() -> Modules:
    """The modules of pyverbs.

    Raises:
        VerbsMissing: It is not installed, or does not fit; says what to do.
    """
    root = logging.getLogger()
    with _load_lock:
        handlers, level = list(root.handlers), root.level
        try:
            return _modules()
        finally:
            # pyverbs configures the logging of the whole process when it is imported, which
            # is its owner's to do.
            for handler in set(root.handlers) - set(handlers):
                root.removeHandler(handler)
            root.setLevel(level)


def code(error: Exception) -> int:
    """What the system answered: its errno, 0 if it gave none."""
    value = int(getattr(error, "error_code", -1))
    return 0 if value == -1 else abs(value)


def translated(what: str, error: Exception) -> VerbsError:
    """The error to raise for one of pyverbs.

    Args:
        what: What failed, and on what.
    """
    # The message repeats the number; what the number means is said below or by the system.
    text = re.sub(r"\. Errno: \d+, ", ": ", str(error))
    number = code(error)
    if number in (errno.EACCES, errno.EPERM):
        return VerbsForbidden(
            f"{what}: {text}; the device files /dev/infiniband/uverbs* must be readable and "
            "writable for this user (group rdma on some distributions)"
        )
    return VerbsError(f"{what}: {text}")


def no_memory(what: str, error: Exception) -> VerbsError:
    """The error to raise when memory could not be registered for want of it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return translated(what, error)
    return VerbsForbidden(
        f"{what}: the limit on locked memory (RLIMIT_MEMLOCK) is {limit} bytes; set "
        "LimitMEMLOCK=infinity in the systemd unit, or `ulimit -l unlimited`"
    )
