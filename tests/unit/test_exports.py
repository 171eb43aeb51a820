"""The public surface: what packages offer by name is what they mean to offer."""

from __future__ import annotations

import importlib
import types

import pytest

from tests.support.tree import modules

# Packages whose names other people import. Of the rest the modules are imported, and their
# `__init__` may use names that it does not offer.
PUBLIC = ["kvstore_client"]

PACKAGES = [name for name, path in modules().items() if path.name == "__init__.py"]


def public_names(package: types.ModuleType) -> dict[str, object]:
    """Names without an underscore; modules and `annotations` left out."""
    return {
        name: value
        for name, value in vars(package).items()
        if not name.startswith("_")
        and name != "annotations"  # from __future__
        and not isinstance(value, types.ModuleType)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_those_in_all(name: str) -> None:
    package = importlib.import_module(name)
    assert sorted(package.__all__) == sorted(public_names(package))


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_offer_what_they_define_and_nothing_that_is_missing(name: str) -> None:
    package = importlib.import_module(name)
    offered = getattr(package, "__all__", [])
    assert len(set(offered)) == len(offered), "a name is listed twice"
    for offer in offered:
        assert hasattr(package, offer), f"{name}.__all__ names {offer}, which does not exist"
    defined = {
        defined
        for defined, value in public_names(package).items()
        if getattr(value, "__module__", None) == name
    }
    assert defined <= set(offered)
