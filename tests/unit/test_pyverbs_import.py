"""What is said when pyverbs is missing, or is there and does not load."""

from __future__ import annotations

import errno
import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import pyverbs_import
from kvstore.transport.pyverbs_import import load, no_memory, translated
from kvstore.transport.verbs import VerbsError, VerbsForbidden, VerbsMissing

PARTS = ("addr", "cq", "device", "mr", "pd", "qp", "wr")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a package pyverbs of the test's own is found."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "pyverbs"]

    directory = tmp_path / "pyverbs"
    directory.mkdir()
    (directory / "__init__.py").touch()
    # The system's own may be loaded, and cannot be loaded twice: it comes back.
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    pyverbs_import._modules.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield directory
    for name in loaded():
        del sys.modules[name]
    pyverbs_import._modules.cache_clear()


def fill(package: Path, enums: str, device: str = "") -> None:
    """Make the package look like one."""
    for part in (*PARTS, enums):
        (package / f"{part}.py").touch()
    (package / "device.py").write_text(device)
    (package / "pyverbs_error.py").write_text("class PyverbsError(Exception): pass\n")


def test_package_that_is_missing_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pyverbs_import._modules.cache_clear()
    with pytest.raises(VerbsMissing, match=r"not installed: .*apt install python3-pyverbs; .*dnf"):
        load()


@pytest.mark.parametrize("enums", ["enums", "libibverbs_enums"])
def test_constants_are_found_where_the_release_has_them(package: Path, enums: str) -> None:
    fill(package, enums)
    modules = load()
    assert modules.enums.__name__ == f"pyverbs.{enums}"
    assert modules.device.__name__ == "pyverbs.device"
    assert modules.error.__name__ == "PyverbsError"
    assert load() is modules


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "/lib/libibverbs.so.1: version `IBVERBS_PRIVATE_59' not found",
            r"another release than this system's libibverbs .*_PRIVATE_59.*python3-pyverbs",
        ),
        (
            "libibverbs.so.1: cannot open shared object file: No such file or directory",
            "does not find libibverbs",
        ),
        (
            "undefined symbol: _PyUnicode_Ready",
            rf"does not load into Python 3\.{sys.version_info[1]} .*own python3",
        ),
    ],
)
def test_package_that_does_not_load_says_why(package: Path, text: str, told: str) -> None:
    fill(package, "enums", f"raise ImportError({text!r})")
    with pytest.raises(VerbsMissing, match=told):
        load()


def test_package_for_another_python_says_so(package: Path) -> None:
    # Its modules have names that this Python does not look for.
    (package / "enums.cpython-399-x86_64-linux-gnu.so").touch()
    with pytest.raises(VerbsMissing, match="does not load into Python"):
        load()


def test_logging_stays_as_it_was(package: Path) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    fill(
        package,
        "enums",
        "import logging\nlogging.getLogger().addHandler(logging.StreamHandler())\n"
        "logging.getLogger().setLevel(5)\n",
    )
    load()
    assert (list(root.handlers), root.level) == before


class Refusal(Exception):
    """As pyverbs raises it."""

    def __init__(self, text: str, error_code: int) -> None:
        super().__init__(text)
        self.error_code = error_code


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, VerbsForbidden),
        (errno.EPERM, VerbsForbidden),
        (errno.EINVAL, VerbsError),
        (-1, VerbsError),
    ],
)
def test_error_is_sorted_by_what_the_system_said(number: int, kind: type[VerbsError]) -> None:
    text = "Failed" if number < 0 else f"Failed. Errno: {number}, some reason"
    error = translated("open rxe0", Refusal(text, number))
    assert type(error) is kind
    told = "open rxe0: Failed" if number < 0 else "open rxe0: Failed: some reason"
    assert str(error).startswith(told)


def test_limit_on_locked_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal("Failed. Errno: 12, Cannot allocate memory", errno.ENOMEM)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    error = no_memory("register 1 bytes", refusal)
    assert isinstance(error, VerbsForbidden)
    assert "65536 bytes; set LimitMEMLOCK=infinity" in str(error)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert type(no_memory("register 1 bytes", refusal)) is VerbsError
