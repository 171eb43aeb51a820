"""The dependency rule, and the promise that pure modules are pure.

::

    kvstore_client ──▶ kvstore ◀── kvstore_daemon          kvstore_bench ──▶ all of them
"""

from __future__ import annotations

import pytest

from tests.support.tree import PACKAGES, imports, modules

ALLOWED = {
    "kvstore": {"kvstore"},
    "kvstore_daemon": {"kvstore", "kvstore_daemon"},
    "kvstore_client": {"kvstore", "kvstore_client"},
    "kvstore_bench": set(PACKAGES),
}

# Modules that take bytes, values, `now` and draws, and return values: what decides.
PURE = {
    "kvstore.allocator",
    "kvstore.allowance",
    "kvstore.blocksource",
    "kvstore.checksum",
    "kvstore.endpoint",
    "kvstore.errorcodes",
    "kvstore.errors",
    "kvstore.fields",
    "kvstore.framing",
    "kvstore.layout",
    "kvstore.loadreport",
    "kvstore.loglimit",
    "kvstore.memorymap",
    "kvstore.memorymessages",
    "kvstore.messages",
    "kvstore.protocol",
    "kvstore.protocol.base",
    "kvstore.protocol.client",
    "kvstore.protocol.copying",
    "kvstore.protocol.placing",
    "kvstore.protocol.server",
    "kvstore.protocol.strands",
    "kvstore.rates",
    "kvstore.relaytransfer",
    "kvstore.service.linkrate",
    "kvstore.service.options",
    "kvstore.transfer",
    "kvstore.transport.marking",
    "kvstore.units",
    "kvstore.version",
    "kvstore.wire",
    "kvstore.words",
    "kvstore_client.agent.egress",
    "kvstore_client.agent.memory",
    "kvstore_client.agent.options",
    "kvstore_client.agent.retention",
    "kvstore_client.breaker",
    "kvstore_client.namespaces",
    "kvstore_client.placement",
    "kvstore_client.scheduler",
    "kvstore_client.selector",
    "kvstore_client.transports",
    "kvstore_client.selector.choice",
    "kvstore_client.selector.estimates",
    "kvstore_client.selector.gain",
    "kvstore_client.selector.inflight",
    "kvstore_client.selector.plans",
    "kvstore_client.selector.policies",
    "kvstore_client.selector.waterfill",
}

IMPURE = {
    "kvstore_client.agent.options",
    "kvstore_client.agent.egress",
    "kvstore.transport.marking",
    "kvstore.service.linkrate",
    "kvstore.service.options",
    "kvstore.relaytransfer",
    "asyncio",
    "concurrent",
    "multiprocessing",
    "os",
    "random",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uvloop",
}


@pytest.mark.parametrize("name", sorted(modules()))
def test_packages_import_only_what_they_may(name: str) -> None:
    package = name.partition(".")[0]
    ours = {imported.partition(".")[0] for imported in imports(modules()[name])} & set(PACKAGES)
    assert ours <= ALLOWED[package], f"{name} may import {sorted(ALLOWED[package])} only"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_import_nothing_that_acts(name: str) -> None:
    imported = set(imports(modules()[name]))
    acting = {module.partition(".")[0] for module in imported} & IMPURE
    assert not acting, f"{name} is pure and may not import {sorted(acting)}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_build_on_pure_modules(name: str) -> None:
    ours = set(imports(modules()[name])) & set(modules())
    packages = {module for module in ours if modules()[module].name == "__init__.py"}
    assert ours - packages <= PURE, f"{name} is pure, {sorted(ours - packages - PURE)} is not"


def test_core_never_imports_an_engine_or_a_device_library_at_the_top() -> None:
    # Importing torch takes a second, and a storage host has none of these.
    heavy = {"torch", "vllm", "sglang", "lmcache", "transformers", "pyverbs"}
    for name, path in modules().items():
        if ".adapters" not in name:
            found = {imported.partition(".")[0] for imported in imports(path)} & heavy
            assert not found, f"{name} imports {sorted(found)}"
