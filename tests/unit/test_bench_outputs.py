"""Where results go: files are replaced whole, and what is no file is written to as it is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore_bench.outputs import OutputError, check_output, write_output, writing


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    with writing("--output", path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write_half() -> None:
        with writing("--output", path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "a.json", tmp_path / "link.json"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    check_output("--output", link)
    assert target.exists() == exists
    write_output("--output", link, b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_output("--output", pipe)
        write_output("--output", pipe, b"new")
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_full_device_is_an_error_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    check_output("--json", link)
    with pytest.raises(OutputError, match=r"--json=.*full: cannot be written: No space"):
        write_output("--json", link, b"new")
    assert link.is_char_device()


def test_the_check_leaves_all_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    check_output("--output", path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_output("--output", path)
    assert path.read_text() == "old"


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plot=.*: there is no folder .*none; make it first"):
        check_output("--plot", tmp_path / "none" / "a.png")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        check_output("--plot", tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="cannot be written: Too many levels"):
        check_output("--plot", loop)
