"""The table from key to slot: against a dict, and how far it moves in one step."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore_daemon.engine.keytable import (
    LOAD_DIVISOR_MAX,
    LOAD_DIVISOR_MIN,
    PLACES_MIN,
    PLACES_PER_CHANGE,
    PLACES_PER_TAKEN_KEY,
    KeyTable,
)

PLACE_BYTES = 4


class Key(bytes):
    """A key whose hash a test chooses."""

    chosen: int

    def __new__(cls, name: bytes, chosen: int) -> Key:
        key = super().__new__(cls, name)
        key.chosen = chosen
        return key

    def __hash__(self) -> int:
        return self.chosen

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other) is True  # type: ignore[arg-type]

    def __ne__(self, other: object) -> bool:
        return not self == other


class Filled:
    """A table, its column, and a dict that was told the same."""

    def __init__(self) -> None:
        self.column: list[bytes | None] = [None]
        self.table = KeyTable(self.column)
        self.model: dict[bytes, int] = {}
        self.spare: list[int] = []

    def insert(self, key: bytes) -> None:
        if not self.spare:
            self.spare.append(len(self.column))
            self.column.append(None)
        slot = self.spare[-1]
        assert self.table.insert(key, slot) == self.model.get(key, 0)
        if key not in self.model:
            self.column[self.spare.pop()] = key
            self.model[key] = slot

    def remove(self, key: bytes) -> None:
        slot = self.model.pop(key)
        self.table.remove(slot)
        self._vacate(slot)

    def take(self, count_max: int) -> list[int]:
        slots = self.table.take(count_max)
        for slot in slots:
            assert self.model.pop(self.column[slot] or b"") == slot
            self._vacate(slot)
        return slots

    def check(self, *others: bytes) -> None:
        """Everything that can be asked has the answer of the dict."""
        asked = [*self.model, *others]
        found = [self.model.get(key, 0) for key in asked]
        self.table.check()
        assert len(self.table) == len(self.model)
        assert sorted(self.table) == sorted(self.model)
        assert [self.table.find(key) for key in asked] == found
        assert self.table.slots_of(asked).tolist() == found
        run = found.index(0) if 0 in found else len(found)
        assert self.table.run_of(asked) == found[:run]

    @property
    def places(self) -> int:
        return self.table.size_bytes // PLACE_BYTES

    def _vacate(self, slot: int) -> None:
        self.column[slot] = None
        self.spare.append(slot)


@pytest.fixture
def names() -> Iterator[bytes]:
    """New keys without end."""
    source = random.Random(7)
    return iter(lambda: source.randbytes(32), b"")


def filled(names: Iterator[bytes], count: int) -> Filled:
    """A table with so many keys."""
    filled = Filled()
    for _ in range(count):
        filled.insert(next(names))
    return filled


def test_an_empty_table_is_small_and_has_nothing() -> None:
    table = KeyTable([None])
    assert (len(table), table.find(b"key"), table.run_of([b"key"]), table.take(9)) == (0, 0, [], [])
    assert table.slots_of([]).tolist() == []
    assert table.slots_of([b"key"]).dtype == np.int32
    assert table.size_bytes == PLACES_MIN * PLACE_BYTES
    assert not table


def test_it_is_a_mapping_for_those_who_have_time() -> None:
    table = KeyTable([None, b"a", b"b"])
    assert [table.insert(b"a", 1), table.insert(b"b", 2)] == [0, 0]
    assert table == {b"a": 1, b"b": 2}
    assert b"a" in table
    assert b"c" not in table
    assert "a" not in table
    with pytest.raises(KeyError):
        table[b"c"]


def test_a_key_that_is_there_keeps_its_slot() -> None:
    column = [None, b"a", None]
    table = KeyTable(column)
    table.insert(b"a", 1)
    assert table.insert(b"a", 2) == 1
    assert dict(table) == {b"a": 1}


def test_what_is_not_in_the_table_cannot_be_removed() -> None:
    table = KeyTable([None, b"a", b"b"])
    table.insert(b"a", 1)
    with pytest.raises(AssertionError, match="slot 2"):
        table.remove(2)


def test_another_table_may_have_the_same_keys() -> None:
    column = [None, b"key", b"key"]
    one, two = KeyTable(column), KeyTable(column)
    one.insert(b"key", 1)
    assert two.find(b"key") == 0
    two.insert(b"key", 2)
    assert (one.find(b"key"), two.find(b"key")) == (1, 2)
    one.remove(1)
    assert (one.find(b"key"), two.find(b"key")) == (0, 2)


def test_a_run_ends_at_the_first_key_that_is_missing(names: Iterator[bytes]) -> None:
    some = filled(names, 20)
    keys = list(some.model)
    slots = [some.model[key] for key in keys]
    assert some.table.run_of(keys) == slots
    assert some.table.run_of([*keys[:5], next(names), *keys[5:]]) == slots[:5]
    assert some.table.slots_of([*keys[:5], next(names), *keys[5:]]).tolist() == [
        *slots[:5],
        0,
        *slots[5:],
    ]


def test_colliding_keys_are_found_around_the_end_and_after_any_removal() -> None:
    # Homes at the last places and the first: a run that goes around the end.
    homes = [14, 15, 15, 14, 0]
    keys = [Key(bytes([n]) * 16, home) for n, home in enumerate(homes)]
    for gone in keys:
        some = Filled()
        for n in range(3):  # grows to 16 places, and has moved
            some.insert(Key(bytes([99, n]), 5))
        for key in keys[:1]:
            some.insert(key)
        for name in list(some.model)[:3]:
            some.remove(name)
        for key in keys[1:]:
            some.insert(key)
        assert some.places == 16
        some.check(Key(b"none", 14))
        some.remove(gone)
        some.check(gone, Key(b"none", 14))


def test_a_table_grows_and_shrinks_in_steps(names: Iterator[bytes]) -> None:
    some = filled(names, 0)
    sizes = []
    for _ in range(5000):
        some.insert(next(names))
        sizes.append(some.places)
    some.check()
    assert max(sizes) <= 6 * LOAD_DIVISOR_MIN * 5000
    assert some.places < 2 * LOAD_DIVISOR_MIN * 5000
    # A larger table stands beside the old one for as long as the old one needs.
    beside = [at for at, size in enumerate(sizes) if size == 8192 + 16384]
    assert len(beside) == 8192 // PLACES_PER_CHANGE - 1
    assert beside == list(range(beside[0], beside[-1] + 1))
    for key in list(some.model)[3:]:
        some.remove(key)
    some.check()
    assert some.places <= 4 * 3 * LOAD_DIVISOR_MAX
    for key in list(some.model):
        some.remove(key)
    assert some.places == PLACES_MIN


def test_a_run_around_the_end_is_found_while_it_moves() -> None:
    some = Filled()
    while some.places < 128 + 256:
        some.insert(Key(len(some.model).to_bytes(16, "big"), -1))
    assert len(some.model) > PLACES_PER_CHANGE
    some.check(Key(b"none", -1))
    while some.places > 256:
        some.remove(next(iter(some.model)))
        some.check(Key(b"none", -1))


def test_no_change_moves_more_than_a_few_entries(names: Iterator[bytes]) -> None:
    some = filled(names, 10_000)
    hashed = 0

    class Counting(list[bytes | None]):
        def __getitem__(self, slot: int) -> bytes | None:  # type: ignore[override]
            nonlocal hashed
            hashed += 1
            return super().__getitem__(slot)

    # What is read from the column bounds what was moved or compared: runs stay short.
    some.column = Counting(some.column)
    some.table._keys = some.column
    worst = 0
    for turn in range(20_000):
        hashed = 0
        some.insert(next(names)) if turn < 6000 else some.remove(next(iter(some.model)))
        worst = max(worst, hashed)
        if not some.model:
            break
    assert PLACES_PER_CHANGE // 2 < worst < 8 * PLACES_PER_CHANGE


def test_taking_empties_a_table_in_bounded_steps(names: Iterator[bytes]) -> None:
    some = filled(names, 3000)
    taken: list[int] = []
    while some.model:
        slots = some.take(64)
        assert len(slots) <= 64
        taken += slots
        some.check()
    assert sorted(taken) == list(range(1, 3001))
    assert some.places == PLACES_MIN


def test_taking_looks_at_a_bounded_number_of_places(names: Iterator[bytes]) -> None:
    some = filled(names, 3000)
    first = some.take(2999)
    assert len(first) == 2999
    # One is left, somewhere in thousands of places: it may take several calls.
    calls = 0
    while some.model:
        some.take(1)
        calls += 1
    assert 1 <= calls <= 1 + 2 * 16384 // PLACES_PER_TAKEN_KEY


class Model(RuleBasedStateMachine):
    """Any order of changes. Few different homes, around the end: runs are long and meet."""

    @initialize(homes=st.sampled_from([2, 7, 1 << 40]), seed=st.integers(0, 1 << 32))
    def begin(self, homes: int, seed: int) -> None:
        self.some = Filled()
        self.random = random.Random(seed)
        self.homes = homes
        self.gone: list[bytes] = []

    def name(self) -> Key:
        return Key(self.random.randbytes(16), self.random.randrange(self.homes) - 4)

    @rule(count=st.integers(1, 40))
    def insert(self, count: int) -> None:
        for _ in range(count):
            self.some.insert(self.name())

    @rule()
    def insert_again(self) -> None:
        for key in [*self.gone[-3:], *list(self.some.model)[:3]]:
            self.some.insert(key)

    @precondition(lambda self: self.some.model)
    @rule(count=st.integers(1, 40))
    def remove(self, count: int) -> None:
        for key in self.random.sample(list(self.some.model), min(count, len(self.some.model))):
            self.some.remove(key)
            self.gone.append(key)

    @precondition(lambda self: self.some.model)
    @rule(count=st.integers(1, 100))
    def replace(self, count: int) -> None:
        for _ in range(count):
            oldest = next(iter(self.some.model))
            self.some.remove(oldest)
            self.some.insert(self.name())
            self.gone.append(oldest)

    @rule(count=st.integers(1, 40))
    def take(self, count: int) -> None:
        self.some.take(count)

    @invariant()
    def everything_is_found(self) -> None:
        self.some.check(*self.gone[-20:])


# As elsewhere, profiles choose how many examples; the steps let several moves come together.
Model.TestCase.settings = settings(stateful_step_count=25)
TestAgainstADict = pytest.mark.slow(Model.TestCase)
