"""What must be so on a host whose processes are to share memory: facts in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvstore_client.ctl.doctor_findings import Finding, Verdict


class SharedFacts(NamedTuple):
    """All about shared memory on this host.

    Attributes:
        wanted: Whether the operator has asked for it.
        create_error: Why no sealed memfd can be made and mapped, "" if it can.
        protect_error: Why it cannot be handed over for reading only, "" if it can.
        writable_again: Whether a descriptor for reading only could be mapped for writing.
        host: What tells this host from others, to peers; "" if the system does not say.
        user_id: Of this process.
    """

    wanted: bool
    create_error: str
    protect_error: str
    writable_again: bool
    host: str
    user_id: int


def check_create(facts: SharedFacts) -> Iterator[Finding]:
    """Whether memory can be made that peers may map."""
    if facts.create_error:
        yield Finding(
            "sealed memory",
            _bad(facts),
            f"no memfd with seals: {facts.create_error}",
            "a kernel with CONFIG_MEMFD_CREATE; in a container: a seccomp profile that lets"
            " memfd_create and fcntl pass",
        )
    else:
        yield Finding("sealed memory", Verdict.OK, "memfds can be sealed against shrinking")


def check_protect(facts: SharedFacts) -> Iterator[Finding]:
    """Whether memory can be handed over for reading only."""
    name = "read-only memory"
    if facts.create_error:
        yield Finding(name, Verdict.NOT_CHECKED, "there is no memfd to try it with")
    elif facts.protect_error:
        yield Finding(
            name,
            _bad(facts),
            f"views of a pool cannot be given: {facts.protect_error}",
            "Linux 5.1 or newer (F_SEAL_FUTURE_WRITE), with /proc mounted",
        )
    elif facts.writable_again:
        yield Finding(
            name,
            Verdict.FAILED,
            "a descriptor that was opened for reading could be mapped for writing",
            "do not serve views (--pool) on this kernel",
        )
    else:
        yield Finding(name, Verdict.OK, "memfds can be opened again by /proc, for reading only")


def check_place(facts: SharedFacts) -> Iterator[Finding]:
    """Whether peers on this host can be told, and who may share memory with us."""
    name = "peers on this host"
    if not facts.host:
        yield Finding(
            name,
            Verdict.WARNING,
            "/proc does not tell this host from others: a peer at tcp:// is never found to be near",
            "mount /proc, or name the peer by its unix socket",
        )
        return
    user = f"uid {facts.user_id}" if facts.user_id else "root (uid 0)"
    yield Finding(
        name,
        Verdict.OK,
        f"this process is {user}: a daemon or agent shares memory with its own user, and root",
        values={"user_id": facts.user_id},
    )


def _bad(facts: SharedFacts) -> Verdict:
    return Verdict.FAILED if facts.wanted else Verdict.WARNING


#: In the order in which they are shown.
CHECKS: tuple[Callable[[SharedFacts], Iterable[Finding]], ...] = (
    check_create,
    check_protect,
    check_place,
)


def check_shared(facts: SharedFacts) -> Sequence[Finding]:
    """All findings about shared memory on this host."""
    return [finding for check in CHECKS for finding in check(facts)]


__all__ = ["CHECKS", "SharedFacts", "check_shared"]
