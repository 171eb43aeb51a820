"""`kvctl doctor` on the system's own verbs: where there are devices, and in the virtual machine of
`make test-rdma`."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.transport.pyverbs_layer import PyVerbs
from kvstore_client.ctl import doctor
from kvstore_client.ctl.options import Common
from tests.support.cluster import serve
from tests.support.tree import PACKAGES
from tests.support.verbsdevices import in_guest, real_rails

RAILS = real_rails()
PATIENCE_S = 60.0
MIB = 1024 * 1024
NOBODY = 65534


async def run(uri: str | None, *transports: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the command; its exit status, and what it found, by check."""
    given = argparse.Namespace(
        peer=uri, endpoints=[], after_endpoints=[], memory="1MiB", transport=list(transports)
    )
    output = io.StringIO()
    common = Common(endpoints=(), timeout_s=PATIENCE_S, json=True)
    ended = await doctor.run(common, given, output)
    return ended, {one["check"]: one for one in json.loads(output.getvalue())["checks"]}


def guest_only() -> None:
    """Skip what changes the machine."""
    if not in_guest():
        pytest.skip("would change this machine")


@pytest.mark.asyncio
async def test_devices_are_found_and_a_block_goes_there_and_back() -> None:
    async with serve(arena_bytes=4 * MIB, listen="rdma://127.0.0.1:0") as (node,):
        ended, checks = await run(node.uri)
        assert ended == 0, checks
        assert checks["pyverbs"]["verdict"] == "ok"
        moved = checks["transfer by rdma"]["values"]
        assert moved["transport"] == "rdma"
        names = [f"{setup.device}:{setup.port}" for setup in RAILS]
        assert sorted(moved["rails"]) == sorted(names)
        for setup in RAILS:
            name = f"{setup.device}:{setup.port}"
            assert checks[f"gid {name}"]["values"]["index"] == setup.gid_index
            assert checks[f"device file {setup.device}"]["verdict"] == "ok"


def test_a_small_mtu_of_the_interface_is_seen() -> None:
    guest_only()
    device = PyVerbs().devices()[-1]
    name, netdev = device.name, device.ports[0].netdev
    was = Path(f"/sys/class/net/{netdev}/mtu").read_text().strip()
    subprocess.run(["ip", "link", "set", netdev, "mtu", "1500"], check=True)
    try:
        ended, checks = asyncio.run(run(None))
    finally:
        subprocess.run(["ip", "link", "set", netdev, "mtu", was], check=True)
    assert ended == 0
    found = checks[f"mtu {name}:1"]
    assert found["verdict"] == "warning"
    assert found["values"] == {"mtu_bytes": 1024, "netdev_mtu_bytes": 1500}
    assert found["remedy"].startswith(f"ip link set {netdev} mtu 4200")


@pytest.mark.asyncio
async def test_the_kernel_tells_without_pyverbs_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> PyVerbs:
        from kvstore.transport.verbs import VerbsMissing

        raise VerbsMissing("the package pyverbs is not installed")

    _, known = await run(None)
    monkeypatch.setattr("kvstore.transport.verbs.system_verbs", missing)
    ended, checks = await run(None)
    assert ended == 1
    for setup in RAILS:
        name = f"{setup.device}:{setup.port}"
        assert checks[f"gid {name}"] == known[f"gid {name}"]
        assert checks[f"port {name}"] == known[f"port {name}"]
        assert checks[f"mtu {name}"]["verdict"] == "not_checked"


def test_the_limit_on_locked_memory_binds_others_than_root() -> None:
    guest_only()
    path = ":".join(dict.fromkeys(str(directory.parent) for directory in PACKAGES.values()))
    known = os.environ.get("PYTHONPATH", "")
    ended = subprocess.run(
        [
            *("prlimit", "--memlock=8388608:8388608"),
            *("setpriv", "--reuid", str(NOBODY), "--clear-groups", "--bounding-set=-all"),
            *(sys.executable, "-m", "kvstore_client.ctl", "doctor", "--json"),
            *("--memory", "64MiB"),
        ],
        env={**os.environ, "PYTHONPATH": f"{path}:{known}"},
        capture_output=True,
        text=True,
    )
    checks = {one["check"]: one for one in json.loads(ended.stdout)["checks"]}
    found = checks["locked memory"]
    assert (ended.returncode, found["verdict"]) == (1, "failed"), ended.stderr
    assert found["values"]["limit_bytes"] == 8388608
    assert "LimitMEMLOCK=infinity" in found["remedy"]
