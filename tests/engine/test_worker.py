"""The worker's thread: results and death are both told, each once, from the thread itself."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from carpool.engine.batch import Batch
from carpool.engine.params import PoolingParams
from carpool.engine.sequence import Sequence
from carpool.engine.worker import Row, Worker

BATCH = Batch((Sequence(0, 0, [1, 2], PoolingParams()),))


class Recorder:
    """A runner and the two listeners, all in one."""

    def __init__(self, bind: BaseException | None = None, run: BaseException | None = None) -> None:
        self.errors = {"bind": bind, "run": run}
        self.calls: list[tuple[str, threading.Thread]] = []
        self.told: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.worker = Worker(self, self.done, self.died, "under-test")

    def _called(self, name: str) -> None:
        self.calls.append((name, threading.current_thread()))
        error = self.errors[name]
        if error:
            raise error

    def bind(self) -> None:
        self._called("bind")

    def run(self, batch: Batch) -> list[Row]:
        self._called("run")
        return [np.zeros(1, np.float32) for _ in batch.sequences]

    def done(self, *result: Any) -> None:
        self.told.put(("done", threading.current_thread(), *result))

    def died(self, *result: Any) -> None:
        self.told.put(("died", threading.current_thread(), *result))


def test_everything_happens_in_the_workers_own_thread() -> None:
    recorder = Recorder()
    recorder.worker.start()
    recorder.worker.submit(BATCH)
    what, thread, worker, batch, rows, seconds = recorder.told.get(timeout=5)
    assert (what, worker, batch, len(rows)) == ("done", recorder.worker, BATCH, 1)
    assert seconds >= 0
    assert thread.name == "under-test"
    assert {caller for _, caller in recorder.calls} == {thread}
    assert [name for name, _ in recorder.calls] == ["bind", "run"]
    recorder.worker.stop()


def test_it_stops_behind_the_batch_that_was_given() -> None:
    recorder = Recorder()
    recorder.worker.submit(BATCH)
    recorder.worker.stop()
    recorder.worker.start()
    assert recorder.told.get(timeout=5)[0] == "done"
    recorder.worker._thread.join(5)
    assert not recorder.worker.is_alive()
    assert recorder.told.empty()


@pytest.mark.parametrize("where", ["bind", "run"])
@pytest.mark.parametrize("error", [RuntimeError("lost"), SystemExit(3), KeyboardInterrupt()])
def test_its_death_is_told_once_whatever_kills_it(where: str, error: BaseException) -> None:
    recorder = Recorder(**{where: error})
    recorder.worker.start()
    recorder.worker.submit(BATCH)
    what, _, worker, reason = recorder.told.get(timeout=5)
    assert (what, worker, reason) == ("died", recorder.worker, error)
    recorder.worker._thread.join(5)
    assert recorder.told.empty()


def test_its_thread_does_not_keep_the_process_alive() -> None:
    assert Recorder().worker._thread.daemon
