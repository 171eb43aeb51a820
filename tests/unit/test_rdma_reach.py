"""What could not be connected lately is left alone for a while, and then tried again."""

from __future__ import annotations

from kvstore.transport.rdma_reach import UNREACHED_MAX, UNREACHED_S, Unreached


def test_it_is_that_name_on_that_rail_and_for_a_while() -> None:
    unreached = Unreached()
    unreached.note(1, "a", 100.0)
    assert unreached.lately(1, "a", 100.0 + UNREACHED_S - 0.1)
    assert not unreached.lately(1, "a", 100.0 + UNREACHED_S)
    assert not unreached.lately(0, "a", 100.0)
    assert not unreached.lately(1, "b", 100.0)


def test_a_name_is_forgotten_on_all_rails() -> None:
    unreached = Unreached()
    for place, name in ((0, "a"), (1, "a"), (1, "b")):
        unreached.note(place, name, 100.0)
    unreached.forget("a")
    assert not any(unreached.lately(place, "a", 100.0) for place in (0, 1))
    assert unreached.lately(1, "b", 100.0)


def test_the_oldest_names_make_room() -> None:
    unreached = Unreached()
    for number in range(UNREACHED_MAX):
        unreached.note(0, str(number), 100.0)
    unreached.note(0, "0", 101.0)  # which makes it the newest
    unreached.note(0, "more", 101.0)
    assert unreached.lately(0, "0", 101.0)
    assert not unreached.lately(0, "1", 101.0)
    assert unreached.lately(0, "2", 101.0)
