"""Worker: one thread that owns one replica of the model and keeps its device busy."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from numpy.typing import NDArray

from carpool.engine.batch import Batch
from carpool.engine.errors import InferenceFailed
from carpool.engine.memory import heap

Row = NDArray[Any] | InferenceFailed | None  # None: the rest of its prompt is still to be run
Landing = Callable[[], list[Row]]  # waits for a batch that was launched: one result a sequence

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """What a worker drives; `engine/runner.py` in earnest, a stand-in in tests."""

    @property
    def depth(self) -> int:
        """Batches that may be under way at once: 1 where `launch` computes, more where a device does meanwhile."""
        ...

    def bind(self) -> None:
        """Called once in the worker's thread, first."""

    def launch(self, batch: Batch) -> Landing:
        """Begin a batch. Landings are called once each, in the order of launches.

        Neither may raise for a bad input.
        """
        ...


class Worker:
    """Hands each result to `done(worker, batch, rows, seconds, began)`, and its death to `died(worker, error)`.

    Both are called in the worker's thread: `done` in the order of submission, `died` at most once and last. `seconds`
    is how long the batch had the device to itself, from `began` on time.monotonic()'s clock on. The owner submits no
    more than `places` batches that are not done. With a batch that is to be run at `home` the thread binds itself to
    those CPUs, if there are any, and with the next one that is not it floats again.
    """

    def __init__(
        self,
        runner: Runner,
        done: Callable[[Worker, Batch, list[Row], float, float], object],
        died: Callable[[Worker, BaseException], object],
        name: str,
        home: Collection[int] = (),
    ) -> None:
        self._runner = runner
        self._done = done
        self._died = died
        self._home = home
        self._abroad: Collection[int] = ()  # where it may run when it floats; none while it does
        self._inbox: SimpleQueue[tuple[Batch, bool] | None] = SimpleQueue()
        # A daemon, since a thread that hangs inside a kernel must not keep the process from exiting.
        self._thread = Thread(target=self._main, name=name, daemon=True)

    @property
    def places(self) -> int:
        """Batches it may hold: those under way and, where there are several, one more in the inbox.

        A thread that waits for one batch to land cannot see the next one come. What lies in the inbox already is
        launched the moment there is room, while the device is busy with what was launched before.
        """
        depth = self._runner.depth
        return depth + 1 if depth > 1 else 1

    def start(self) -> None:
        self._thread.start()

    def submit(self, batch: Batch, at_home: bool = False) -> None:
        self._inbox.put((batch, at_home))

    def stop(self) -> None:
        """End the thread after what was submitted; does not wait."""
        self._inbox.put(None)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            self._runner.bind()
            self._serve()
        except BaseException as error:  # whatever it was, someone waits for this thread
            self._died(self, error)

    def _move(self, home: bool) -> None:
        """To its own CPUs, or to all that it came from: the thread, and nothing else of the process."""
        if not self._home or home == bool(self._abroad):
            return
        try:
            if home:
                everywhere = os.sched_getaffinity(0)
                os.sched_setaffinity(0, self._home)
                self._abroad = everywhere
            else:
                os.sched_setaffinity(0, self._abroad)
                self._abroad = ()
        except OSError as error:  # they were taken from the process since it was asked what it has
            _log.warning("%s is not bound to CPUs %s: %s", self._thread.name, list(self._home), error)
            self._home = ()

    def _serve(self) -> None:
        """Launch what there is up to the runner's depth; else land the oldest; with nothing under way, wait."""
        depth = self._runner.depth
        under_way: deque[tuple[Batch, Landing, float]] = deque()
        landed_at = 0.0
        stopping = False
        while under_way or not stopping:
            # `empty` can be trusted: nobody else takes anything out.
            if not stopping and (not under_way or (len(under_way) < depth and not self._inbox.empty())):
                submitted = self._inbox.get()
                if submitted is None:
                    stopping = True
                else:
                    batch, at_home = submitted
                    self._move(at_home)
                    start = time.monotonic()
                    under_way.append((batch, self._runner.launch(batch), start))
                continue
            landed_at = self._land(*under_way.popleft(), landed_at)
            heap.rest(time.monotonic())

    def _land(self, batch: Batch, landing: Landing, launched_at: float, before: float) -> float:
        """When it landed. The device was its own since it was launched, or since the one `before` it landed."""
        rows = landing()
        now = time.monotonic()
        if len(rows) != len(batch.sequences):
            raise AssertionError(f"{len(rows)} results for {len(batch.sequences)} sequences")
        began = max(launched_at, before)
        self._done(self, batch, rows, now - began, began)
        return now
