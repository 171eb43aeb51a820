"""The error tree is the one in its docstring."""

from __future__ import annotations

import inspect

from kvstore import errors
from kvstore.errors import ConfigError, KVStoreError, LayoutMismatch


def documented_tree() -> dict[str, str]:
    """Parent of each class, as the docstring indents them."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        indent = len(line) - len(line.lstrip())
        if indent < 4:
            continue
        name = line.split()[0]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        parents[name] = stack[-1][1] if stack else "Exception"
        stack.append((indent, name))
    return parents


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, KVStoreError)
    }
    assert documented_tree() == classes
    assert len(classes) > 10


def test_what_went_wrong_is_an_attribute_too() -> None:
    mismatch = LayoutMismatch("another dtype", "dtype")
    assert (str(mismatch), mismatch.field) == ("another dtype", "dtype")
    config = ConfigError("--memory", "1 B", "at least 1 MiB")
    assert str(config) == "--memory=1 B: at least 1 MiB"
    assert (config.option, config.value, config.remedy) == ("--memory", "1 B", "at least 1 MiB")
