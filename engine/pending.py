"""Pending: the requests that were accepted and are not answered yet. On the event loop.

A request enters, gets its rows as they land, and ends in one place (`settle`), whatever becomes of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carpool.engine.errors import DeadlineExceeded, EngineError, InferenceFailed
from carpool.engine.outputs import PoolingResult, Timings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from carpool.engine.prepared import Prepared
    from carpool.engine.request import Request
    from carpool.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Accepted:
    """One of them. Times are time.monotonic()'s."""

    number: int
    future: asyncio.Future[PoolingResult]
    result: PoolingResult
    missing: int  # rows that are still to come
    tokens: int  # of the prompts that were to be run when it came
    adapter: int
    arrival: float
    deadline: float | None
    on_progress: Callable[[int], object] | None
    timer: asyncio.TimerHandle | None = None


class Pending:
    """Futures live here, one a request: nobody else resolves or rejects them."""

    def __init__(self, ended: Callable[[Accepted], None]) -> None:
        """`ended` is told of each once, just before its caller is."""
        self._ended = ended
        self._accepted: dict[int, Accepted] = {}
        self._next_number = 0
        self.all_answered = asyncio.Event()
        self.all_answered.set()

    def __len__(self) -> int:
        return len(self._accepted)

    def __contains__(self, number: int) -> bool:
        return number in self._accepted

    def rides(self, adapter: int) -> bool:
        """Whether one of them is on this adapter."""
        return any(accepted.adapter == adapter for accepted in self._accepted.values())

    def enter(
        self,
        request: Request,
        ready: Prepared,
        found: list[NDArray[Any] | None],
        missing: int,
        timeout: float | None,
        on_progress: Callable[[int], object] | None,
    ) -> Accepted:
        """Take one in. `found` has its rows, but for the `missing`, each None; after `timeout` seconds it expires."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if missing == len(found):
            to_run = list(map(len, ready.token_ids))
        else:
            tasks = len(request.tasks)
            to_run = [
                len(ids) if any(row is None for row in found[i * tasks : (i + 1) * tasks]) else 0
                for i, ids in enumerate(ready.token_ids)
            ]
        accepted = Accepted(
            self._next_number,
            loop.create_future(),
            # Rows are to come; and what is cached of a prompt is no more than any of its rows will say.
            PoolingResult(found, ready.token_ids, Timings(), to_run),  # type: ignore[arg-type]
            missing,
            sum(to_run),
            request.adapter,
            now,
            None if timeout is None else now + timeout,
            on_progress,
        )
        self._next_number += 1
        if timeout is not None:
            accepted.timer = loop.call_later(timeout, self.expire, accepted.number)
        self._accepted[accepted.number] = accepted
        self.all_answered.clear()
        return accepted

    def ran(self, seq: Sequence, seconds: float) -> None:
        """A batch took so long that did not bring this sequence to its end."""
        if accepted := self._accepted.get(seq.request_id):
            timings = accepted.result.timings
            timings.forward = max(timings.forward, seconds)

    def hand_out(
        self,
        seq: Sequence,
        row: NDArray[Any] | InferenceFailed,
        cached: int,
        seconds: float,
        began: float,
    ) -> None:
        """What came of a sequence, `cached` tokens of which had been run before, in so many seconds from `began`."""
        accepted = self._accepted.get(seq.request_id)
        if accepted is None:  # its client left, or another of its sequences failed
            return
        result = accepted.result
        result.timings.forward = max(result.timings.forward, seconds)
        if isinstance(row, InferenceFailed):
            self.settle(seq.request_id, row)
            return
        result.rows[seq.index] = row
        prompt = seq.index * len(result.cached) // len(result.rows)  # each has a row a task
        result.cached[prompt] = min(result.cached[prompt], cached)
        result.timings.queue = max(0.0, began - accepted.arrival)
        accepted.missing -= 1
        try:
            if accepted.on_progress:
                accepted.on_progress(1)
        except Exception as error:  # the caller's own, and nobody else's
            self.settle(seq.request_id, error)
            return
        if not accepted.missing:
            self.settle(seq.request_id, None)

    def settle(self, number: int, error: Exception | None) -> None:
        """The one place where a request ends: answered, failed, or (its future cancelled) forgotten."""
        accepted = self._accepted.pop(number, None)
        if accepted is None:
            return
        if accepted.timer is not None:
            accepted.timer.cancel()
        self._ended(accepted)
        if not accepted.future.done():
            if error is not None:
                # Now, and here. Rows are torch's memory, to free which a thread lets go of Python's lock for a moment:
                # a caller's daemon thread that did it while Python ends would abort the process.
                accepted.result.rows.clear()
                accepted.future.set_exception(error)
            else:
                accepted.future.set_result(accepted.result)
        if not self._accepted:
            self.all_answered.set()

    def expire(self, number: int) -> None:
        self.settle(number, DeadlineExceeded("The request's deadline passed before its answer was ready."))

    def reject_all(self, error: Callable[[], EngineError]) -> None:
        """Each with an error of its own."""
        for number in list(self._accepted):
            self.settle(number, error())
