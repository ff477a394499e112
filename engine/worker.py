"""Worker: one thread that owns one replica of the model and runs one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.memory import HeapTrimmer

Row = NDArray[np.float32] | InferenceFailed


class Runner(Protocol):
    """What a worker drives; `engine/runner.py` in earnest, a stand-in in tests."""

    def bind(self) -> None:
        """Called once in the worker's thread, first."""

    def run(self, batch: Batch) -> list[Row]:
        """One result a sequence; must not raise for a bad input."""
        ...


class Worker:
    """Hands each result to `done(worker, batch, rows, seconds)`, and its death to `died(worker, error)`.

    Both are called in the worker's thread. Depth is 1: the owner submits to idle workers only.
    """

    def __init__(
        self,
        runner: Runner,
        done: Callable[[Worker, Batch, list[Row], float], object],
        died: Callable[[Worker, BaseException], object],
        name: str,
    ) -> None:
        self._runner = runner
        self._done = done
        self._died = died
        self._inbox: SimpleQueue[Batch | None] = SimpleQueue()
        # A daemon, since a thread that hangs inside a kernel must not keep the process from exiting.
        self._thread = Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, batch: Batch) -> None:
        self._inbox.put(batch)

    def stop(self) -> None:
        """End the thread after the batch under way; does not wait."""
        self._inbox.put(None)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._runner.bind()
            heap = HeapTrimmer()
            while (batch := self._inbox.get()) is not None:
                start = time.perf_counter()
                rows = self._runner.run(batch)
                if len(rows) != len(batch.sequences):
                    raise AssertionError(f"{len(rows)} results for {len(batch.sequences)} sequences")
                self._done(self, batch, rows, time.perf_counter() - start)
                heap.rest(time.monotonic())
        except BaseException as error:  # whatever it was, someone waits for this thread
            self._died(self, error)
