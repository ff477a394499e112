"""LoopThread: a loop for those who have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from carpool.engine.loop_thread import LoopThread


async def nothing() -> None:
    """The last thing that a loop is asked for."""


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    made = LoopThread("under-test")
    yield made
    if made._thread.is_alive():
        made.close(nothing())


async def thread_name() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


def test_coroutines_run_in_its_thread(loop: LoopThread) -> None:
    assert loop.run(thread_name()) == "under-test"


async def test_it_serves_a_caller_whose_own_loop_is_running(loop: LoopThread) -> None:
    assert loop.run(thread_name()) == "under-test"


def test_exceptions_come_back(loop: LoopThread) -> None:
    async def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop.run(fails())


def test_an_interrupted_caller_cancels_what_it_waited_for(
    loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    async def long() -> None:
        entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupted(self: object) -> None:
        assert entered.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(long())
    assert cancelled.wait(10)
    monkeypatch.undo()


def test_closing_runs_the_last_wish_and_ends_the_thread(loop: LoopThread) -> None:
    done = threading.Event()

    async def last() -> None:
        done.set()

    loop.close(last())
    assert done.is_set()
    assert not loop._thread.is_alive()
    assert loop._loop.is_closed()


def test_closing_from_its_own_thread_does_not_wait_for_itself(loop: LoopThread) -> None:
    async def close() -> None:
        loop.close(nothing())

    loop.run(close())
    loop._thread.join(10)
    assert not loop._thread.is_alive()
