"""`kvctl doctor`: what is fine on this host and on the way to a peer, what is not, and what to
type."""

from __future__ import annotations

import argparse
from typing import Any, TextIO

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError
from kvstore.memorymessages import RDMA, SHM
from kvstore.transport.rdma_nodes import endpoint_options
from kvstore.transport.rdma_options import RdmaOptions
from kvstore.units import parse_size_bytes
from kvstore_client.ctl.doctor_facts import rdma_facts, shared_facts
from kvstore_client.ctl.doctor_findings import Finding, as_document, as_lines, exit_status
from kvstore_client.ctl.doctor_peer import (
    TRANSPORTS,
    check_peer,
    check_transfer,
    foreign_agent,
    not_offered,
    transports_to_try,
    unable,
)
from kvstore_client.ctl.doctor_rdma import check_rdma, rdma_missing
from kvstore_client.ctl.doctor_rdma_facts import RdmaFacts, rails_of
from kvstore_client.ctl.doctor_shared import check_shared
from kvstore_client.ctl.doctor_transfer import POOL, ask_peer, source_address, transfer
from kvstore_client.ctl.documents import as_text
from kvstore_client.ctl.options import Common, Subparsers, add_command

# As much as `kvstored` has by default.
MEMORY = "1GiB"

EPILOG = f"""
Without URI it looks at this host: whether pyverbs loads, RDMA devices, their files, ports, gids
and mtu, which of them a connection would use, the limit on locked memory, and shared memory.

With URI it also asks that peer what it offers, and sends a block of random bytes there and back
by each transport that is offered, or by those of --transport. The block goes into the pool
{POOL} under a key of its own and is deleted again. Options of an rdma:// URI, such as
?device=mlx5_0&gid_index=3, are those that the block is sent with. What a host without RDMA
lacks is no failure unless RDMA was asked for, by an rdma:// URI or by --transport=rdma.

--memory is what is to be registered here: that of a daemon or an agent, or what a client
allocates. With RDMA it counts against the limit on locked memory once for each rail.

examples:
  kvctl doctor
  kvctl doctor --memory 64GiB
  kvctl doctor rdma://10.1.0.5:7450
  kvctl doctor rdma://10.1.0.5:7450?device=mlx5_0 --transport rdma
  kvctl doctor unix:///run/kvagent/agent.sock
  kvctl doctor --json | jq -r '.checks[] | select(.verdict == "failed") | .remedy'

--json: format, and checks [endpoint, check, verdict, found, remedy, values] in the order in
which they were made. endpoint is null for this host. verdict is ok, warning, failed or
not_checked. remedy is null where nothing is to be done. values is an object, empty for most:
of a port netdev, link_layer; of a gid index, gid, kind; of an mtu mtu_bytes, netdev_mtu_bytes
(0: unknown); of rails rails; of locked memory limit_bytes, hard_limit_bytes (null: none),
needed_bytes; of peers on this host user_id; of a connection node_id, role, round_trip_ms; of an
offer transports; of a transfer transport, rails, block_bytes, put_ms, fetch_ms.

exit status: 0 no check has failed, warnings or not; 1 one has; 2 an option cannot be
"""


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Add `doctor` to the commands of `kvctl`."""
    parser = add_command(
        subparsers,
        "doctor",
        "what is fine on this host and on the way to a peer, and what is not",
        "Check RDMA and shared memory on this host, and the way to a peer; say what to type.",
        EPILOG,
    )
    parser.add_argument(
        "peer",
        metavar="URI",
        nargs="?",
        help="a daemon or an agent: tcp://HOST:PORT, rdma://HOST:PORT[?device=NAME] or"
        " unix:///PATH",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        default=MEMORY,
        help="what is to be registered on this host, as in 64GiB (default %(default)s)",
    )
    parser.add_argument(
        "--transport",
        metavar="NAME",
        action="append",
        default=[],
        help=f"what is to move the block: {', '.join(TRANSPORTS)}; may be given several times"
        " (default: all that are offered)",
    )
    parser.set_defaults(run=run)


async def run(common: Common, given: argparse.Namespace, output: TextIO) -> int:
    """Make all checks and show what was found; the exit status.

    Raises:
        ConfigError: An option cannot be.
    """
    findings = await _findings(common, given)
    if common.json:
        output.write(as_text(as_document(findings)))
    else:
        output.write("\n".join(as_lines(findings)) + "\n")
    return exit_status(findings)


async def _findings(common: Common, given: argparse.Namespace) -> list[Finding]:
    asked = _transports(given.transport)
    memory_bytes = parse_size_bytes(given.memory, "--memory")
    peer = _peer(given)
    is_rdma = peer is not None and peer.scheme == "rdma"
    options = RdmaOptions() if peer is None else endpoint_options(peer, "URI")
    address = "" if peer is None else await source_address(peer)
    rdma = rdma_facts(is_rdma or RDMA in asked, options, address, memory_bytes)
    findings = [*check_rdma(rdma), *check_shared(shared_facts(SHM in asked))]
    if peer is not None:
        findings += await _check_way(peer, asked, rdma, common.timeout_s)
    return findings


async def _check_way(
    peer: Endpoint, asked: list[str], rdma: RdmaFacts, timeout_s: float
) -> list[Finding]:
    """The connection to a peer, its offer, and a block by each transport."""
    facts = await ask_peer(peer, timeout_s)
    findings = check_peer(facts)
    if facts.error:
        return findings
    for name in transports_to_try(facts, asked):
        reason = rdma_missing(rdma) if name == RDMA else ""
        if reason:
            findings.append(unable(facts, reason))
            continue
        rails = rails_of(rdma).rails if name == RDMA else ()
        names = [f"{rail.device}:{rail.port}" for rail in rails]
        moved = await transfer(peer, name, timeout_s, names)
        findings.append(check_transfer(facts.endpoint, moved))
    # An rdma:// URI asks for it too, beside what moves payload otherwise.
    missed = asked or [RDMA] * (peer.scheme == RDMA)
    return findings + foreign_agent(facts) + not_offered(facts, missed)


def _peer(given: argparse.Namespace) -> Endpoint | None:
    """Whom to ask: the argument, or what stands after --endpoint.

    Raises:
        ConfigError: It cannot be, or there are several.
    """
    texts = [*([given.peer] if given.peer else []), *given.endpoints, *given.after_endpoints]
    if len(texts) > 1:
        raise ConfigError("URI", texts[1], "one peer is checked at a time")
    if not texts:
        return None
    peer = parse_endpoint(texts[0], "URI")
    if peer.scheme != "unix" and not (peer.host and peer.port):
        raise ConfigError("URI", texts[0], "needs a host and a port from 1 to 65535")
    return peer


def _transports(texts: list[str]) -> list[str]:
    for text in texts:
        if text not in TRANSPORTS:
            raise ConfigError("--transport", text, f"must be one of {', '.join(TRANSPORTS)}")
    return list(dict.fromkeys(texts))
