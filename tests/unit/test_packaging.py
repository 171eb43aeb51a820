"""What gets installed: all packages, their data, and commands that run outside the checkout."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.tree import PACKAGES, ROOT, imports, modules

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")

# The first version that knows license expressions; setup.cfg's build requirement.
SETUPTOOLS_VERSION_MIN = 77

# Imported only where an adapter or a transport is used that needs it.
OPTIONAL = {"torch", "vllm", "sglang", "lmcache", "transformers", "pyverbs"}


def values(section: str, option: str) -> list[str]:
    return [line for line in SETUP[section][option].splitlines() if line]


def entry_points() -> dict[str, str]:
    lines = values("options.entry_points", "console_scripts")
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines)  # type: ignore[misc]


def test_packages_are_those_of_the_tree() -> None:
    # A package that is missing here works in an editable install and not in a wheel.
    tree = set()
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            tree.add(".".join((package, *path.parent.relative_to(directory).parts)))
    assert sorted(tree) == sorted(values("options", "packages"))


def test_every_package_has_an_init() -> None:
    names = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(values("options", "packages")) <= names


def test_packages_lie_where_setup_says() -> None:
    mapped = dict(line.split(" = ") for line in values("options", "package_dir"))
    assert mapped == {name: str(path.relative_to(ROOT)) for name, path in PACKAGES.items()}


def test_files_that_are_no_modules_are_package_data() -> None:
    patterns = {
        package: values("options.package_data", package)
        for package in SETUP["options.package_data"]
    }
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            name = str(path.relative_to(directory))
            allowed = patterns["*"] + patterns.get(package, [])
            assert any(fnmatch.fnmatch(name, p) for p in allowed), f"{package}: {name}"
        assert (directory / "py.typed").exists()


@pytest.mark.parametrize("command", sorted(entry_points()))
def test_commands_have_a_main(command: str) -> None:
    module, _, function = entry_points()[command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_import_is_a_dependency() -> None:
    required = values("options", "install_requires")
    for name, path in modules().items():
        given = [*required, *values("options.extras_require", "bench")]
        if not name.startswith("kvstore_bench"):
            given = required
        known = {re.split(r"[ <>=~!]", line)[0].replace("-", "_") for line in given}
        outside = {imported.partition(".")[0] for imported in imports(path)}
        missing = outside - known - sys.stdlib_module_names - set(PACKAGES) - OPTIONAL
        assert not missing, f"{name} imports {sorted(missing)}, which setup.cfg does not require"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with our wheel, and the dependencies of the running one."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < SETUPTOOLS_VERSION_MIN:
        pytest.skip(f"setuptools {setuptools} cannot build it; `make test` installs a newer one")
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "tests")
    )
    pip = [sys.executable, "-m", "pip", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(directory), str(source)])
    (wheel,) = directory.glob("*.whl")
    environment = directory / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run([*pip, "--python", str(python), "install", *offline, str(wheel)])
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file is appended as it is: .pth files over there, and with them an
    # editable install of ourselves, have no effect here.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def run(command: list[str]) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd="/", env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.slow
def test_every_module_imports_from_the_wheel(installed: Path) -> None:
    names = [name for name in modules() if ".adapters." not in name]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    program += "print(sys.modules['kvstore'].__file__)"
    output = run([str(installed / "bin" / "python"), "-W", "error", "-c", program, *names])
    assert Path(output.strip()).is_relative_to(installed)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(entry_points()))
def test_commands_run_from_the_wheel(installed: Path, command: str) -> None:
    assert "usage:" in run([str(installed / "bin" / command), "--help"]).lower()


@pytest.mark.slow
def test_wheel_has_the_licence_and_the_types(installed: Path) -> None:
    (site_packages,) = installed.glob("lib/python*/site-packages")
    (information,) = site_packages.glob("dualpath_kvstore-*.dist-info")
    assert list(information.rglob("LICENSE"))
    for package in PACKAGES:
        assert (site_packages / package / "py.typed").exists()
