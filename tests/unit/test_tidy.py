"""House rules that a machine can check: CONTRIBUTING.md gives the reasons."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.tree import ROOT, modules, parse, source_files

LINE_LENGTH_MAX = 100
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700

TEXT_FILES = [
    *source_files(".py", ".cfg", ".toml", ".ini", ".sh", ".service", ".md"),
    *(path for path in (ROOT / "Makefile", ROOT / ".ci" / "run") if path.exists()),
]
PYTHON_FILES = source_files(".py")
LIBRARY = {
    name: path
    for name, path in modules().items()
    if name.split(".")[0] != "kvstore_bench" and path.name != "__main__.py" and ".ctl" not in name
}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=label(path)) for path in paths]


@pytest.mark.parametrize("path", named([p for p in TEXT_FILES if p.suffix != ".md"]))
def test_lines_fit(path: Path) -> None:
    # Tables in documents may be wider.
    long = [
        n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > LINE_LENGTH_MAX
    ]
    assert not long, f"{label(path)}: lines {long} have more than {LINE_LENGTH_MAX} columns"


@pytest.mark.parametrize("path", named(TEXT_FILES))
def test_text_is_clean(path: Path) -> None:
    text = path.read_text()
    assert text == "" or text.endswith("\n"), "no newline at the end"
    assert "\r" not in text
    ragged = [n for n, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
    assert not ragged, f"white space at the end of lines {ragged}"


@pytest.mark.parametrize("path", named(TEXT_FILES))
def test_nothing_is_left_to_do(path: Path) -> None:
    # Split, so that this file does not find itself.
    left = re.findall("TO" + "DO|FIX" + r"ME|\bX" + r"XX\b|\bHA" + r"CK\b", path.read_text())
    assert not left, "do it, or say what falls short in the documentation"


@pytest.mark.parametrize("path", named(TEXT_FILES))
def test_text_speaks_of_the_product_alone(path: Path) -> None:
    # A reader has neither our tracker nor our directories.
    outside = re.findall(
        r"\bissues? #?\d+|\bpull request #?\d+|(?<![\w.])/(?:home|Users|work)/\w+",
        path.read_text(),
        re.IGNORECASE,
    )
    assert not outside or path == Path(__file__)


@pytest.mark.parametrize("path", named(source_files(".md")))
def test_links_lead_to_files_of_this_repository(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            found = (path.parent / target).resolve()
            assert found.is_relative_to(ROOT), f"{target} leads out of the repository"
            assert found.exists(), f"{target} does not exist"


@pytest.mark.parametrize("path", named(PYTHON_FILES))
def test_names_of_modules_say_something(path: Path) -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "stuff"}
    assert path.stem not in vague
    assert re.fullmatch(r"[a-z][a-z0-9_]*|__init__|__main__", path.stem)


@pytest.mark.parametrize("path", named(PYTHON_FILES))
def test_modules_say_what_they_are(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, f"{label(path)} has no docstring"


@pytest.mark.parametrize("name", sorted(modules()))
def test_public_classes_and_functions_say_what_they_are(name: str) -> None:
    silent = [
        node.name
        for node in parse(modules()[name]).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"{name}: {silent} have no docstring"


@pytest.mark.parametrize("path", named(PYTHON_FILES))
def test_functions_fit_a_screen_and_files_have_one_idea(path: Path) -> None:
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{label(path)}: {node.name} has {lines} lines"
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES_MAX, f"{label(path)} has {lines} lines"


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_library_code_logs_and_never_prints(name: str) -> None:
    for node in ast.walk(parse(LIBRARY[name])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "breakpoint"), f"line {node.lineno}"


@pytest.mark.parametrize("path", named([p for p in PYTHON_FILES if p.name.startswith("test_")]))
def test_tests_do_not_sleep_to_wait(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            seconds = ast.unparse(node.args[0]) if node.args else ""
            # asyncio.sleep(0) lets the loop turn once, and an hour stands for a peer that
            # hangs until the test cancels it; anything between waits for luck.
            assert name != "sleep" or seconds in ("0", "3600"), f"line {node.lineno} sleeps"
