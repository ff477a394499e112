"""Freed memory goes back to the system, but not at every turn."""

from carpool.engine.memory import HeapTrimmer


def test_it_trims_at_most_once_a_second() -> None:
    calls: list[int] = []
    heap = HeapTrimmer(calls.append)

    for now in (10.0, 10.1, 10.9, 11.0, 11.5, 100.0):
        heap.rest(now)

    assert calls == [0, 0, 0]  # at 10, 11 and 100


def test_the_systems_own_trim_is_found_or_nothing_happens() -> None:
    HeapTrimmer().rest(0.0)
