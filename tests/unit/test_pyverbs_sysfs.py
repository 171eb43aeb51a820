"""What sysfs tells of devices, read out of a directory that looks like it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.transport import pyverbs_sysfs as sysfs
from kvstore.transport.verbs import Gid

ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a4d:0001"


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A port of a device, active and with no gid."""
    monkeypatch.setattr(sysfs, "CLASS", tmp_path / "infiniband")
    monkeypatch.setattr(sysfs, "_VERBS_CLASS", tmp_path / "infiniband_verbs")
    directory = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    (directory / "gids").mkdir(parents=True)
    (directory / "gid_attrs" / "types").mkdir(parents=True)
    (directory / "state").write_text("4: ACTIVE\n")
    verbs = tmp_path / "infiniband_verbs" / "uverbs3"
    verbs.mkdir(parents=True)
    (verbs / "ibdev").write_text("mlx5_0\n")
    return directory


def give(port: Path, gids: dict[int, str], count: int = 256) -> None:
    """Fill the gid table."""
    for index in range(count):
        (port / "gids" / str(index)).write_text(gids.get(index, ZERO) + "\n")
        if index in gids:
            (port / "gid_attrs" / "types" / str(index)).write_text("RoCE v2\n")


def test_gids_that_are_all_zero_are_none(port: Path) -> None:
    give(port, {1: IPV4, 20: IPV4.replace("0a4d", "0a4e")})
    assert sysfs.gids("mlx5_0", 1) == [
        Gid(1, "::ffff:10.77.0.1", "RoCE v2"),
        Gid(20, "::ffff:10.78.0.1", "RoCE v2"),
    ]
    assert sysfs.gid("mlx5_0", 1, 0) is None
    assert sysfs.gid("mlx5_0", 1, 300) is None


def test_end_of_a_large_table_is_not_searched_and_can_be_named(port: Path) -> None:
    give(port, {0: IPV4, 200: IPV4})
    assert [gid.number for gid in sysfs.gids("mlx5_0", 1)] == [0]
    assert sysfs.gid("mlx5_0", 1, 200) == Gid(200, "::ffff:10.77.0.1", "RoCE v2")


def test_devices_have_files(port: Path) -> None:
    assert sysfs.device_names() == ["mlx5_0"]
    assert sysfs.device_file("mlx5_0") == Path("/dev/infiniband/uverbs3")
    assert sysfs.device_file("mlx5_1") is None


def test_machine_without_devices_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs, "CLASS", tmp_path / "none")
    monkeypatch.setattr(sysfs, "_VERBS_CLASS", tmp_path / "none")
    assert sysfs.device_names() == []
    assert sysfs.device_file("mlx5_0") is None
    with pytest.raises(OSError):
        sysfs.PortWatch("mlx5_0", 1)


def test_port_that_is_not_active_says_its_state(port: Path) -> None:
    watch = sysfs.PortWatch("mlx5_0", 1)
    assert watch.failed() == ""
    (port / "state").write_text("1: DOWN\n")
    assert watch.failed() == "mlx5_0:1: the port is 1: DOWN"
    (port / "state").write_text("4: ACTIVE\n")
    assert watch.failed() == ""
    watch.close()
    watch.close()


@pytest.mark.parametrize("text", ["::ffff:10.77.0.1", IPV4])
def test_gid_is_spelt_out(text: str) -> None:
    assert sysfs.gid_groups(text) == IPV4
    assert sysfs.gid_text(bytes.fromhex(IPV4.replace(":", ""))) == "::ffff:10.77.0.1"


@pytest.mark.parametrize("text", ["", "10.77.0.1", "fe80::zz", "fe80::1%eth0"])
def test_what_is_no_gid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no gid"):
        sysfs.gid_groups(text)
