"""What must be so of a peer, and of a block that goes there and back: facts in, findings out.
Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.memorymessages import RDMA, SHM, VIEWS
from kvstore.messages import Role
from kvstore.units import format_size_bytes
from kvstore_client.ctl.doctor_findings import Finding, Verdict

#: What may be asked for, in the order in which it is tried.
TRANSPORTS = ("tcp", "unix", SHM, RDMA)
_UNIX = "unix://"
_SHARING = (
    "run both as the same user (User= of the systemd units), or let the peer share memory with"
    " this one (--memory-user)"
)


class PeerFacts(NamedTuple):
    """A peer that was asked.

    Attributes:
        endpoint: As the operator calls it.
        error: Why there is no connection, "" if there is one; then the rest says something.
        node_id, role: As it calls itself.
        round_trip_s: Of one ping.
        capabilities: Of its WELCOME to this endpoint.
        local: Its unix socket, if it says that it is on this host; else "".
        near_capabilities: Of its WELCOME there.
        near_error: Why that socket cannot be used, "" if it can.
        other_space: Whether it is on this machine, but sees other files or another network.
        owner_uid: Of its socket; None if that is not known.
        user_id: Ours.
    """

    endpoint: str
    error: str = ""
    node_id: str = ""
    role: str = ""
    round_trip_s: float = 0.0
    capabilities: tuple[str, ...] = ()
    local: str = ""
    near_capabilities: tuple[str, ...] = ()
    near_error: str = ""
    other_space: bool = False
    owner_uid: int | None = None
    user_id: int = 0

    @property
    def stream(self) -> str:
        """What moves payload in any case."""
        return "unix" if self.endpoint.startswith(_UNIX) else "tcp"

    @property
    def offered(self) -> list[str]:
        """What may move payload."""
        ways = {self.stream, *self.capabilities, *self.near_capabilities}
        return [name for name in TRANSPORTS if name in ways]


class TransferFacts(NamedTuple):
    """One block, there and back.

    Attributes:
        transport: What was to move it.
        block_bytes: Its size.
        error: What went wrong, "" if nothing did.
        refused: Why the peer does not take our pool, "" if it does.
        moved_by: What really moved it.
        put_s, fetch_s: How long that took.
        rails: Ours, with RDMA.
        deleted: Whether it is gone again.
        warnings: What the library had to say meanwhile.
    """

    transport: str
    block_bytes: int
    error: str = ""
    refused: str = ""
    moved_by: tuple[str, ...] = ()
    put_s: float = 0.0
    fetch_s: float = 0.0
    rails: tuple[str, ...] = ()
    deleted: bool = True
    warnings: tuple[str, ...] = ()


def check_peer(peer: PeerFacts) -> list[Finding]:
    """The connection, and what is offered over it."""
    if peer.error:
        remedy = (
            "see that it runs, listens there and not on loopback alone (--listen), and that a"
            " firewall lets the port pass"
        )
        if peer.stream == "unix":
            remedy = (
                "see that it runs and listens there, and that this user may write to the socket:"
                " be in the group of the unit (Group=)"
            )
        return [Finding("connection", Verdict.FAILED, peer.error, remedy, peer.endpoint)]
    values = {"node_id": peer.node_id, "role": peer.role, "round_trip_ms": _ms(peer.round_trip_s)}
    answered = f"{peer.node_id} ({peer.role}) answers in {1e3 * peer.round_trip_s:.3f} ms"
    return [
        Finding("connection", Verdict.OK, answered, "", peer.endpoint, values),
        _check_offer(peer),
    ]


def _check_offer(peer: PeerFacts) -> Finding:
    found = ", ".join(peer.offered)
    remedy = ""
    verdict = Verdict.OK
    if VIEWS in peer.capabilities or VIEWS in peer.near_capabilities:
        found += "; and views of its memory"
    if SHM in peer.offered:
        pass
    elif peer.stream == "unix":
        verdict = Verdict.WARNING
        found += "; no shared memory"
        if peer.owner_uid is not None and peer.owner_uid != peer.user_id:
            found += f", since it runs as uid {peer.owner_uid} and this process as {peer.user_id}"
        remedy = _SHARING
    elif peer.near_error:
        found += f"; it is on this host, and its socket cannot be used: {peer.near_error}"
        remedy = f"for shared memory {_SHARING}, and let it write to the socket"
    elif peer.local:
        found += f"; it is on this host, and shares no memory by {peer.local}"
        remedy = _SHARING
    elif peer.other_space:
        found += "; it is on this machine, and sees other files or another network than we do"
        remedy = "for shared memory, name it by its unix socket, which both must see"
    values = {"transports": peer.offered}
    return Finding("offer", verdict, found, remedy, peer.endpoint, values)


def transports_to_try(peer: PeerFacts, asked: Sequence[str]) -> list[str]:
    """What a block is to be moved by: what was asked for and is offered, or all that is."""
    if foreign_agent(peer):
        return []
    return [name for name in peer.offered if not asked or name in asked]


def foreign_agent(peer: PeerFacts) -> list[Finding]:
    """Says why there is no transfer with an agent that is reached by the network."""
    if peer.role != Role.AGENT or peer.stream == "unix":
        return []
    return [
        Finding(
            "transfer",
            Verdict.NOT_CHECKED,
            "an agent takes blocks from engines of its own node alone",
            "on its host: kvctl doctor unix:///PATH, with its --local; from here: ask a daemon",
            peer.endpoint,
        )
    ]


def not_offered(peer: PeerFacts, asked: Sequence[str]) -> list[Finding]:
    """One finding for each transport that was asked for, and that the peer does not offer."""
    remedies = {
        RDMA: "start it with --listen rdma://HOST:PORT, and name it by that port",
        SHM: "start it with --listen unix:///PATH (kvagent: --local), as the same user or with"
        " --memory-user, and name it by that",
        "tcp": "name it by a tcp:// endpoint",
        "unix": "name it by its unix socket",
    }
    return [
        Finding(
            f"transfer by {name}",
            Verdict.FAILED,
            f"{peer.node_id} does not offer it here: {', '.join(peer.offered)}",
            remedies[name],
            peer.endpoint,
        )
        for name in asked
        if name not in peer.offered
    ]


def unable(peer: PeerFacts, reason: str) -> Finding:
    """RDMA is offered, and this host cannot do it: the checks of this host say what to do."""
    found = f"{reason}: with transport=auto {peer.stream} is used, and the log says so"
    return Finding(f"transfer by {RDMA}", Verdict.NOT_CHECKED, found, "", peer.endpoint)


def check_transfer(endpoint: str, transfer: TransferFacts) -> Finding:
    """How a block has fared."""
    name = f"transfer by {transfer.transport}"
    if transfer.refused:
        found = f"the peer does not take blocks of this test: {transfer.refused}"
        return Finding(name, Verdict.NOT_CHECKED, found, "", endpoint)
    said = "; ".join(_news(endpoint, transfer))
    if transfer.error:
        found = f"{transfer.error}; {said}" if said else transfer.error
        return Finding(name, Verdict.FAILED, found, _remedy(transfer), endpoint)
    moved = ", ".join(transfer.moved_by)
    rails = f" on {', '.join(transfer.rails)}" if transfer.rails else ""
    found = (
        f"{format_size_bytes(transfer.block_bytes)} by {moved}{rails}: put in"
        f" {1e3 * transfer.put_s:.2f} ms, fetched and verified in {1e3 * transfer.fetch_s:.2f} ms"
    )
    values = {
        "transport": moved,
        "rails": list(transfer.rails),
        "block_bytes": transfer.block_bytes,
        "put_ms": _ms(transfer.put_s),
        "fetch_ms": _ms(transfer.fetch_s),
    }
    verdict, remedy = Verdict.OK, ""
    if set(transfer.moved_by) != {transfer.transport}:
        verdict, remedy = Verdict.FAILED, "look at the logs of both sides"
    elif said or not transfer.deleted:
        left = "" if transfer.deleted else "; the block could not be deleted, and stays"
        verdict, found = Verdict.WARNING, f"{found}{left}{'; ' if said else ''}{said}"
    return Finding(name, verdict, found, remedy, endpoint, values)


def _news(endpoint: str, transfer: TransferFacts) -> Iterator[str]:
    """Warnings that say more than the error does, once each."""
    error = transfer.error
    for text in dict.fromkeys(transfer.warnings):
        if not (error and (text.removeprefix(f"{endpoint}: ") in error or error in text)):
            yield text


def _remedy(transfer: TransferFacts) -> str:
    if transfer.transport == RDMA:
        return (
            "kvctl doctor on both hosts; rails pair in their order: name the devices of one network"
            " at the same place on both sides (?device=A,B); between them UDP port 4791 open both"
            " ways (RoCE v2), a route (ping -I INTERFACE PEER), and the mtu (ping -M do -s 4164"
            " PEER)"
        )
    if transfer.transport == SHM:
        return f"{_SHARING}; kvctl doctor on both sides"
    return "look at the peer's log: journalctl -u kvstored, or -u kvagent"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 6)


__all__ = [
    "TRANSPORTS",
    "PeerFacts",
    "TransferFacts",
    "check_peer",
    "check_transfer",
    "foreign_agent",
    "not_offered",
    "transports_to_try",
    "unable",
]
