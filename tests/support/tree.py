"""The source tree as the tests about it see it: its files, packages and imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Each import package, and the directory that holds it.
PACKAGES = {
    "kvstore": ROOT / "kvstore",
    "kvstore_daemon": ROOT / "daemon" / "kvstore_daemon",
    "kvstore_client": ROOT / "client" / "kvstore_client",
    "kvstore_bench": ROOT / "bench" / "kvstore_bench",
}

_SOURCE_DIRECTORIES = ("kvstore", "daemon", "client", "bench", "docs", "systemd", "tests", ".ci")
_MADE_BY_TOOLS = ("__pycache__", "egg-info")


def source_files(*suffixes: str) -> list[Path]:
    """All files of the project with one of `suffixes`, those made by tools left out."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for name in _SOURCE_DIRECTORIES:
        found += [path for path in (ROOT / name).rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if path.suffix in suffixes and not any(word in str(path) for word in _MADE_BY_TOOLS)
    )


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = (package, *path.relative_to(directory).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.module
            # `from package import module` imports the module; for other names this yields
            # something that is no module, which nobody looks for.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
