"""What `kvctl doctor` makes of facts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvstore.transport import pyverbs_import
from kvstore.transport.rdma_options import RdmaOptions
from kvstore.transport.verbs import DeviceInfo, Gid, PortInfo
from kvstore_client.ctl import doctor
from kvstore_client.ctl.__main__ import main
from kvstore_client.ctl.doctor_facts import rdma_facts, shared_facts
from kvstore_client.ctl.doctor_findings import (
    Finding,
    Verdict,
    as_document,
    as_lines,
    exit_status,
)
from kvstore_client.ctl.doctor_peer import (
    PeerFacts,
    TransferFacts,
    check_peer,
    check_transfer,
    foreign_agent,
    not_offered,
    transports_to_try,
    unable,
)
from kvstore_client.ctl.doctor_rdma import RAIL_BYTES, check_rdma, rdma_missing
from kvstore_client.ctl.doctor_rdma_facts import (
    DeviceFile,
    Library,
    LibraryFacts,
    MemlockFacts,
    PortState,
    RdmaFacts,
    library_state,
)
from kvstore_client.ctl.doctor_shared import SharedFacts, check_shared

GIB = 1024**3
LINK_LOCAL = Gid(0, "fe80::1", "RoCE v2")
IPV4 = Gid(1, "::ffff:10.1.0.7", "RoCE v2")
FILE = DeviceFile("mlx5_0", "/dev/infiniband/uverbs0", there=True, open=True)
OK, WARNING, FAILED, NOT_CHECKED = Verdict


def port(**changes: object) -> PortInfo:
    """A port that is as it should be."""
    made = PortInfo(
        number=1,
        active=True,
        link_layer="Ethernet",
        lid=0,
        mtu_bytes=4096,
        netdev="eth1",
        gids=(LINK_LOCAL, IPV4),
    )
    return made._replace(**changes)  # type: ignore[arg-type]


def host(**changes: object) -> RdmaFacts:
    """A host with one device that is as it should be."""
    made = RdmaFacts(
        wanted=False,
        library=LibraryFacts(Library.LOADS),
        files=(FILE,),
        devices=(DeviceInfo("mlx5_0", (port(),)),),
        devices_error="",
        states=(PortState("mlx5_0:1", "ACTIVE", 9000),),
        options=RdmaOptions(),
        local_address="",
        memlock=MemlockFacts(None, None, exempt=False, memory_bytes=GIB),
    )
    return made._replace(**changes)  # type: ignore[arg-type]


def bare(**changes: object) -> RdmaFacts:
    """A host that has nothing to do with RDMA."""
    nothing = host(library=LibraryFacts(Library.MISSING), files=(), devices=(), states=())
    return nothing._replace(**changes)  # type: ignore[arg-type]


def with_port(state: PortState | None = None, **changes: object) -> RdmaFacts:
    """A host whose only port is otherwise."""
    facts = host(devices=(DeviceInfo("mlx5_0", (port(**changes),)),))
    return facts if state is None else facts._replace(states=(state,))


def one(facts: RdmaFacts, check: str) -> Finding:
    """The only finding of a check."""
    (found,) = [finding for finding in check_rdma(facts) if finding.check == check]
    return found


# --- the host: RDMA --------------------------------------------------------------------------


def test_a_host_that_is_as_it_should_be_passes_all_checks() -> None:
    findings = check_rdma(host())
    assert [finding.check for finding in findings] == [
        "pyverbs",
        "RDMA devices",
        "device file mlx5_0",
        "port mlx5_0:1",
        "gid mlx5_0:1",
        "mtu mlx5_0:1",
        "rails",
        "locked memory",
    ]
    assert {finding.verdict for finding in findings} == {OK}
    assert not any(finding.remedy for finding in findings)
    assert rdma_missing(host()) == ""


def test_what_a_host_without_rdma_lacks_is_no_failure_unless_it_is_wanted() -> None:
    assert {finding.verdict for finding in check_rdma(bare())} == {NOT_CHECKED}
    assert "no RDMA device" in rdma_missing(bare())
    wanted = bare(wanted=True)
    assert one(wanted, "pyverbs").verdict is FAILED
    devices = one(wanted, "RDMA devices")
    assert devices.verdict is FAILED
    assert "modprobe" in devices.remedy


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (None, Library.MISSING),
        ("", Library.LOADS),
        (
            "/lib/libibverbs.so.1: version `IBVERBS_PRIVATE_59' not found",
            Library.OTHER_RELEASE,
        ),
        ("libibverbs.so.1: cannot open shared object file", Library.NO_LIBIBVERBS),
        ("No module named 'pyverbs.device'", Library.OTHER_PYTHON),
    ],
)
def test_why_pyverbs_does_not_load_is_told_by_what_python_said(
    said: str | None, state: Library
) -> None:
    assert library_state(said) is state


@pytest.mark.parametrize(
    ("library", "found", "remedy"),
    [
        (LibraryFacts(Library.MISSING), "not installed", "apt install .*python3-pyverbs"),
        (
            LibraryFacts(Library.MISSING, environment="/srv/venv"),
            "not installed",
            "not seen from /srv/venv",
        ),
        (
            LibraryFacts(
                Library.MISSING,
                environment="/srv/venv",
                elsewhere="/usr/lib/python3/dist-packages/pyverbs",
                elsewhere_python="3.11",
            ),
            "installed in /usr/lib/python3/dist-packages/pyverbs, where",
            "^ln -s /usr/lib/python3/dist-packages/pyverbs"
            " /srv/venv/lib/python3.11/site-packages/$",
        ),
        (
            LibraryFacts(Library.MISSING, elsewhere="/usr/lib/python3/dist-packages/pyverbs"),
            "where this Python does not look",
            "^PYTHONPATH=/usr/lib/python3/dist-packages,",
        ),
        (
            LibraryFacts(
                Library.MISSING, python="3.12", elsewhere="/x/pyverbs", elsewhere_python="3.11"
            ),
            "built for Python 3.11, and this is 3.12",
            "/usr/bin/python3 -m venv --system-site-packages",
        ),
        (
            LibraryFacts(Library.OTHER_RELEASE, "IBVERBS_PRIVATE_59 not found"),
            "another release .*IBVERBS_PRIVATE_59",
            "pip uninstall pyverbs",
        ),
        (
            LibraryFacts(Library.NO_LIBIBVERBS, "libibverbs.so.1: cannot open"),
            "does not find libibverbs",
            "apt install rdma-core",
        ),
        (
            LibraryFacts(Library.OTHER_PYTHON, "no module", python="3.13"),
            "does not load into Python 3.13",
            "system-site-packages",
        ),
    ],
)
def test_each_way_of_lacking_pyverbs_has_its_own_remedy(
    library: LibraryFacts, found: str, remedy: str
) -> None:
    finding = one(host(library=library), "pyverbs")
    assert finding.verdict is FAILED
    assert re.search(found, finding.found)
    assert re.search(remedy, finding.remedy)
    assert "pyverbs" in rdma_missing(host(library=library))


def test_a_broken_pyverbs_is_worth_a_warning_where_no_device_would_use_it() -> None:
    broken = bare(library=LibraryFacts(Library.OTHER_RELEASE, "IBVERBS_PRIVATE_59"))
    assert one(broken, "pyverbs").verdict is WARNING


def test_without_pyverbs_the_kernel_tells_of_ports_but_not_of_mtus() -> None:
    facts = with_port(mtu_bytes=0)._replace(library=LibraryFacts(Library.MISSING))
    assert one(facts, "RDMA devices").verdict is NOT_CHECKED
    assert one(facts, "gid mlx5_0:1").verdict is OK
    assert one(facts, "mtu mlx5_0:1").verdict is NOT_CHECKED
    assert one(facts, "rails").verdict is NOT_CHECKED


@pytest.mark.parametrize(
    ("file", "found", "remedy"),
    [
        (FILE._replace(path="", there=False), "offers none", "modprobe ib_uverbs"),
        (FILE._replace(there=False, open=False), "is missing", "--device /dev/infiniband"),
        (FILE._replace(open=False), "may not be opened", "usermod -aG"),
    ],
)
def test_a_device_that_may_not_be_opened(file: DeviceFile, found: str, remedy: str) -> None:
    finding = one(host(files=(file,)), "device file mlx5_0")
    assert finding.verdict is FAILED
    assert found in finding.found
    assert remedy in finding.remedy


def test_iwarp_is_named_and_not_used() -> None:
    iwarp = DeviceFile("cxgb4_0", "/dev/infiniband/uverbs1", True, True, iwarp=True)
    both = check_rdma(host(files=(FILE, iwarp)))
    assert "iWARP, not used: cxgb4_0" in both[1].found
    assert not any(finding.check == "device file cxgb4_0" for finding in both)
    alone = host(files=(iwarp,), devices=(), states=())
    assert one(alone, "RDMA devices").verdict is WARNING
    assert one(alone._replace(wanted=True), "RDMA devices").verdict is FAILED


def test_what_libibverbs_says_of_devices_is_passed_on() -> None:
    facts = host(devices=(), states=(), devices_error="libibverbs has no driver for mlx5_0")
    finding = one(facts, "RDMA devices")
    assert (finding.verdict, finding.found) == (FAILED, "libibverbs has no driver for mlx5_0")
    assert rdma_missing(facts) == finding.found


@pytest.mark.parametrize(
    ("state", "changes", "found", "remedy"),
    [
        ("DOWN", {}, "DOWN (Ethernet, eth1)", "ip link set eth1 up"),
        ("INIT", {"link_layer": "InfiniBand", "netdev": ""}, "INIT (InfiniBand)", "opensm"),
        ("DOWN", {"link_layer": "InfiniBand"}, "DOWN (InfiniBand", "cable"),
        ("", {"netdev": ""}, "not active (Ethernet)", "ip link set INTERFACE up"),
    ],
)
def test_a_port_that_is_not_up(
    state: str, changes: dict[str, object], found: str, remedy: str
) -> None:
    facts = with_port(PortState("mlx5_0:1", state), active=False, **changes)
    finding = one(facts, "port mlx5_0:1")
    assert finding.verdict is FAILED
    assert found in finding.found
    assert remedy in finding.remedy
    assert one(facts, "rails").verdict is FAILED
    assert "no RDMA port is up" in rdma_missing(facts)


def test_a_port_that_is_down_beside_one_that_is_up_is_a_warning_unless_it_was_named() -> None:
    devices = (
        DeviceInfo("mlx5_0", (port(active=False),)),
        DeviceInfo("mlx5_1", (port(),)),
    )
    facts = host(devices=devices)
    assert one(facts, "port mlx5_0:1").verdict is WARNING
    assert one(facts, "rails").found == "mlx5_1:1"
    named = facts._replace(options=RdmaOptions(devices=("mlx5_0",)))
    assert one(named, "port mlx5_0:1").verdict is FAILED
    assert not any(finding.check == "port mlx5_1:1" for finding in check_rdma(named))


@pytest.mark.parametrize(
    ("gids", "verdict", "found", "remedy"),
    [
        ((LINK_LOCAL, IPV4), OK, "index 1: ::ffff:10.1.0.7, RoCE v2", ""),
        ((LINK_LOCAL, Gid(2, "fd00::7", "RoCE v2")), OK, "index 2: fd00::7", ""),
        ((LINK_LOCAL,), WARNING, "reaches its own Ethernet alone", "ip address add"),
        ((Gid(0, "fe80::1", "RoCE v1"),), WARNING, "is not routed", "enable RoCE v2"),
        ((), FAILED, "eth1 has no address", "ip address add ADDRESS/LENGTH dev eth1"),
    ],
)
def test_the_gid_that_would_be_used(
    gids: tuple[Gid, ...], verdict: Verdict, found: str, remedy: str
) -> None:
    finding = one(with_port(gids=gids), "gid mlx5_0:1")
    assert finding.verdict is verdict
    assert found in finding.found
    assert remedy in finding.remedy
    assert bool(finding.remedy) is (verdict is not OK)


def test_the_gid_of_our_address_towards_the_peer_is_used() -> None:
    other = Gid(5, "::ffff:10.2.0.7", "RoCE v2")
    facts = with_port(gids=(IPV4, other))._replace(local_address="10.2.0.7")
    assert one(facts, "gid mlx5_0:1").values["index"] == 5


def test_a_gid_index_that_is_not_there() -> None:
    facts = host(options=RdmaOptions(gid_index=9))
    finding = one(facts, "gid mlx5_0:1")
    assert finding.verdict is FAILED
    assert "gid_index=9 is not there; there are: 0 (fe80::1, RoCE v2), 1 (" in finding.found
    assert "leave gid_index out" in finding.remedy


def test_infiniband_needs_no_gid_and_takes_the_mtu_of_its_subnet() -> None:
    facts = with_port(link_layer="InfiniBand", gids=(), mtu_bytes=2048, lid=7)
    assert one(facts, "gid mlx5_0:1").verdict is OK
    assert one(facts, "mtu mlx5_0:1").verdict is OK
    assert one(facts, "rails").verdict is OK


@pytest.mark.parametrize(
    ("mtu_bytes", "netdev_mtu_bytes", "verdict", "found"),
    [
        (4096, 4200, OK, "4096 bytes"),
        (1024, 1500, WARNING, "1024 bytes, since eth1 has 1500"),
        (1024, 0, WARNING, "1024 bytes, since by eth1"),
        (2048, 9000, OK, "the most that the device does"),
    ],
)
def test_the_mtu_of_ethernet_comes_of_its_interface(
    mtu_bytes: int, netdev_mtu_bytes: int, verdict: Verdict, found: str
) -> None:
    facts = with_port(PortState("mlx5_0:1", "ACTIVE", netdev_mtu_bytes), mtu_bytes=mtu_bytes)
    finding = one(facts, "mtu mlx5_0:1")
    assert finding.verdict is verdict
    assert found in finding.found
    assert finding.remedy.startswith("ip link set eth1 mtu 4200") is (verdict is WARNING)


@pytest.mark.parametrize(
    ("local_address", "verdict"),
    [
        ("", OK),
        ("10.1.0.7", OK),
        ("::ffff:10.1.0.7", OK),
        ("127.0.0.1", OK),
        ("fe80::1%eth1", OK),
        ("192.168.0.7", WARNING),
    ],
)
def test_a_peer_that_is_reached_by_another_network_is_doubted(
    local_address: str, verdict: Verdict
) -> None:
    finding = one(host(local_address=local_address), "rails")
    assert finding.verdict is verdict
    assert finding.values["rails"] == ["mlx5_0:1"]


@pytest.mark.parametrize(
    ("soft", "hard", "exempt", "verdict", "remedy"),
    [
        (None, None, False, OK, ""),
        (GIB + RAIL_BYTES, None, False, OK, ""),
        (8192 * 1024, None, True, OK, ""),
        (GIB, None, False, FAILED, "here: ulimit -l unlimited; in a systemd unit: LimitMEMLOCK="),
        (GIB, 2 * GIB, False, FAILED, "here: ulimit -l 2097152; in a systemd unit"),
        (GIB, GIB, False, FAILED, "in a systemd unit: LimitMEMLOCK=infinity"),
    ],
)
def test_the_limit_on_locked_memory(
    soft: int | None, hard: int | None, exempt: bool, verdict: Verdict, remedy: str
) -> None:
    finding = one(host(memlock=MemlockFacts(soft, hard, exempt, GIB)), "locked memory")
    assert finding.verdict is verdict
    assert finding.remedy.startswith(remedy)
    assert bool(finding.remedy) is (verdict is FAILED)


def test_memory_counts_once_for_each_rail() -> None:
    devices = tuple(DeviceInfo(f"mlx5_{number}", (port(),)) for number in range(2))
    limit = MemlockFacts(2 * GIB, 2 * GIB, exempt=False, memory_bytes=GIB)
    finding = one(host(devices=devices, memlock=limit), "locked memory")
    assert finding.verdict is FAILED
    assert finding.values["needed_bytes"] == 2 * (GIB + RAIL_BYTES)
    assert "1GiB on 2 rails" in finding.found


# --- the host: shared memory -----------------------------------------------------------------

SHARED = SharedFacts(False, "", "", False, "boot-1-2", 1000)


@pytest.mark.parametrize(
    ("changes", "verdicts", "remedy"),
    [
        ({}, [OK, OK, OK], ""),
        ({"create_error": "no"}, [WARNING, NOT_CHECKED, OK], "CONFIG_MEMFD_CREATE"),
        (
            {"create_error": "no", "wanted": True},
            [FAILED, NOT_CHECKED, OK],
            "CONFIG_MEMFD_CREATE",
        ),
        ({"protect_error": "no"}, [OK, WARNING, OK], "Linux 5.1"),
        ({"protect_error": "no", "wanted": True}, [OK, FAILED, OK], "Linux 5.1"),
        ({"writable_again": True}, [OK, FAILED, OK], "do not serve views"),
        ({"host": ""}, [OK, OK, WARNING], "mount /proc"),
    ],
)
def test_shared_memory(changes: dict[str, object], verdicts: list[Verdict], remedy: str) -> None:
    findings = check_shared(SHARED._replace(**changes))  # type: ignore[arg-type]
    assert [finding.verdict for finding in findings] == verdicts
    assert remedy in " ".join(finding.remedy for finding in findings)


# --- a peer ----------------------------------------------------------------------------------

TCP = PeerFacts("tcp://10.1.0.5:7450", "", "store-1", "daemon", 0.0005)
UNIX = TCP._replace(endpoint="unix:///run/k.sock", owner_uid=1000, user_id=1000)


@pytest.mark.parametrize(
    ("endpoint", "remedy"), [(TCP.endpoint, "firewall"), (UNIX.endpoint, "Group=")]
)
def test_a_peer_that_does_not_answer_fails_and_nothing_more_is_said(
    endpoint: str, remedy: str
) -> None:
    (finding,) = check_peer(PeerFacts(endpoint, "refused"))
    assert (finding.verdict, finding.found, finding.subject) == (FAILED, "refused", endpoint)
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("peer", "offered", "verdict", "found"),
    [
        (TCP, ["tcp"], OK, "tcp"),
        (TCP._replace(capabilities=("rdma",)), ["tcp", "rdma"], OK, "tcp, rdma"),
        (UNIX._replace(capabilities=("shm", "views")), ["unix", "shm"], OK, "views"),
        (UNIX, ["unix"], WARNING, "unix; no shared memory"),
        (UNIX._replace(owner_uid=0), ["unix"], WARNING, "as uid 0 and this process as 1000"),
        (
            TCP._replace(local="unix:///k", near_capabilities=("shm",)),
            ["tcp", "shm"],
            OK,
            "tcp, shm",
        ),
        (TCP._replace(local="unix:///k", near_error="denied"), ["tcp"], OK, "denied"),
        (TCP._replace(local="unix:///k"), ["tcp"], OK, "shares no memory by unix:///k"),
        (TCP._replace(other_space=True), ["tcp"], OK, "other files or another network"),
    ],
)
def test_what_a_peer_offers(
    peer: PeerFacts, offered: list[str], verdict: Verdict, found: str
) -> None:
    connection, offer = check_peer(peer)
    assert connection.verdict is OK
    assert "store-1 (daemon) answers in 0.500 ms" in connection.found
    assert offer.verdict is verdict
    assert offer.values["transports"] == offered
    assert found in offer.found


def test_transports_are_tried_that_are_offered_and_those_asked_for_that_are_not_fail() -> None:
    peer = TCP._replace(capabilities=("rdma",))
    assert transports_to_try(peer, []) == ["tcp", "rdma"]
    assert transports_to_try(peer, ["rdma", "shm"]) == ["rdma"]
    (missing,) = not_offered(peer, ["rdma", "shm"])
    assert (missing.check, missing.verdict) == ("transfer by shm", FAILED)
    assert "--listen unix:///PATH" in missing.remedy
    assert not_offered(peer, []) == []


def test_an_agent_takes_no_blocks_by_the_network() -> None:
    agent = TCP._replace(role="agent")
    assert transports_to_try(agent, []) == []
    assert [finding.verdict for finding in foreign_agent(agent)] == [NOT_CHECKED]
    assert foreign_agent(TCP) == []
    assert transports_to_try(UNIX._replace(role="agent"), []) == ["unix"]


def test_rdma_that_this_host_cannot_do_is_not_tried() -> None:
    finding = unable(TCP, "this host has no RDMA device")
    assert (finding.check, finding.verdict) == ("transfer by rdma", NOT_CHECKED)
    assert "tcp is used" in finding.found


MOVED = TransferFacts(
    "rdma", 4096, moved_by=("rdma",), put_s=0.001, fetch_s=0.002, rails=("mlx5_0:1",)
)


@pytest.mark.parametrize(
    ("changes", "verdict", "found"),
    [
        ({}, OK, "4KiB by rdma on mlx5_0:1: put in 1.00 ms, fetched and verified in 2.00 ms"),
        ({"refused": "pool 'x' alone"}, NOT_CHECKED, "pool 'x' alone"),
        ({"error": "put: TIMEOUT"}, FAILED, "put: TIMEOUT"),
        ({"error": "put: no", "warnings": ("rail gone",)}, FAILED, "put: no; rail gone"),
        ({"error": "put: no", "warnings": (f"{TCP.endpoint}: no",)}, FAILED, "put: no"),
        ({"moved_by": ("rdma", "tcp")}, FAILED, "by rdma, tcp"),
        ({"warnings": ("a rail is left out",)}, WARNING, "a rail is left out"),
        ({"deleted": False}, WARNING, "could not be deleted"),
    ],
)
def test_how_a_block_has_fared(changes: dict[str, object], verdict: Verdict, found: str) -> None:
    facts = MOVED._replace(**changes)  # type: ignore[arg-type]
    finding = check_transfer(TCP.endpoint, facts)
    assert (finding.check, finding.verdict) == ("transfer by rdma", verdict)
    assert found in finding.found
    assert finding.found.count("no") < 2
    assert bool(finding.remedy) is (verdict is FAILED)


@pytest.mark.parametrize(
    ("transport", "remedy"), [("rdma", "UDP port 4791"), ("shm", "same user"), ("tcp", "log")]
)
def test_a_transfer_that_failed_has_the_remedy_of_its_transport(
    transport: str, remedy: str
) -> None:
    failed = TransferFacts(transport, 4096, error="put: UNAVAILABLE")
    assert remedy in check_transfer(TCP.endpoint, failed).remedy


# --- what is shown ---------------------------------------------------------------------------

FINDINGS = [
    Finding("one", OK, "fine"),
    Finding("other", FAILED, "bad \x1b[2J", "type this", "tcp://h:1"),
    Finding("three", NOT_CHECKED, "no", values={"n": 1}),
]


def test_findings_are_shown_by_subject_with_what_to_type() -> None:
    assert as_lines(FINDINGS) == [
        "this host",
        "  ok           one    fine",
        "  not checked  three  no",
        "",
        "tcp://h:1",
        "  failed       other  bad \\x1b[2J",
        "                      -> type this",
        "",
        "3 checks: 1 ok, 1 failed, 1 not checked",
    ]


def test_findings_for_programs_have_every_field() -> None:
    told = json.loads(json.dumps(as_document(FINDINGS)))
    assert told["format"] == 1
    assert told["checks"][1]["endpoint"] == "tcp://h:1"
    assert told["checks"][2] == {
        "endpoint": None,
        "check": "three",
        "verdict": "not_checked",
        "found": "no",
        "remedy": None,
        "values": {"n": 1},
    }


def test_only_what_failed_makes_the_command_fail() -> None:
    assert exit_status(FINDINGS) == 1
    assert exit_status([*FINDINGS[::2], Finding("x", WARNING, "hm")]) == 0
    assert exit_status([]) == 0


def test_the_help_names_every_value_of_the_json() -> None:
    findings = [
        *check_rdma(host()),
        *check_shared(SHARED),
        *check_peer(TCP),
        check_transfer(TCP.endpoint, MOVED),
    ]
    told = set(re.findall(r"\w+", doctor.EPILOG.partition("--json:")[2]))
    assert {name for finding in findings for name in finding.values} <= told
    assert set(as_document(findings)["checks"][0]) <= told


# --- what is gathered ------------------------------------------------------------------------


def test_facts_of_this_host_can_be_gathered_and_judged() -> None:
    rdma = rdma_facts(False, RdmaOptions(), "", GIB)
    shared = shared_facts(False)
    assert check_rdma(rdma)
    assert rdma.memlock.memory_bytes == GIB
    assert [finding.verdict for finding in check_shared(shared)] == [OK, OK, OK]


def test_a_package_of_the_distribution_is_found_with_its_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pyverbs"
    package.mkdir()
    (package / "device.cpython-312-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr("kvstore_client.ctl.doctor_facts._PACKAGES", (tmp_path,))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pyverbs_import._modules.cache_clear()  # it may be there, and loaded
    library = rdma_facts(True, RdmaOptions(), "", GIB).library
    assert library.state is Library.MISSING
    assert (library.elsewhere, library.elsewhere_python) == (str(package), "3.12")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("doctor", "here"), "URI=here: must be one of tcp://HOST:PORT"),
        (("doctor", "tcp://h:0"), "URI=tcp://h:0: needs a host and a port"),
        (("doctor", "tcp://h:1", "--endpoint", "tcp://h:2"), "one peer is checked at a time"),
        (("doctor", "--transport", "pigeon"), "--transport=pigeon: must be one of tcp, unix"),
        (("doctor", "--memory", "much"), "--memory=much: a size is a number"),
        (("doctor", "rdma://h:1?mtu=5"), "mtu=5: must be 0 (the port's) or one of"),
    ],
)
def test_a_wrong_option_gets_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"kvctl: error: .*\n", shown.err)
    assert said in shown.err


def test_help_fits_and_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"examples:\n  kvctl doctor", shown)
    assert max(map(len, shown.splitlines())) <= 100
