"""LoopThread: a loop for those who have none."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

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


async def forever() -> None:
    await asyncio.Event().wait()


def test_who_waits_when_it_is_closed_is_told(loop: LoopThread) -> None:
    """Also one whose coroutine waits for a thread, which would have nobody to tell once the loop has stopped; and one
    who would hear of it from the last wish, in other words.
    """
    proceed = threading.Event()
    promised: list[asyncio.Future[None]] = []
    told: list[str] = []

    async def busy() -> None:
        await asyncio.get_running_loop().run_in_executor(None, proceed.wait, 20)

    async def served() -> None:
        promised.append(asyncio.get_running_loop().create_future())
        await promised[0]

    async def stop() -> None:
        if not promised[0].done():
            promised[0].set_exception(OSError("The server stopped."))
        await asyncio.sleep(0.01)

    def call(coroutine: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with pytest.raises(RuntimeError) as caught:
            loop.run(coroutine())
        told.append(str(caught.value))

    async def under_way() -> int:
        await asyncio.sleep(0.001)
        return len(asyncio.all_tasks()) - 1

    callers = [threading.Thread(target=call, args=(one,), daemon=True) for one in (busy, forever, served)]
    for caller in callers:
        caller.start()
    while loop.run(under_way()) < 3:
        pass
    loop.close(stop())
    for caller in callers:
        caller.join(10)
    proceed.set()
    assert told == ["This LLM was closed before it could answer."] * 3


def test_nothing_is_run_once_it_is_closed(loop: LoopThread) -> None:
    loop.close(nothing())
    loop.close(nothing())
    with pytest.raises(RuntimeError, match="is closed"):
        loop.run(forever())


def test_it_ends_even_if_the_last_wish_fails(loop: LoopThread) -> None:
    async def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop.close(fails())
    assert not loop._thread.is_alive()


def test_who_asks_in_its_own_thread_is_refused(loop: LoopThread) -> None:
    async def ask() -> None:
        loop.run(forever())

    with pytest.raises(RuntimeError, match="wait for itself"):
        loop.run(ask())


def test_a_forked_process_is_refused_and_leaves_it_alone(loop: LoopThread) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)
            loop.run(forever())
        except RuntimeError as error:
            loop.close(nothing())
            status = 0 if "forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run(thread_name()) == "under-test"


def test_of_many_calls_so_many_are_under_way_at_once_and_answers_keep_their_order(loop: LoopThread) -> None:
    under_way, most = 0, 0

    def call(number: int) -> Callable[[], Coroutine[Any, Any, int]]:
        async def answer() -> int:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            for _ in range(10 - number):  # the first are the last to end
                await asyncio.sleep(0)
            under_way -= 1
            return number

        return answer

    assert loop.run_all([call(number) for number in range(10)], at_once=3) == list(range(10))
    assert most == 3


def test_the_first_call_that_fails_ends_all(loop: LoopThread) -> None:
    ended = threading.Event()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop.run_all([long, fails, long], at_once=2)
    assert ended.wait(10)
