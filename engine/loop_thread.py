"""LoopThread: an event loop in a thread of its own, for callers that have none (or one that must not block).

The one file where asyncio and threads meet by design: that meeting is its noun.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import CancelledError
from threading import Lock, Thread, current_thread
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines to completion for a synchronous caller, in notebooks too, where a loop runs already."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._closing = False
        self._lock = Lock()  # so that nothing is handed to the loop behind what ends it
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; interrupting the caller (Ctrl-C) cancels the coroutine.

        RuntimeError where its result would never come: in a process forked from the one that made this, in the loop's
        own thread, and once this is closed, be it while the caller waits.
        """
        try:
            self._check()
            with self._lock:
                if self._closing:
                    raise RuntimeError("This LLM is closed: make another to go on.")
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise
        try:
            return future.result()
        except CancelledError:  # nobody else cancels it
            raise RuntimeError("This LLM was closed before it could answer.") from None
        except BaseException:
            future.cancel()
            raise

    def _check(self) -> None:
        if self._is_elsewhere():
            raise RuntimeError(
                "This LLM's threads stayed behind in the process that this one was forked from: make an LLM in each "
                "process, or have multiprocessing spawn them."
            )
        if current_thread() is self._thread:
            raise RuntimeError(
                "This LLM is asked in its own thread, as by its progress bar: it would wait for itself."
            )

    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._process

    def run_all(self, calls: Seq[Callable[[], Coroutine[Any, Any, T]]], at_once: int) -> list[T]:
        """The result of each, at most `at_once` of them under way. The first that fails ends all, and is raised."""
        return self.run(_all(calls, at_once))

    def close(self, last: Coroutine[Any, Any, object] | None = None) -> None:
        """Tell those who still wait, run `last`, then end the loop and its thread. Nothing, if done before.

        Garbage may be collected in any thread, the loop's own included, which cannot wait for itself; and in a forked
        process, where there is nothing to end.
        """
        if current_thread() is self._thread:
            Thread(target=self.close, args=(last,), name=f"{self._thread.name}-close", daemon=True).start()
            return
        if not self._is_elsewhere():
            with self._lock:
                first, self._closing = not self._closing, True
            if first:
                self._end(last)
                return
        if last is not None:
            last.close()

    def _end(self, last: Coroutine[Any, Any, object] | None) -> None:
        try:
            asyncio.run_coroutine_threadsafe(_finish(last), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
            if not self._thread.is_alive():
                self._loop.close()


async def _finish(last: Coroutine[Any, Any, object] | None) -> None:
    """No more of what is under way, or what waits for a thread would never hear of it; then `last`, which finds nobody
    to tell in words of its own.
    """
    try:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
    finally:
        if last is not None:
            await last


async def _all(calls: Seq[Callable[[], Coroutine[Any, Any, T]]], at_once: int) -> list[T]:
    gate = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with gate:
            return await call()

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
