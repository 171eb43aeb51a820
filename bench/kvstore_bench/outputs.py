"""Files that results go to: looked at before the work begins, written when it is done.

A file takes the place of what was there only when all of it is written, so that a run that fails
leaves the old one. That needs a rename, and a rename would put a file in the place of a device
or a pipe: what is neither a file nor absent is written to as it stands. Links are followed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvstore.errors import ConfigError, KVStoreError


class OutputError(KVStoreError):
    """Raised when a result could not be written; names the option and the path."""


def check_output(option: str, path: Path) -> None:
    """Refuse now what could not be written after the work; what is there stays as it is.

    Args:
        option: As the operator typed it, for the error.

    Raises:
        ConfigError: Says what is in the way.
    """
    try:
        target = _replaceable(path)
        if target is None:
            if path.is_dir():
                raise ConfigError(option, path, "is a folder; name a file in it")
            if not os.access(path, os.W_OK):
                raise ConfigError(option, path, "cannot be written: Permission denied")
            return
        if not target.parent.is_dir():
            raise ConfigError(option, path, f"there is no folder {target.parent}; make it first")
        if _in_place(target):
            return
        partial = _partial(target)
        partial.open("xb").close()
        partial.unlink()
    except OSError as error:
        remedy = f"cannot be written: {error.strerror}; name another place"
        raise ConfigError(option, path, remedy) from error


@contextmanager
def writing(option: str, path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written.

    Args:
        option: As the operator typed it, for the error.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        target = _replaceable(path)
        if target is None or _in_place(target):
            with path.open("wb") as file:
                yield file
            return
        partial = _partial(target)
        try:
            with partial.open("xb") as file:
                yield file
            with suppress(FileNotFoundError):
                shutil.copymode(target, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{option}={path}: cannot be written: {error.strerror}") from error


def write_output(option: str, path: Path, data: bytes) -> None:
    """Let `data` take the place of what is at `path`.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(option, path) as file:
        file.write(data)


def _replaceable(path: Path) -> Path | None:
    """Where a file can take the place of `path`; None if what is there is no file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    # Not what a link would say of itself: the rename has to meet the file behind it.
    return Path(os.path.realpath(path)) if stat.S_ISREG(mode) else None


def _in_place(target: Path) -> bool:
    """Whether a file may be written, and none beside it."""
    folder_is_ours = os.access(target.parent, os.W_OK | os.X_OK)
    return not folder_is_ours and target.exists() and os.access(target, os.W_OK)


def _partial(target: Path) -> Path:
    return target.with_name(f".kvbench-{secrets.token_hex(4)}.partial")


__all__ = ["OutputError", "check_output", "write_output", "writing"]
