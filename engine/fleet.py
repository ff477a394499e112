"""Fleet: the workers, and which of them gets the next batch. On the event loop; workers compute in threads.

Scheduler → Batch → a worker → rows → the owner
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from carpool.engine.errors import InferenceFailed, Undone
from carpool.engine.worker import Runner, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from carpool.engine.batch import Batch
    from carpool.engine.scheduler import Scheduler
    from carpool.engine.sequence import Sequence
    from carpool.engine.worker import Row

# For a batch under way that nobody waits for. A thread that comes out of torch when Python is gone already aborts the
# process, so most batches are let finish; one that hangs is left behind.
_LAST_BATCH_S = 5.0

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """Who waits for what the fleet does. Called on the event loop."""

    def patience(self, batch: Batch) -> float:
        """Seconds after which the worker that runs this batch is taken for one that hangs."""

    def is_waited_for(self, seq: Sequence) -> bool:
        """Whether its request has not ended."""

    def landed(self, batch: Batch, rows: list[Row], seconds: float, began: float) -> None:
        """A batch was run, in so many seconds from `began` on time.monotonic()'s clock."""

    def expired(self, sequences: list[Sequence]) -> None:
        """Their deadline passed before they could ride."""

    def lost(self, why: str) -> None:
        """A worker is lost, with its batches: no more are given to any."""


class Fleet:
    """`idle` workers have nothing to do, `held` are the batches of each that has, in the order of their results.

    One watchdog a worker watches over the first of them.

    From when all have work until none has, each is sent home to its own CPUs. Else the system, for which a core with
    the event loop on it is taken, puts two of them on another for milliseconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runners: Seq[Runner],
        owner: Owner,
        homes: Seq[Seq[int]] = (),
        always_home: bool = False,
    ) -> None:
        """`homes`: the CPUs of each worker, none to let them float always; `always_home`: also while some are idle."""
        loop = asyncio.get_running_loop()
        self._scheduler = scheduler
        self._owner = owner
        self._due = False  # a dispatch at the end of this turn of the loop
        self._over = False  # no more batches are given to any
        self._always_home = always_home
        self._at_home = always_home
        self.workers = [
            Worker(
                runner,
                done=partial(_call_on, loop, self._safely, self._done),
                died=partial(_call_on, loop, self._died),
                name=f"carpool-worker-{i}",
                home=homes[i] if homes else (),
            )
            for i, runner in enumerate(runners)
        ]
        self.idle = list(self.workers)
        self.held: dict[Worker, deque[Batch]] = {}
        self.watchdogs: dict[Worker, asyncio.TimerHandle] = {}

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """End the threads after what they hold; does not wait."""
        for worker in self.workers:
            worker.stop()

    def is_alive(self) -> bool:
        return any(worker.is_alive() for worker in self.workers)

    def carries(self, adapter: int) -> bool:
        """Whether a sequence under way is on this adapter."""
        batches = chain.from_iterable(self.held.values())
        return any(seq.adapter == adapter for batch in batches for seq in batch.sequences)

    async def end(self) -> None:
        """Stop, and wait for the threads, though not for one that hangs: what is held then is nobody's business."""
        self.stop()
        give_up = time.monotonic() + _LAST_BATCH_S
        while self.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._over = True
        for watchdog in self.watchdogs.values():
            watchdog.cancel()

    def dispatch_soon(self) -> None:
        """Dispatch at the end of this turn of the loop: requests read in the same turn may ride together."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._safely, self._dispatch)

    def _dispatch(self) -> None:
        """Give every worker that can do with one a batch, as long as something waits."""
        self._due = False
        scheduler = self._scheduler
        while (
            scheduler.waiting_sequences
            and not self._over
            and (worker := self._taker(scheduler.fills_a_batch))
        ):
            # A worker counts once, whatever its places: a short queue is shared by devices.
            batch = scheduler.schedule(time.monotonic(), len(self.idle))
            if expired := scheduler.take_expired():
                self._owner.expired(expired)
            if batch is None:
                return
            if worker in self.held:
                self.held[worker].append(batch)
            else:
                self.idle.remove(worker)
                self.held[worker] = deque((batch,))
                self._watch(worker)
                if not self.idle:
                    self._at_home = True
            worker.submit(batch, self._at_home)

    def _taker(self, full: bool) -> Worker | None:
        """Who takes the next batch; None if it had better wait. `full` is whether nothing could join it any more.

        A worker that is at work already takes another batch to have it ready when its device is done, but a full one
        only: any other grows while it waits, and dealt now it would go in two parts through one device, for the price
        of two.
        """
        if self.idle:
            return self.idle[-1]
        if not full:
            return None
        with_room = [worker for worker, held in self.held.items() if len(held) < worker.places]
        return min(with_room, key=lambda worker: len(self.held[worker]), default=None)

    def _done(self, worker: Worker, batch: Batch, rows: list[Row], seconds: float, began: float) -> None:
        self.watchdogs.pop(worker).cancel()
        self.held[worker].popleft()
        if self.held[worker]:
            self._watch(worker)  # the next one, from now on
        else:
            del self.held[worker]
            self.idle.append(worker)
            if not self.held:
                self._at_home = self._always_home
        self._report(batch, rows)
        self._dispatch()  # first, so that the worker is busy while results are handed out
        self._owner.landed(batch, rows, seconds, began)

    def _report(self, batch: Batch, rows: list[Row]) -> None:
        """Tell the scheduler how the batch went, if it keeps anything for those in it."""
        if not self._scheduler.is_paged:
            return
        gone = {seq for seq in batch.sequences if not self._owner.is_waited_for(seq)}
        if any(isinstance(row, Undone) for row in rows):
            self._scheduler.undone(batch, gone)
            return
        pairs = zip(batch.sequences, rows, strict=True)
        failed = {seq for seq, row in pairs if isinstance(row, InferenceFailed)}
        self._scheduler.landed(batch, gone, failed)

    def _watch(self, worker: Worker) -> None:
        """Give the worker's oldest batch its time from now."""
        patience = self._owner.patience(self.held[worker][0])
        self.watchdogs[worker] = asyncio.get_running_loop().call_later(patience, self._hung)

    def _safely(self, call: Callable[..., None], *args: object) -> None:
        """An error of our own on the loop would leave those waiting whom it kept from being told."""
        try:
            call(*args)
        except Exception as error:
            _log.exception("The engine fails by a fault of its own.")
            self._lose(f"The engine failed: {type(error).__name__}.")

    def _hung(self) -> None:
        if not self._over:  # else it holds what a stop has left behind
            self._lose("A worker hangs.")

    def _died(self, worker: Worker, error: BaseException) -> None:
        self._lose(f"A worker died: {type(error).__name__}.")

    def _lose(self, why: str) -> None:
        self._over = True
        self._owner.lost(why)


def _call_on(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: object) -> None:
    """From a worker's thread. Once the loop is closed nobody waits for what a late batch has to say."""
    try:  # noqa: SIM105  # suppress() is three calls more, between a batch and its clients
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass
