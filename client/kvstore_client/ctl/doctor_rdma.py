"""What must be so on a host that is to use RDMA: facts in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstore.units import format_size_bytes
from kvstore_client.ctl.doctor_findings import Finding, Verdict
from kvstore_client.ctl.doctor_ports import check_ports, check_rails
from kvstore_client.ctl.doctor_rdma_facts import Library, LibraryFacts, RdmaFacts, rails_of

# Beside the memory itself a rail locks its completion queue, 4 MiB on most devices, and a
# queue pair a session.
RAIL_BYTES = 16 * 1024 * 1024

_DEBIAN = "apt install rdma-core ibverbs-providers python3-pyverbs"
_FEDORA = "dnf install rdma-core python3-pyverbs"


def check_library(facts: RdmaFacts) -> Iterator[Finding]:
    """Whether pyverbs loads."""
    library = facts.library
    needed = facts.wanted or facts.files
    verdict = Verdict.FAILED if needed else Verdict.NOT_CHECKED
    broken = Verdict.FAILED if needed else Verdict.WARNING
    match library.state:
        case Library.LOADS:
            yield Finding("pyverbs", Verdict.OK, "loads, and fits this system's libibverbs")
        case Library.MISSING if library.elsewhere:
            yield Finding("pyverbs", verdict, *_unseen(library))
        case Library.MISSING:
            found = "not installed: payload goes by TCP"
            yield Finding("pyverbs", verdict, found, _install(library))
        case Library.OTHER_RELEASE:
            yield Finding(
                "pyverbs",
                broken,
                f"is of another release than this system's libibverbs: {library.said}",
                "remove it (pip uninstall pyverbs) and take both from the distribution:"
                f" {_DEBIAN}; {_FEDORA}",
            )
        case Library.NO_LIBIBVERBS:
            yield Finding(
                "pyverbs",
                broken,
                f"does not find libibverbs: {library.said}",
                f"{_DEBIAN}; {_FEDORA}",
            )
        case Library.OTHER_PYTHON:
            yield Finding(
                "pyverbs",
                broken,
                f"does not load into Python {library.python}: {library.said}",
                _own_python(library),
            )


def _install(library: LibraryFacts) -> str:
    seen = ""
    if library.environment:
        seen = f"; it is not seen from {library.environment} then: this command says how it will be"
    return f"{_DEBIAN} (Debian, Ubuntu), or {_FEDORA} (RHEL, Fedora){seen}"


def _unseen(library: LibraryFacts) -> tuple[str, str]:
    """What is found, and the remedy, where the distribution's is there and not seen."""
    place = f"installed in {library.elsewhere}, where this Python does not look"
    if library.elsewhere_python and library.elsewhere_python != library.python:
        found = f"{place}; it is built for Python {library.elsewhere_python}, and this is"
        return f"{found} {library.python}", _own_python(library)
    if library.environment:
        target = f"{library.environment}/lib/python{library.python}/site-packages/"
        return place, f"ln -s {library.elsewhere} {target}"
    return (
        place,
        f"PYTHONPATH={library.elsewhere.rpartition('/')[0]}, or the distribution's python3",
    )


def _own_python(library: LibraryFacts) -> str:
    version = library.elsewhere_python and f", which is Python {library.elsewhere_python}"
    return (
        "make the virtual environment with the distribution's own Python"
        f"{version}: /usr/bin/python3 -m venv --system-site-packages DIRECTORY"
    )


def check_devices(facts: RdmaFacts) -> Iterator[Finding]:
    """Whether there are devices that can be used."""
    name = "RDMA devices"
    if facts.idle:
        yield Finding(name, Verdict.NOT_CHECKED, "the kernel has none")
        return
    names = ", ".join(device.name for device in facts.devices)
    iwarp = [file.device for file in facts.files if file.iwarp]
    if not facts.files and not facts.devices:
        yield Finding(
            name,
            Verdict.FAILED,
            "the kernel has none",
            "load the driver of the adapter, as in: modprobe mlx5_ib; for soft RoCE on an"
            " interface: rdma link add rxe0 type rxe netdev INTERFACE",
        )
    elif facts.library.state is not Library.LOADS:
        known = ", ".join(file.device for file in facts.files)
        found = f"{known}; what they can do is not seen without pyverbs"
        yield Finding(name, Verdict.NOT_CHECKED, found)
    elif facts.devices_error:
        yield Finding(name, Verdict.FAILED, facts.devices_error)
    elif not facts.devices:
        yield Finding(
            name,
            Verdict.FAILED if facts.wanted else Verdict.WARNING,
            f"none that speaks InfiniBand or RoCE (iWARP: {', '.join(iwarp) or 'none'})",
            "use an InfiniBand or RoCE adapter",
        )
    else:
        rest = f"; iWARP, not used: {', '.join(iwarp)}" if iwarp else ""
        yield Finding(name, Verdict.OK, f"{names}{rest}")


def check_files(facts: RdmaFacts) -> Iterator[Finding]:
    """Whether this user may open the devices."""
    for file in facts.files:
        if file.iwarp:
            continue
        name = f"device file {file.device}"
        if not file.path:
            remedy = "modprobe ib_uverbs"
            yield Finding(name, Verdict.FAILED, "the kernel offers none", remedy)
        elif not file.there:
            yield Finding(
                name,
                Verdict.FAILED,
                f"{file.path} is missing",
                "in a container: --device /dev/infiniband; in a systemd unit: PrivateDevices=no and"
                " DeviceAllow=char-infiniband_verbs rw; else: udevadm trigger",
            )
        elif not file.open:
            yield Finding(
                name,
                Verdict.FAILED,
                f"{file.path} may not be opened by this user",
                f"usermod -aG GROUP USER, where GROUP is that of: ls -l {file.path} (rdma on many"
                " systems), and log in anew; in a systemd unit: SupplementaryGroups=GROUP and"
                " DeviceAllow=char-infiniband_verbs rw",
            )
        else:
            yield Finding(name, Verdict.OK, f"{file.path} can be opened")


def check_memlock(facts: RdmaFacts) -> Iterator[Finding]:
    """Whether memory may be registered."""
    limit = facts.memlock
    name = "locked memory"
    rail_count = max(1, len(rails_of(facts).rails))
    needed = rail_count * (limit.memory_bytes + RAIL_BYTES)
    soft, hard = limit.soft_bytes, limit.hard_bytes
    values = {"limit_bytes": soft, "hard_limit_bytes": hard, "needed_bytes": needed}
    told = "no limit" if soft is None else f"the limit is {format_size_bytes(soft)}"
    need = f"{format_size_bytes(limit.memory_bytes)} on {rail_count} "
    need += "rails take" if rail_count > 1 else "rail takes"
    need += f" {format_size_bytes(needed)}"
    if facts.idle:
        yield Finding(name, Verdict.NOT_CHECKED, f"{told}; it is for RDMA alone", values=values)
    elif soft is None or soft >= needed:
        yield Finding(name, Verdict.OK, f"{told}; {need}", values=values)
    elif limit.exempt:
        found = f"{told}, and does not bind this process (CAP_IPC_LOCK); others it does"
        yield Finding(name, Verdict.OK, found, values=values)
    else:
        shell = ""
        if hard is None or hard >= needed:
            shell = f"here: ulimit -l {'unlimited' if hard is None else hard // 1024}; "
        yield Finding(
            name,
            Verdict.FAILED,
            f"{told}, and {need}",
            f"{shell}in a systemd unit: LimitMEMLOCK=infinity; for logins a file in"
            " /etc/security/limits.d with: * - memlock unlimited (and log in anew); in a"
            " container: --ulimit memlock=-1",
            values=values,
        )


#: In the order in which they are shown.
CHECKS: tuple[Callable[[RdmaFacts], Iterable[Finding]], ...] = (
    check_library,
    check_devices,
    check_files,
    check_ports,
    check_rails,
    check_memlock,
)


def check_rdma(facts: RdmaFacts) -> Sequence[Finding]:
    """All findings about RDMA on this host."""
    return [finding for check in CHECKS for finding in check(facts)]


def rdma_missing(facts: RdmaFacts) -> str:
    """Why this host cannot do RDMA at all, "" if it may."""
    if facts.idle:
        return "this host has no RDMA device"
    if facts.library.state is not Library.LOADS:
        return "pyverbs does not load on this host"
    if facts.devices_error:
        return facts.devices_error
    return rails_of(facts).error


__all__ = ["CHECKS", "RAIL_BYTES", "check_rdma", "rdma_missing"]
