"""LoopThread: an event loop in a thread of its own, for callers that have none (or one that must not block).

The one file where asyncio and threads meet by design: that meeting is its noun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as Seq
from threading import Thread, current_thread
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines to completion for a synchronous caller, in notebooks too, where a loop runs already."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; interrupting the caller (Ctrl-C) cancels the coroutine."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def run_all(self, calls: Seq[Callable[[], Coroutine[Any, Any, T]]], at_once: int) -> list[T]:
        """The result of each, at most `at_once` of them under way. The first that fails ends all, and is raised."""
        return self.run(_all(calls, at_once))

    def close(self, last: Coroutine[Any, Any, object] | None = None) -> None:
        """Run `last`, then end the loop and its thread.

        Garbage may be collected in any thread, the loop's own included, which cannot wait for itself.
        """
        if current_thread() is self._thread:
            Thread(target=self.close, args=(last,), name=f"{self._thread.name}-close", daemon=True).start()
            return
        if last is not None:
            self.run(last)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()


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
