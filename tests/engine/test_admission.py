"""Admission: what would wait long is refused, and nothing else is."""

from __future__ import annotations

import pytest

from carpool.engine.admission import FEW_REQUESTS, QUEUE_SECONDS, TURN_SECONDS, Admission
from carpool.engine.errors import Overloaded

BATCH = 2048
RATE = 1000.0  # tokens a second


def admission(most: int | None = None, workers: int = 2) -> Admission:
    made = Admission(most, BATCH, workers)
    made.tokens_per_second = RATE
    return made


def admits(door: Admission, tokens: int, waiting: int) -> bool:
    try:
        door.check(tokens, waiting)
    except Overloaded:
        return False
    return True


def test_many_short_requests_wait_for_five_seconds_of_work() -> None:
    door = admission()
    taken = 0
    while admits(door, 20, 20 * taken):
        door.enter(20)
        taken += 1
    assert taken * 20 == TURN_SECONDS * RATE


def test_few_requests_may_wait_longer_but_not_for_ever() -> None:
    door = admission()
    waiting = 0
    while admits(door, 300, waiting):
        door.enter(300)
        waiting += 300
    assert waiting / 300 == FEW_REQUESTS
    assert waiting > TURN_SECONDS * RATE
    door = admission()
    waiting = 0
    while admits(door, 2000, waiting):
        door.enter(2000)
        waiting += 2000
    assert waiting == QUEUE_SECONDS * RATE  # of first turns


def test_a_request_of_many_texts_keeps_short_ones_out_no_longer_than_a_batch_does() -> None:
    door = admission()
    door.enter(40_000)
    for _ in range(FEW_REQUESTS):
        door.enter(20)
    waiting = 40_000 + 20 * FEW_REQUESTS
    assert waiting > TURN_SECONDS * RATE
    assert admits(door, 20, waiting)
    assert not admits(door, 40_000, waiting)  # more than a minute in all


def test_a_request_of_minutes_of_work_keeps_no_short_one_out() -> None:
    door = admission()
    door.enter(600_000)
    assert admits(door, 20, 600_000)
    assert admits(door, BATCH, 600_000)
    assert not admits(door, BATCH + 1, 600_000)


def test_twins_that_wait_for_nothing_of_their_own_fill_no_queue() -> None:
    door = admission()
    for _ in range(10 * FEW_REQUESTS):
        door.enter(200)
    assert admits(door, 200, 200)
    assert not admits(door, 200, 10 * FEW_REQUESTS * 20)


def test_when_nothing_waits_no_size_is_too_large_and_what_needs_no_run_needs_no_place() -> None:
    for door in (admission(), admission(most=5)):
        for _ in range(1000):
            door.enter(1000)
        assert admits(door, 10**9, 0)
        assert admits(door, 0, 10**9)
        assert not admits(door, 1, 10**9)


def test_those_that_have_ended_count_no_more() -> None:
    door = admission()
    for _ in range(1000):
        door.enter(20)
    assert not admits(door, 20, 20_000)
    for _ in range(800):
        door.leave(20)
    assert admits(door, 20, 4_000)


def test_a_bound_in_tokens_holds_alone() -> None:
    door = admission(most=10**6)
    for _ in range(1000):
        door.enter(900)
    assert admits(door, 100_000, 900_000)
    assert not admits(door, 100_001, 900_000)


def test_a_refusal_says_when_half_of_the_queue_will_be_done() -> None:
    with pytest.raises(Overloaded, match=r"80000 tokens wait, 80\.0 s of work") as refused:
        admission().check(BATCH + 1, 80_000)
    assert refused.value.retry_after == 40.0


def test_the_rate_follows_what_busy_workers_do() -> None:
    door = admission(workers=2)
    door.measured(1000, 0.0)  # a clock that stood still says nothing
    assert door.tokens_per_second == RATE
    door.measured(2000, 0.1)  # one of two workers: 40,000 a second; a hundredth of the memory
    assert door.tokens_per_second == pytest.approx(RATE + 0.01 * (40_000 - RATE))
    for _ in range(600):
        door.measured(300, 0.1)
    assert door.tokens_per_second == pytest.approx(6000, rel=0.02)
    fresh = Admission(None, BATCH, 1)
    fresh.measured(50, 0.1)
    assert fresh.tokens_per_second == pytest.approx(500)
