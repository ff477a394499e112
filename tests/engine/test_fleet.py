"""The fleet sends its workers home, each to CPUs of its own, while all of them have work."""

from __future__ import annotations

import asyncio
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from carpool.engine.batch import Batch
from carpool.engine.fleet import Fleet
from carpool.engine.params import PoolingParams
from carpool.engine.scheduler import Scheduler
from carpool.engine.sequence import Sequence
from carpool.engine.worker import Landing, Worker

BOTH, ONE = 2, 1  # batches that are under way at once


class Runner:
    """Each batch lands when it is let."""

    depth = 1

    def __init__(self) -> None:
        self.let = SimpleQueue[None]()

    def bind(self) -> None: ...

    def launch(self, batch: Batch) -> Landing:
        self.let.get(timeout=5)
        return lambda: [np.zeros(1, np.float32) for _ in batch.sequences]


class Owner:
    """Waits for batches."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    def patience(self, batch: Batch) -> float:
        return 60.0

    def is_waited_for(self, seq: Sequence) -> bool:
        return True

    def landed(self, *_: Any) -> None:
        self.ended.set()

    def expired(self, sequences: list[Sequence]) -> None: ...

    def lost(self, why: str) -> None:
        raise AssertionError(why)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each batch in turn, whether it was to be run at home."""
    sent: list[bool] = []
    submit = Worker.submit

    def recorded(worker: Worker, batch: Batch, at_home: bool = False) -> None:
        sent.append(at_home)
        submit(worker, batch, at_home)

    monkeypatch.setattr(Worker, "submit", recorded)
    return sent


async def under_way(rounds: list[int], **options: Any) -> None:
    """One round after the other, of so many batches at once, each let land before the next begins."""
    scheduler, owner, runners = Scheduler(64, 1, workers=2), Owner(), [Runner(), Runner()]
    fleet = Fleet(scheduler, runners, owner, **options)
    fleet.start()
    number = 0
    for batches in rounds:
        for _ in range(batches):
            scheduler.add(Sequence(number, 0, [1, 2], PoolingParams()))
            number += 1
        fleet.dispatch_soon()
        await asyncio.sleep(0)
        while fleet.held:
            owner.ended.clear()
            next(r for r, w in zip(runners, fleet.workers, strict=True) if w in fleet.held).let.put(None)
            await asyncio.wait_for(owner.ended.wait(), 5)
    await fleet.end()


@pytest.mark.asyncio
async def test_workers_are_sent_home_from_when_all_have_work_until_none_has(sent: list[bool]) -> None:
    await under_way([ONE, BOTH, ONE, ONE])
    assert sent == [False, False, True, False, False]


@pytest.mark.asyncio
async def test_a_backlog_is_run_at_home(sent: list[bool]) -> None:
    await under_way([5, ONE])
    assert sent == [False, True, True, True, True, False]


@pytest.mark.asyncio
async def test_who_is_always_home_is_so_alone_as_well(sent: list[bool]) -> None:
    await under_way([ONE, BOTH, ONE], always_home=True)
    assert sent == [True] * 4
