"""Pending: a request enters, gets its rows, and ends once; all without a queue or a worker."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from carpool.engine.errors import DeadlineExceeded, Draining, InferenceFailed
from carpool.engine.params import PoolingParams, Task
from carpool.engine.pending import Accepted, Pending
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.sequence import Sequence

ROW = np.ones(2, np.float32)


class Book(Pending):
    """Pending, with a list of those that ended."""

    def __init__(self) -> None:
        self.ended: list[Accepted] = []
        super().__init__(self.ended.append)

    def take(
        self, *found: Any, tasks: tuple[Task, ...] = ("embed",), adapter: int = 0, **options: Any
    ) -> Accepted:
        """A request for these rows, None where they have to be run, of prompts of one token, of two, and so on."""
        ready = Prepared([[5] * (i + 1) for i in range(len(found) // len(tasks))])
        request = Request(PoolingParams(), tasks, adapter=adapter)
        missing = sum(row is None for row in found)
        return self.enter(
            request, ready, list(found), missing, options.get("timeout"), options.get("on_progress")
        )

    def give(self, accepted: Accepted, index: int, row: Any = ROW, cached: int = 0) -> None:
        seq = Sequence(accepted.number, index, [5], PoolingParams())
        self.hand_out(seq, row, cached, 0.5, accepted.arrival + 2.0)


async def test_a_request_is_answered_when_its_last_row_has_come() -> None:
    book = Book()
    accepted = book.take(None, None)
    book.give(accepted, 1)
    assert not accepted.future.done()
    assert not book.all_answered.is_set()
    book.give(accepted, 0, cached=1)
    result = await accepted.future
    assert all(row is ROW for row in result.rows)
    assert result.timings.queue == pytest.approx(2.0)
    assert result.timings.forward == 0.5
    assert book.ended == [accepted]
    assert book.all_answered.is_set()
    assert accepted.number not in book


async def test_what_was_found_is_not_counted_again() -> None:
    """Of two prompts with two rows each one was found whole, and half of the other."""
    book = Book()
    accepted = book.take(ROW, ROW, ROW, None, tasks=("embed", "token_embed"))
    assert (accepted.missing, accepted.tokens, accepted.result.cached) == (1, 2, [0, 2])
    book.give(accepted, 3, cached=1)
    assert (await accepted.future).cached == [0, 1]


async def test_a_request_ends_once_and_what_comes_then_is_dropped() -> None:
    book = Book()
    accepted = book.take(None, None, timeout=30.0)
    book.give(accepted, 0, InferenceFailed("poisoned"))
    book.give(accepted, 1)
    book.expire(accepted.number)
    book.settle(accepted.number, None)
    with pytest.raises(InferenceFailed, match="poisoned"):
        await accepted.future
    assert book.ended == [accepted]
    assert accepted.result.rows == [], "no torch memory is left to whoever keeps the error"
    assert accepted.timer is not None
    assert accepted.timer.cancelled()


async def test_time_runs_out_for_one_and_not_for_the_others() -> None:
    book = Book()
    hasty, patient = book.take(None, timeout=0.0), book.take(None, timeout=30.0)
    assert (hasty.deadline, patient.deadline) == (hasty.arrival, patient.arrival + 30.0)
    with pytest.raises(DeadlineExceeded):
        await hasty.future
    assert (len(book), patient.number in book) == (1, True)
    book.settle(patient.number, None)


async def test_all_are_rejected_each_with_an_error_of_its_own() -> None:
    book = Book()
    requests = [book.take(None, adapter=i) for i in range(3)]
    assert book.rides(2)
    book.reject_all(lambda: Draining("over"))
    errors = await asyncio.gather(*(accepted.future for accepted in requests), return_exceptions=True)
    assert [type(error) for error in errors] == [Draining] * 3
    assert len(set(map(id, errors))) == 3
    assert (len(book), book.rides(2), book.ended) == (0, False, requests)


async def test_who_cannot_hear_of_progress_gets_the_error_it_made() -> None:
    def deaf(_rows: int) -> None:
        raise KeyError("nobody listens")

    book = Book()
    accepted = book.take(None, None, on_progress=deaf)
    book.give(accepted, 0)
    with pytest.raises(KeyError, match="nobody listens"):
        await accepted.future
    assert book.ended == [accepted]


async def test_the_slowest_batch_of_a_prompt_in_chunks_counts() -> None:
    book = Book()
    accepted = book.take(None)
    seq = Sequence(accepted.number, 0, [5], PoolingParams())
    book.ran(seq, 0.75)
    book.give(accepted, 0)
    book.ran(seq, 9.0)  # it has ended
    assert (await accepted.future).timings.forward == 0.75
