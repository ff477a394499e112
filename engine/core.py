"""Core: what runs prompts that were made ready. The queue, the workers, and the futures of those who wait.

    Prepared → Sequences → Scheduler → Batch → a worker thread → rows → the request's future

Futures live here, one a request, and are resolved or rejected in one place (`_settle`), also when a worker dies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from carpool.engine import garbage
from carpool.engine.admission import Admission, admit
from carpool.engine.changes import Change, LoadAdapter, ResetCaches, UnloadAdapter
from carpool.engine.config import EngineConfig
from carpool.engine.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    EngineDead,
    EngineError,
    InferenceFailed,
    Undone,
    UnknownAdapter,
)
from carpool.engine.fleet import Fleet
from carpool.engine.outputs import PoolingResult, Timings
from carpool.engine.params import PoolingParams
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
# For a batch under way that nobody waits for. A thread that comes out of torch when Python is gone already aborts the
# process, so most batches are let finish; one that hangs is left behind.
_LAST_BATCH_S = 5.0


@dataclass(slots=True, eq=False)
class _Pending:
    """One request that has been accepted and not yet answered."""

    future: asyncio.Future[PoolingResult]
    result: PoolingResult
    remaining: int
    tokens: int  # that had to be run for it
    adapter: int
    arrival: float
    timer: asyncio.TimerHandle | None = None
    on_progress: Callable[[int], object] | None = None


def _build(config: EngineConfig) -> Built:
    with garbage.put_off():
        from carpool.engine.build import build  # here, since it imports torch and transformers

    return build(config)


class Core:
    """Continuous batching over worker threads. All methods are called on the event loop that started it."""

    def __init__(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], Built] = _build,
    ) -> None:
        self._config = config
        self.observer: Observer = Unobserved()
        self.state: State = "starting"
        self._build = build
        self.parts: Built | None = None
        self._scheduler: Scheduler | None = None
        self._admission = Admission(config.max_queued_tokens, 1, 1)
        self._fleet: Fleet | None = None
        self._results = Results(config.cache_size)
        self._pending: dict[int, _Pending] = {}
        self._next_request_id = 0
        self._dead = asyncio.Event()
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        self._changing = asyncio.Lock()
        self._roster: Roster | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Load, check and warm up; raises ConfigError if the model cannot be served."""
        loop = asyncio.get_running_loop()
        parts = await loop.run_in_executor(None, self._build, self._config)
        if self.state != "starting":  # told to stop meanwhile
            return
        self.parts = parts
        self._roster = Roster(parts.model, parts.rack, self._rides, self._adapters_are)
        paging = parts.cache.paging if parts.cache else None
        info = parts.model
        self._scheduler = Scheduler(
            info.max_num_batched_tokens,
            info.max_num_seqs,
            batch_tokens=info.batch_tokens,
            # A device that has batches ahead wants full ones, and is not waited for.
            workers=sum(runner.depth == 1 for runner in parts.runners) or 1,
            paging=paging,
        )
        self._admission = Admission(
            self._config.max_queued_tokens,
            info.batch_tokens or info.max_num_batched_tokens,
            len(parts.runners),
        )
        self._fleet = Fleet(self._scheduler, parts.runners, self, info.worker_cpus)
        self._fleet.start()
        try:
            await self._warm_up(parts, len(parts.runners))
        except EngineError as error:
            self._fleet.stop()
            if self.state in ("starting", "dead"):
                raise ConfigError(f"The model fails at its first batch: {error}") from error
        if self.state == "starting":
            self.state = "ready"

    async def _warm_up(self, parts: Built, workers: int) -> None:
        """Run every worker once for its one-off costs, and once more to learn the throughput if it is not known."""
        length = min(parts.model.max_model_len, parts.model.max_num_batched_tokens, 128)
        count = max(1, _WARM_UP_TOKENS // length) * workers
        prompts = [[i % parts.model.vocab_size] * length for i in range(count)]
        known = parts.tokens_per_second
        for _ in range(1 if known else 2):
            if self.state != "starting":
                return
            start = time.perf_counter()
            request = Request(PoolingParams(), (parts.model.default_task,))
            await self._run(request, Prepared(prompts), [None] * count, None, None)
            self._admission.tokens_per_second = known or count * length / (time.perf_counter() - start)

    def drain(self) -> None:
        """Refuse new work with Draining; accepted work goes on."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    async def stop(self, timeout: float) -> bool:
        """Drain, wait up to `timeout` s for accepted work, then end the workers. True if all of it was answered."""
        self.drain()
        try:
            await asyncio.wait_for(self._all_answered.wait(), timeout)
            finished = True
        except TimeoutError:
            finished = False
            self._reject_all(lambda: Draining("The server stopped before this request could be finished."))
        if self._fleet:
            self._fleet.stop()
            give_up = time.monotonic() + _LAST_BATCH_S
            while self._fleet.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            self._fleet.forget()
        if self._roster is not None:
            self._roster.close()
        if self.state != "dead":
            self.state = "stopped"
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
        cache = self.parts.cache if self.parts else None
        if cache is None:
            return None
        pool = cache.paging.pool
        return CacheStats(pool.queried_tokens, pool.hit_tokens, pool.num_blocks, pool.num_used)

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
        if request.adapter not in self._roster.slots:
            raise UnknownAdapter("The adapter was unloaded while this request was on its way.", "model")
        found = self._results.find(ready.keys)
        if self.waiting_tokens:
            tasks = len(request.tasks)
            tokens = sum(len(ready.token_ids[i // tasks]) for i, row in enumerate(found) if row is None)
            self._admission.check(tokens, self.waiting_tokens)
        return await self._run(request, ready, found, timeout, on_progress)

    async def _run(
        self,
        request: Request,
        ready: Prepared,
        found: list[NDArray[Any] | None],
        timeout: float | None,
        on_progress: Callable[[int], object] | None,
    ) -> PoolingResult:
        """`found` are the rows that need not be run."""
        assert self._scheduler is not None
        assert self._fleet is not None
        missing = sum(row is None for row in found)
        if on_progress and missing < len(found):
            on_progress(len(found) - missing)
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        number = self._next_request_id
        self._next_request_id += 1
        tasks = len(request.tasks)
        if missing == len(found):
            cached = list(map(len, ready.token_ids))
        else:
            cached = [
                len(ids) if any(row is None for row in found[i * tasks : (i + 1) * tasks]) else 0
                for i, ids in enumerate(ready.token_ids)
            ]
        result = PoolingResult(found, ready.token_ids, Timings(), cached)  # type: ignore[arg-type]  # rows are to come
        if not missing:
            return result
        tokens = sum(cached)
        pending = _Pending(
            loop.create_future(), result, missing, tokens, request.adapter, now, on_progress=on_progress
        )
        self._admission.enter(tokens)
        deadline = None
        if timeout is not None:
            deadline = now + timeout
            pending.timer = loop.call_later(timeout, self._expire, number)
        self._pending[number] = pending
        self._all_answered.clear()
        try:
            for seq in request.sequences(number, ready, now, deadline):
                if found[seq.index] is None:
                    self._scheduler.add(seq)
                if seq.index % _AT_ONCE == _AT_ONCE - 1:
                    self._fleet.dispatch_soon()
                    await asyncio.sleep(0)
                    if pending.future.done():  # one of the first failed, or time is up
                        break
            self._fleet.dispatch_soon()
            return await pending.future
        finally:
            if number in self._pending:  # the caller was cancelled
                self._settle(number, None)

    # ── what may change ──────────────────────────────────────────────────────────────────────────────────

    async def change(self, change: Change) -> None:
        """Make it. Whoever asks after that finds it made. Raises InvalidInput for what cannot be.

        It is made to its end, also when who asked for it has gone.
        """
        admit(self.state)
        making = asyncio.ensure_future(self._change(change))
        making.add_done_callback(
            lambda made: made.cancelled() or made.exception()
        )  # heard, if by nobody else
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
        assert self._fleet is not None
        if any(pending.adapter == slot for pending in self._pending.values()):
            return True
        batches = chain.from_iterable(self._fleet.held.values())
        return any(seq.adapter == slot for batch in batches for seq in batch.sequences)

    def _reset_caches(self) -> None:
        """What is under way goes on with what it has."""
        self._results.forget()
        if self.parts is not None and self.parts.cache is not None:
            self.parts.cache.paging.pool.forget()

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
        if self.state != "starting":  # the warm-up is nobody's traffic
            self.observer.batch_done(batch.num_tokens, len(batch.sequences), seconds)
            if self.waiting_tokens:
                self._admission.measured(batch.num_tokens, seconds)
        assert self._scheduler is not None
        for seq, row in zip(batch.sequences, rows, strict=True):
            if row is None or isinstance(row, Undone):
                if pending := self._pending.get(seq.request_id):
                    pending.result.timings.forward = max(pending.result.timings.forward, seconds)
                continue
            if seq.key and not isinstance(row, InferenceFailed):
                self._results.keep(seq.key, row)
            self._hand_out(seq, row, seq.cached, seconds, began)
            for twin in self._scheduler.take_twins(seq):
                self._hand_out(twin, _anew(row), seq.cached, seconds, began)

    def _hand_out(
        self,
        seq: Sequence,
        row: NDArray[Any] | InferenceFailed,
        cached: int,
        seconds: float,
        began: float,
    ) -> None:
        """What came of a sequence, `cached` tokens of which had been run before."""
        pending = self._pending.get(seq.request_id)
        if pending is None:  # its client left, or another of its sequences failed
            return
        result = pending.result
        result.timings.forward = max(result.timings.forward, seconds)
        if isinstance(row, InferenceFailed):
            self._settle(seq.request_id, row)
            return
        result.rows[seq.index] = row
        prompt = seq.index * len(result.cached) // len(result.rows)  # each has a row a task
        result.cached[prompt] = min(result.cached[prompt], cached)
        result.timings.queue = max(0.0, began - pending.arrival)
        pending.remaining -= 1
        try:
            if pending.on_progress:
                pending.on_progress(1)
        except Exception as error:  # the caller's own, and nobody else's
            self._settle(seq.request_id, error)
            return
        if not pending.remaining:
            self._settle(seq.request_id, None)

    def expired(self, sequences: list[Sequence]) -> None:
        self.observer.sequences_cancelled(len(sequences))
        for seq in sequences:
            self._expire(seq.request_id)

    def lost(self, why: str) -> None:
        """A lost worker took its batches along; nothing that waits can be promised an answer."""
        self.state = "dead"
        self._reject_all(lambda: EngineDead(why, retry_after=10))
        self._dead.set()

    # ── the end of a request ─────────────────────────────────────────────────────────────────────────────

    def _settle(self, request_id: int, error: Exception | None) -> None:
        """The one place where a request ends: answered, failed, or (its future cancelled) forgotten."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return
        self._admission.leave(pending.tokens)
        if pending.timer is not None:
            pending.timer.cancel()
        if pending.remaining and self._scheduler is not None:
            dropped = self._scheduler.abort(request_id)
            if dropped:
                self.observer.sequences_cancelled(dropped)
            if self._fleet is not None and self._scheduler.waiting_sequences:
                self._fleet.dispatch_soon()  # what rested for its sake waits again
        if not pending.future.done():
            if error is not None:
                # Now, and here. Rows are torch's memory, to free which a thread lets go of Python's lock for a moment:
                # a caller's daemon thread that did it while Python ends would abort the process.
                pending.result.rows.clear()
                pending.future.set_exception(error)
            else:
                pending.future.set_result(pending.result)
        if not self._pending:
            self._all_answered.set()

    def _expire(self, request_id: int) -> None:
        self._settle(
            request_id, DeadlineExceeded("The request's deadline passed before its answer was ready.")
        )

    def _reject_all(self, error: Callable[[], EngineError]) -> None:
        for request_id in list(self._pending):
            self._settle(request_id, error())


def _anew(row: NDArray[Any] | InferenceFailed) -> NDArray[Any] | InferenceFailed:
    """A failure of its own for each request, since raising an error writes to it."""
    if not isinstance(row, InferenceFailed):
        return row
    failure = InferenceFailed(*row.args)
    failure.__cause__ = row.__cause__
    return failure
