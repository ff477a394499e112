"""Core: what runs prompts that were made ready. It joins the queue, the workers, and those who wait.

Prepared → Pending → Sequences → Scheduler → Batch → Fleet → rows → Pending → the request's future
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from carpool.engine import garbage
from carpool.engine.admission import Admission, admit
from carpool.engine.changes import Change, LoadAdapter, ResetCaches, UnloadAdapter
from carpool.engine.config import EngineConfig
from carpool.engine.errors import (
    ConfigError,
    Draining,
    EngineDead,
    EngineError,
    InferenceFailed,
    Undone,
    UnknownAdapter,
)
from carpool.engine.fleet import Fleet
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import PoolingParams
from carpool.engine.pending import Accepted, Pending
from carpool.engine.preparation import Built
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.results import Results
from carpool.engine.roster import Roster
from carpool.engine.scheduler import Scheduler
from carpool.engine.stats import CacheStats, Observer, ResultStats, State, Unobserved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from carpool.engine.batch import Batch
    from carpool.engine.sequence import Sequence
    from carpool.engine.worker import Row

_WARM_UP_TOKENS = 512  # a worker
_AT_ONCE = 2_000  # sequences of a request that are queued before others have their turn of the loop
# And 20 times what a batch is to take: none takes this long unless its thread hangs.
_HUNG_AFTER_S = 600.0


def _build(config: EngineConfig) -> Built:
    with garbage.put_off():
        from carpool.engine.build import build  # here, since it imports torch and transformers

    return build(config)


class Core:
    """Continuous batching over worker threads. All methods are called on the event loop that started it."""

    def __init__(self, config: EngineConfig, build: Callable[[EngineConfig], Built] = _build) -> None:
        self._config = config
        self.observer: Observer = Unobserved()
        self.state: State = "starting"
        self._build = build
        self.parts: Built | None = None
        self._scheduler: Scheduler | None = None
        self._admission = Admission(config.max_queued_tokens, 1, 1)
        self._fleet: Fleet | None = None
        self._results = Results(config.cache_size)
        self._pending = Pending(self._ended)
        self._dead = asyncio.Event()
        self._changing = asyncio.Lock()
        self._roster: Roster | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Load, check and warm up; raises ConfigError if the model cannot be served."""
        parts = await asyncio.get_running_loop().run_in_executor(None, self._build, self._config)
        if self.state != "starting":  # told to stop meanwhile
            return
        self.parts, model = parts, parts.model
        self._roster = Roster(model, parts.rack, self._rides, self._adapters_are)
        self._scheduler = Scheduler(
            model.max_num_batched_tokens,
            model.max_num_seqs,
            batch_tokens=model.batch_tokens,
            # A device that has batches ahead wants full ones, and is not waited for.
            workers=sum(runner.depth == 1 for runner in parts.runners) or 1,
            by_length=model.by_length,
            paging=parts.cache.paging if parts.cache else None,
        )
        self._admission = Admission(
            self._config.max_queued_tokens,
            model.batch_tokens or model.max_num_batched_tokens,
            len(parts.runners),
        )
        always_home = bool(self._config.pin_workers)
        self._fleet = Fleet(self._scheduler, parts.runners, self, model.worker_cpus, always_home)
        self._fleet.start()
        try:
            await self._warm_up(parts)
        except EngineError as error:
            self._fleet.stop()
            if self.state in ("starting", "dead"):
                raise ConfigError(f"The model fails at its first batch: {error}") from error
        if self.state == "starting":
            self.state = "ready"

    async def _warm_up(self, parts: Built) -> None:
        """Run every worker once for its one-off costs, and once more to learn the throughput if it is not known."""
        model, known = parts.model, parts.tokens_per_second
        length = min(model.max_model_len, model.max_num_batched_tokens, 128)
        count = max(1, _WARM_UP_TOKENS // length) * len(parts.runners)
        # Of several words each: mBART reads its last word that is no pad.
        prompts = [[(i + j) % model.vocab_size for j in range(length)] for i in range(count)]
        request = Request(PoolingParams(), (model.default_task,))
        for _ in range(1 if known else 2):
            if self.state != "starting":
                return
            start = time.perf_counter()
            await self._run(request, Prepared(prompts), [None] * count, None, None)
            self._admission.tokens_per_second = known or count * length / (time.perf_counter() - start)

    def drain(self) -> None:
        """Let `state` say that no more are to be let in. What comes all the same is run until `stop`."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    async def stop(self, timeout: float) -> bool:
        """Drain, wait up to `timeout` s for accepted work, then end the workers. True if all of it was answered."""
        self.drain()
        try:
            async with asyncio.timeout(timeout):
                while not self._pending.all_answered.is_set():
                    await self._pending.all_answered.wait()
            finished = True
        except TimeoutError:
            finished = False
        if self.state != "dead":
            self.state = "stopped"  # before the workers are: nothing comes in behind the last answer
        if not finished:
            self._pending.reject_all(
                lambda: Draining("The server stopped before this request could be finished.")
            )
        if self._fleet:
            await self._fleet.end()
        if self._roster is not None:
            self._roster.close()
        return finished

    async def died(self) -> None:
        """Returns when the engine is dead: a worker is lost or hangs, and the process should exit."""
        await self._dead.wait()

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def waiting_tokens(self) -> int:
        return self._scheduler.waiting_tokens if self._scheduler else 0

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, measured at warm-up and whenever they were busy."""
        return self._admission.tokens_per_second

    @property
    def waiting_sequences(self) -> int:
        return self._scheduler.waiting_sequences if self._scheduler else 0

    @property
    def cache_stats(self) -> CacheStats | None:
        """None where no keys and values are kept."""
        return self.parts.cache.stats if self.parts and self.parts.cache else None

    @property
    def result_stats(self) -> ResultStats | None:
        """None where no results are kept."""
        return self._results.stats

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raise Overloaded if even the shortest prompt would be refused."""
        self._admission.check(1, self.waiting_tokens)

    async def run(
        self,
        request: Request,
        ready: Prepared,
        timeout: float | None,
        on_progress: Callable[[int], object] | None = None,
    ) -> PoolingResult:
        """A row for each that is asked for: kept, or run. All or none; raises the errors of `engine.errors`.

        After `timeout` seconds that is DeadlineExceeded. `on_progress(n)` is told of n more rows done. Cancelling the
        awaiting task drops what still waits.
        """
        admit(self.state)
        assert self._roster is not None
        assert self._scheduler is not None
        if request.adapter not in self._roster.slots:
            raise UnknownAdapter("The adapter was unloaded while this request was on its way.", "model")
        found = self._results.find(ready.keys)
        if waiting := self._scheduler.waiting_tokens:
            tasks = len(request.tasks)
            tokens = sum(len(ready.token_ids[i // tasks]) for i, row in enumerate(found) if row is None)
            self._admission.check(tokens, waiting)
        return await self._run(request, ready, found, timeout, on_progress)

    async def _run(
        self,
        request: Request,
        ready: Prepared,
        found: list[NDArray[Any] | None],
        timeout: float | None,
        on_progress: Callable[[int], object] | None,
    ) -> PoolingResult:
        """`found` are the rows that need not be run, None for the others."""
        assert self._scheduler is not None
        assert self._fleet is not None
        missing = [row is None for row in found].count(True)
        if on_progress and missing < len(found):
            on_progress(len(found) - missing)
        if not missing:
            return PoolingResult(found, ready.token_ids, cached=[0] * len(ready.token_ids))  # type: ignore[arg-type]
        accepted = self._pending.enter(request, ready, found, missing, timeout, on_progress)
        self._admission.enter(accepted.tokens)
        try:
            for seq in request.sequences(accepted.number, ready, accepted.arrival, accepted.deadline):
                if found[seq.index] is None:
                    self._scheduler.add(seq)
                if seq.index % _AT_ONCE == _AT_ONCE - 1:
                    self._fleet.dispatch_soon()
                    await asyncio.sleep(0)
                    if accepted.future.done():  # one of the first failed, or time is up
                        break
            self._fleet.dispatch_soon()
            return await accepted.future
        except BaseException:
            self._pending.settle(accepted.number, None)  # the caller was cancelled, or it has ended already
            raise

    def _ended(self, accepted: Accepted) -> None:
        """A request is over, in whichever way: it counts no longer, and nothing more of it is run."""
        self._admission.leave(accepted.tokens)
        if not accepted.missing:
            return
        assert self._scheduler is not None
        assert self._fleet is not None
        if dropped := self._scheduler.abort(accepted.number):
            self.observer.sequences_cancelled(dropped)
        if self._scheduler.waiting_sequences:
            self._fleet.dispatch_soon()  # what rested for its sake waits again

    # ── what may change ──────────────────────────────────────────────────────────────────────────────────

    async def change(self, change: Change) -> None:
        """Make it. Whoever asks after that finds it made. Raises InvalidInput for what cannot be.

        It is made to its end, also when who asked for it has gone.
        """
        admit(self.state)
        making = asyncio.ensure_future(self._change(change))
        # What it raises is heard, if by nobody else.
        making.add_done_callback(lambda made: made.cancelled() or made.exception())
        await asyncio.shield(making)

    async def _change(self, change: Change) -> None:
        assert self._roster is not None, "it was asked for when the engine was ready"
        async with self._changing:
            match change:
                case LoadAdapter():
                    await self._roster.load(change)
                case UnloadAdapter():
                    self._roster.unload(change.name)
                case ResetCaches():
                    self._reset_caches()

    def _adapters_are(self, slots: Mapping[str, int], modules: Mapping[str, str]) -> None:
        assert self.parts is not None
        self.parts = self.parts.of(replace(self.parts.model, adapters=slots, lora_modules=modules))

    def _rides(self, slot: int) -> bool:
        """Whether an adapter is still needed."""
        assert self._fleet is not None
        return self._pending.rides(slot) or self._fleet.carries(slot)

    def _reset_caches(self) -> None:
        """What is under way goes on with what it has."""
        self._results.forget()
        if self.parts is not None and self.parts.cache is not None:
            self.parts.cache.forget()

    # ── what the fleet says ──────────────────────────────────────────────────────────────────────────────

    def patience(self, batch: Batch) -> float:
        """A worker has its part of the rate, and a long prompt takes longer than as many tokens of short ones."""
        assert self._fleet is not None
        rate = self._admission.tokens_per_second / len(self._fleet.workers)
        return max(_HUNG_AFTER_S, 20 * batch.num_tokens / rate if rate else 0.0)

    def is_waited_for(self, seq: Sequence) -> bool:
        return seq.request_id in self._pending

    def landed(self, batch: Batch, rows: list[Row], seconds: float, began: float) -> None:
        """Hand out what came back; what is None or undone is run on by itself."""
        assert self._scheduler is not None
        if self.state != "starting":  # the warm-up is nobody's traffic
            self.observer.batch_done(batch.num_tokens, len(batch.sequences), seconds)
            if self._scheduler.waiting_tokens:
                self._admission.measured(batch.num_tokens, seconds)
        for seq, row in zip(batch.sequences, rows, strict=True):
            if row is None or isinstance(row, Undone):
                self._pending.ran(seq, seconds)
                continue
            if seq.key and not isinstance(row, InferenceFailed):
                self._results.keep(seq.key, row)
            self._pending.hand_out(seq, row, seq.cached, seconds, began)
            for twin in self._scheduler.take_twins(seq):
                own = row.anew() if isinstance(row, InferenceFailed) else row
                self._pending.hand_out(twin, own, seq.cached, seconds, began)

    def expired(self, sequences: list[Sequence]) -> None:
        self.observer.sequences_cancelled(len(sequences))
        for seq in sequences:
            self._pending.expire(seq.request_id)

    def lost(self, why: str) -> None:
        """A lost worker took its batches along; nothing that waits can be promised an answer."""
        self.state = "dead"
        self._pending.reject_all(lambda: EngineDead(why, retry_after=10))
        self._dead.set()
