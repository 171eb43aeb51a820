"""Work beside the loop: its order, who is told when, and what it keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, strategies as st

from kvstore.protocol.strands import PARTS_MAX, Dropped, Strand, Strands
from tests.support.workers import ByHand


class Told(list[object]):
    """Results in the order in which they were told."""

    def __call__(self, name: str, result: object) -> None:
        self.append((name, result))


@pytest.fixture
def worker() -> ByHand:
    return ByHand()


@pytest.fixture
def strands(worker: ByHand) -> Strands:
    return Strands(worker)


def add(strand: Strand, told: Told, *names: str) -> None:
    for name in names:
        strand.add(partial(str.upper, name), partial(told, name))


def test_parts_of_a_strand_end_in_their_order(strands: Strands, worker: ByHand) -> None:
    strand, told = Strand(strands), Told()
    add(strand, told, "a", "b", "c")
    assert len(worker.jobs) == 1, "never two of one strand at a time"
    assert (strand.count, strands.count) == (3, 3)
    worker.finish()
    assert told == [("a", "A"), ("b", "B"), ("c", "C")]
    assert (strand.count, strands.count) == (0, 0)
    add(strand, told, "d")
    worker.finish()
    assert told[3:] == [("d", "D")]


def test_strands_take_turns(strands: Strands, worker: ByHand) -> None:
    told = Told()
    for name in "xy":
        add(Strand(strands), told, *(name + str(number) for number in range(3)))
    worker.finish()
    assert [name for name, _ in told] == ["x0", "y0", "x1", "y1", "x2", "y2"]


def test_part_that_comes_when_the_worker_has_just_found_none(
    strands: Strands, worker: ByHand
) -> None:
    strand, told = Strand(strands), Told()
    add(strand, told, "a")
    worker.work()
    add(strand, told, "b")  # the loop has not heard that it rests
    assert not worker.jobs
    worker.finish()
    assert told == [("a", "A"), ("b", "B")]


def test_what_is_raised_is_told_and_the_next_part_is_done(strands: Strands, worker: ByHand) -> None:
    strand, told = Strand(strands), Told()
    strand.add(partial(int, "no number"), partial(told, "a"))
    add(strand, told, "b")
    worker.finish()
    (_, error), after = told
    assert isinstance(error, ValueError)
    assert after == ("b", "B")


def test_parts_that_nobody_has_begun_are_dropped(strands: Strands, worker: ByHand) -> None:
    strand, told = Strand(strands), Told()
    add(strand, told, "a", "b", "c")
    worker.work()
    strand.drop()
    assert [(name, type(result)) for name, result in told] == [("b", Dropped), ("c", Dropped)]
    assert (strand.count, strands.count) == (1, 1)
    worker.finish()
    assert told[2:] == [("a", "A")]
    assert strand.count == 0
    add(strand, told, "d")
    worker.finish()
    assert told[3:] == [("d", "D")]


def test_drop_before_the_worker_has_begun_anything(strands: Strands, worker: ByHand) -> None:
    strand, told = Strand(strands), Told()
    add(strand, told, "a")
    strand.drop()
    add(strand, told, "b")
    worker.finish()
    assert [name for name, _ in told] == ["a", "b"]
    assert (strand.count, strands.count) == (0, 0)


def test_who_was_refused_is_told_once_when_there_is_room(strands: Strands, worker: ByHand) -> None:
    ready: list[int] = []
    strands.on_ready = lambda: ready.append(strands.count)
    strand, told = Strand(strands), Told()
    add(strand, told, *map(str, range(PARTS_MAX)))
    worker.work()
    worker.tell()
    assert ready == [], "nobody was refused"
    add(strand, told, "more")
    assert not strands.accepts
    worker.finish()
    assert ready == [PARTS_MAX - 1]
    assert strands.accepts


def test_end_of_all_work_is_told_once(strands: Strands, worker: ByHand) -> None:
    ended: list[str] = []
    strands.when_idle(partial(ended.append, "at once"))
    assert ended == ["at once"]
    first, second, told = Strand(strands), Strand(strands), Told()
    add(first, told, "a")
    add(second, told, "b")
    strands.when_idle(partial(ended.append, "later"))
    worker.work()
    worker.tell()
    assert ended == ["at once"]
    worker.finish()
    assert ended == ["at once", "later"]


def test_part_may_be_done_here(strands: Strands, worker: ByHand) -> None:
    strand, told = Strand(strands), Told()
    strand.run(partial(str.upper, "a"), partial(told, "a"))
    strand.run(partial(int, "no number"), partial(told, "b"))
    assert told[0] == ("a", "A")
    assert [name for name, _ in told] == ["a", "b"]
    assert not worker.jobs


def test_nothing_of_a_part_is_kept_when_it_has_ended(strands: Strands, worker: ByHand) -> None:
    """What it works on may be memory that others wait for."""

    class Memory:
        def work(self) -> int:
            return 1

    strand, told, memory = Strand(strands), Told(), Memory()
    gone = weakref.ref(memory)
    strand.add(memory.work, partial(told, "a"))
    del memory
    gc.disable()
    try:
        worker.finish()
        assert gone() is None
    finally:
        gc.enable()


def test_failure_of_who_is_told_loses_no_count(strands: Strands, worker: ByHand) -> None:
    strand = Strand(strands)
    strand.add(partial(str.upper, "a"), lambda result: 1 / 0)
    worker.work()
    with pytest.raises(ZeroDivisionError):
        worker.tell()
    assert (strand.count, strands.count) == (0, 0)
    worker.finish()


class Woken(ByHand):
    """Tells the loop only when it is woken.

    Attributes:
        woken: Whether it was.
    """

    woken = False

    def post(self, call: Callable[[], None], wake: bool = True) -> None:
        super().post(call, wake)
        self.woken |= wake

    def turn(self) -> None:
        """The loop comes round, if it was woken."""
        if self.woken:
            self.woken = False
            self.tell()


@given(st.lists(st.sampled_from(["add", "work", "turn", "drop"]), max_size=80))
def test_loop_hears_of_everything_in_the_end(steps: list[str]) -> None:
    worker, told = Woken(), Told()
    strands = Strands(worker)
    running = [Strand(strands), Strand(strands)]
    for number, step in enumerate(steps):
        strand = running[number % 2]
        if step == "add":
            add(strand, told, str(number))
        elif step == "drop":
            strand.drop()
        elif step == "work" and worker.jobs:
            worker.work()
        elif step == "turn":
            worker.turn()
    while worker.jobs or worker.woken:
        while worker.jobs:
            worker.work()
        worker.turn()
    assert len(told) == steps.count("add")
    assert (strands.count, len(worker.calls)) == (0, 0)


def test_loop_is_left_alone_for_half_of_the_parts(strands: Strands) -> None:
    worker = Woken()
    strand, told = Strand(Strands(worker)), Told()
    add(strand, told, *map(str, range(PARTS_MAX)))
    worker.work()
    assert not worker.woken
    worker.work(PARTS_MAX // 2 - 1)
    assert worker.woken
