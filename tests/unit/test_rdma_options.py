"""Options of RDMA are checked, and reach the queue pairs."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.transport.rdma_options import RdmaOptions, check_rdma_options, parse_device


def test_defaults_can_be() -> None:
    options = RdmaOptions()
    assert check_rdma_options(options) is options


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("devices", ("",), "must be a device or device:port"),
        ("devices", (":1",), "must be a device or device:port"),
        ("devices", ("mlx5_0:",), "must be a device or device:port"),
        ("devices", ("mlx5_0:0",), "must be a device or device:port"),
        ("devices", ("mlx5_0:1:2",), "must be a device or device:port"),
        ("devices", ("mlx5_0", "mlx5_1", "mlx5_0"), "must be given once"),
        ("gid_index", -2, "from -1 to 255"),
        ("gid_index", 256, "from -1 to 255"),
        ("mtu_bytes", 1500, "must be 0"),
        ("service_level", 16, "from 0 to 15"),
        ("traffic_class", 256, "from 0 to 255"),
        ("timeout", 0, "from 1 to 31"),
        ("retry_count", 7, "from 0 to 6"),
        ("rnr_retry", 8, "from 0 to 7"),
        ("min_rnr_timer", 32, "from 0 to 31"),
        ("rails_max", 0, "from 1 to 8"),
        ("rails_max", 9, "from 1 to 8"),
        ("stall_s", 0.0, "above 0"),
        ("stall_s", 3601.0, "at most 3600"),
        ("stall_s", float("nan"), "above 0"),
    ],
)
def test_what_cannot_be_is_named(option: str, value: object, remedy: str) -> None:
    options = RdmaOptions(**{option: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=remedy) as told:
        check_rdma_options(options)
    assert told.value.option == option


@pytest.mark.parametrize(("text", "parsed"), [("mlx5_0", ("mlx5_0", 0)), ("rxe0:1", ("rxe0", 1))])
def test_device_is_a_name_and_perhaps_a_port(text: str, parsed: tuple[str, int]) -> None:
    assert parse_device(text) == parsed


def test_all_that_a_queue_pair_is_told() -> None:
    options = RdmaOptions(
        service_level=1, traffic_class=2, timeout=3, retry_count=4, rnr_retry=5, min_rnr_timer=6
    )
    assert tuple(options.tuning(7)) == (1, 2, 3, 4, 5, 6, 7)
