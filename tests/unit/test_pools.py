"""Pools, generations and namespaces: opening, pinning, retiring, limits."""

from __future__ import annotations

import itertools

import pytest

from kvstore.errors import (
    LayoutMismatch,
    LimitExceeded,
    LocalProtocolError,
    RefusedError,
    UnknownNamespace,
)
from kvstore.layout import generation_id, namespace_id
from kvstore_daemon.engine import pools
from kvstore_daemon.engine.policy import Fifo
from kvstore_daemon.engine.pools import PoolTable
from tests.support.engine import layout

PAGE = 4096
OLD, NEW = layout(PAGE, weights_digest="old"), layout(PAGE, weights_digest="new")


@pytest.fixture
def table() -> PoolTable:
    ticks = itertools.count()
    return PoolTable(PAGE, 100 * PAGE, lambda capacity: Fifo(capacity, ticks), keys=[])


def test_opening_twice_gives_the_same_namespace(table: PoolTable) -> None:
    first = table.open("llama", OLD)
    assert table.open("llama", OLD) is first
    assert first.id == namespace_id("llama", OLD)
    assert first.generation.id == generation_id("llama", OLD)
    assert table.namespace(first.id) is first


def test_ranks_share_a_generation_and_weights_do_not(table: PoolTable) -> None:
    ranks = [table.open("llama", layout(PAGE, tp_rank=rank, tp_size=2)) for rank in range(2)]
    assert ranks[0] is not ranks[1]
    assert ranks[0].generation is ranks[1].generation
    new = table.open("llama", layout(PAGE, tp_size=2, weights_digest="new"))
    assert new.generation is not ranks[0].generation
    assert [len(pool.generations) for pool in table] == [2]


def test_the_same_layout_in_two_pools_is_two_namespaces(table: PoolTable) -> None:
    assert table.open("a", OLD) is not table.open("b", OLD)
    assert [namespace.pool.name for namespace in table.namespaces("b")] == ["b"]
    assert len(table.namespaces()) == 2
    assert table.namespaces("c") == []


def test_blocks_are_counted_in_whole_pages(table: PoolTable) -> None:
    namespace = table.open("llama", layout(PAGE, 1))
    assert (namespace.block_pages, namespace.slot_bytes) == (2, 2 * PAGE)
    namespace.occupied_count = 3
    info = namespace.info()
    assert (info.used_bytes, info.block_count) == (6 * PAGE, 0)


def test_what_cannot_be_is_refused_and_leaves_nothing(table: PoolTable) -> None:
    with pytest.raises(LocalProtocolError, match="pool"):
        table.open("no spaces", OLD)
    with pytest.raises(LocalProtocolError, match="layer_bytes"):
        table.open("llama", layout())
    with pytest.raises(LimitExceeded, match="409601 bytes does not fit"):
        table.open("llama", layout(100 * PAGE + 1))
    assert list(table) == []
    with pytest.raises(UnknownNamespace):
        table.namespace(bytes(32))


def test_a_pinned_pool_names_the_field_that_differs(table: PoolTable) -> None:
    old = table.open("llama", OLD)
    table.pin("llama", old.generation.id)
    assert table.open("llama", OLD) is old
    with pytest.raises(LayoutMismatch, match="weights_digest") as caught:
        table.open("llama", NEW)
    assert caught.value.field == "weights_digest"
    table.unpin("llama")
    assert table.open("llama", NEW) is not old


def test_ranks_of_the_pinned_generation_are_welcome(table: PoolTable) -> None:
    first = table.open("llama", layout(PAGE, tp_rank=0, tp_size=2))
    table.pin("llama", first.generation.id)
    assert table.open("llama", layout(PAGE, tp_rank=1, tp_size=2)).generation is first.generation


def test_a_configured_pin_holds_before_anyone_has_opened_its_generation(table: PoolTable) -> None:
    table.configure("llama", pinned=generation_id("llama", NEW))
    with pytest.raises(LayoutMismatch) as caught:
        table.open("llama", OLD)
    assert caught.value.field == "layout"
    table.open("llama", NEW)
    with pytest.raises(LayoutMismatch) as caught:
        table.open("llama", OLD)
    assert caught.value.field == "weights_digest"


def test_a_retired_generation_is_closed_and_can_be_opened_anew(table: PoolTable) -> None:
    old, new = table.open("llama", OLD), table.open("llama", NEW)
    assert table.retire("llama", old.generation.id) == [old]
    with pytest.raises(UnknownNamespace):
        table.namespace(old.id)
    assert table.namespaces("llama") == [new]
    again = table.open("llama", OLD)
    assert again is not old
    assert again.number != old.number


def test_the_pinned_generation_is_not_retired(table: PoolTable) -> None:
    old = table.open("llama", OLD)
    table.pin("llama", old.generation.id)
    with pytest.raises(RefusedError, match="unpin"):
        table.retire("llama", old.generation.id)
    assert table.namespace(old.id) is old


def test_numbers_and_empty_pools_are_given_back(table: PoolTable) -> None:
    old = table.open("llama", OLD)
    table.retire("llama", old.generation.id)
    table.forget(old)
    assert list(table) == []
    assert table.open("other", OLD).number == old.number


def test_a_pool_stays_that_is_configured_has_a_quota_or_is_in_use(table: PoolTable) -> None:
    table.configure("configured")
    for name in ("configured", "quota", "busy"):
        namespace = table.open(name, OLD)
        if name == "quota":
            table.set_capacity(name, PAGE)
        if name == "busy":
            table.open(name, NEW)
        table.retire(name, namespace.generation.id)
        table.forget(namespace)
    assert {pool.name for pool in table} == {"configured", "quota", "busy"}


def test_an_old_namespace_does_not_take_a_new_pool_of_its_name_along(table: PoolTable) -> None:
    first = table.open("llama", layout(PAGE, tp_rank=0, tp_size=2))
    second = table.open("llama", layout(PAGE, tp_rank=1, tp_size=2))
    table.retire("llama", first.generation.id)
    table.forget(first)
    again = table.open("llama", OLD)
    table.forget(second)
    assert [pool.name for pool in table] == ["llama"]
    assert table.open("llama", OLD) is again


@pytest.mark.parametrize(
    "act",
    [
        lambda table: table.pin("none", bytes(32)),
        lambda table: table.pin("llama", bytes(32)),
        lambda table: table.unpin("none"),
        lambda table: table.set_capacity("none", 1),
        lambda table: table.retire("none", bytes(32)),
        lambda table: table.retire("llama", bytes(32)),
    ],
)
def test_unknown_pools_and_generations_are_refused(table: PoolTable, act: object) -> None:
    table.open("llama", OLD)
    with pytest.raises(RefusedError, match=r"no (pool|generation)"):
        act(table)  # type: ignore[operator]


def test_pools_and_namespaces_are_limited(
    table: PoolTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "POOLS_MAX", 2)
    monkeypatch.setattr(pools, "NAMESPACES_MAX", 3)
    table.open("a", OLD)
    table.open("b", OLD)
    with pytest.raises(LimitExceeded, match="2 pools"):
        table.open("c", OLD)
    table.open("b", NEW)
    with pytest.raises(LimitExceeded, match="3 namespaces"):
        table.open("a", NEW)
    assert table.open("a", OLD)
    assert [len(pool.generations) for pool in table] == [1, 2]
