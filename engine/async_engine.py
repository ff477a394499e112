"""AsyncEngine: the one object the server holds. Prompts in, vectors out, on one event loop.

    prompts → tokenizer → Sequences → Scheduler → Batch → a worker thread → rows → the request's future

Futures live here, one a request, and are resolved or rejected in one place (`_settle`), also when a worker dies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from carpool.engine.admission import Admission
from carpool.engine.config import EngineConfig
from carpool.engine.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    EmptyInput,
    EngineDead,
    EngineError,
    InferenceFailed,
    InvalidInput,
    InvalidParameter,
    NotReady,
    Undone,
    UnsupportedTask,
)
from carpool.engine.fleet import Fleet
from carpool.engine.listwise import ListPlan
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult, ScoreResult, Timings
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.engine.preparation import INLINE_CHARS, Built, is_long, prepared, slot, told
from carpool.engine.preparation import Prompts as Prompts
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.results import Results
from carpool.engine.scheduler import Scheduler
from carpool.engine.scoring import Plan, pair_prompts, plan
from carpool.engine.slicing import merge_rows, slice_ids
from carpool.engine.stats import CacheStats, Observer, ResultStats, Unobserved

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray

    from carpool.engine.batch import Batch
    from carpool.engine.chat import Message
    from carpool.engine.sequence import Sequence
    from carpool.engine.worker import Row

State = Literal["starting", "ready", "draining", "dead", "stopped"]
T = TypeVar("T")

_WARM_UP_TOKENS = 512  # a worker


@dataclass(slots=True, eq=False)
class _Pending:
    """One request that has been accepted and not yet answered."""

    future: asyncio.Future[PoolingResult]
    result: PoolingResult
    remaining: int
    tokens: int  # that had to be run for it
    arrival: float
    timer: asyncio.TimerHandle | None = None
    on_progress: Callable[[int], object] | None = None


def _build(config: EngineConfig) -> Built:
    from carpool.engine.build import build  # here, since it imports torch and transformers

    return build(config)


class AsyncEngine:
    """Continuous batching over worker threads. All methods are called on the event loop that started it."""

    def __init__(
        self,
        config: EngineConfig,
        observer: Observer | None = None,
        build: Callable[[EngineConfig], Built] = _build,
    ) -> None:
        self.config = config
        self.observer: Observer = observer or Unobserved()
        self.state: State = "starting"
        self._build = build
        self._parts: Built | None = None
        self._scheduler: Scheduler | None = None
        self._admission = Admission(config.max_queued_tokens, 1, 1)
        self._fleet: Fleet | None = None
        self._results = Results(config.cache_size)
        self._pending: dict[int, _Pending] = {}
        self._next_request_id = 0
        self._dead = asyncio.Event()
        self._all_answered = asyncio.Event()
        self._all_answered.set()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Load, check and warm up; raises ConfigError if the model cannot be served."""
        loop = asyncio.get_running_loop()
        parts = await loop.run_in_executor(None, self._build, self.config)
        if self.state != "starting":  # told to stop meanwhile
            return
        self._parts = parts
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
            self.config.max_queued_tokens,
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
        """Run every worker once for its one-off costs and once to learn the throughput."""
        length = min(parts.model.max_model_len, parts.model.max_num_batched_tokens, 128)
        count = max(1, _WARM_UP_TOKENS // length) * workers
        prompts = [[i % parts.model.vocab_size] * length for i in range(count)]
        for _ in range(2):
            if self.state != "starting":
                return
            start = time.perf_counter()
            request = Request(PoolingParams(), (parts.model.default_task,))
            await self._run(request, Prepared(prompts), [None] * count, None, None)
            self._admission.tokens_per_second = count * length / (time.perf_counter() - start)

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
            give_up = time.monotonic() + 1.0  # a batch under way nobody waits for may be left behind
            while self._fleet.is_alive() and time.monotonic() < give_up:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            self._fleet.forget()
        if self.state != "dead":
            self.state = "stopped"
        return finished

    async def died(self) -> None:
        """Returns when the engine is dead: a worker is lost or hangs, and the process should exit."""
        await self._dead.wait()

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model(self) -> ModelInfo:
        """Raises NotReady while loading."""
        return self._loaded().model

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
        cache = self._parts.cache if self._parts else None
        if cache is None:
            return None
        pool = cache.paging.pool
        return CacheStats(pool.queried_tokens, pool.hit_tokens, pool.num_blocks, pool.num_used)

    @property
    def result_stats(self) -> ResultStats | None:
        """None where no results are kept."""
        return self._results.stats

    def _loaded(self) -> Built:
        if self._parts is None:
            raise NotReady("The model is still loading.", retry_after=5)
        return self._parts

    async def tokenize(self, texts: list[str], params: TokenizationParams) -> list[list[int]]:
        """Ids of each text, whatever their number."""
        encode = partial(self._loaded().tokenizer.encode, texts, params.add_special_tokens)
        return await self._off_loop(encode, sum(map(len, texts)) > INLINE_CHARS)

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's entry for each id."""
        return self._loaded().tokenizer.tokens(token_ids)

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of the ids, special tokens kept, unknown ids skipped."""
        return await self._off_loop(
            partial(self._loaded().tokenizer.decode, token_ids), len(token_ids) > INLINE_CHARS
        )

    # ── the road of a request ────────────────────────────────────────────────────────────────────────────

    async def pool(
        self,
        prompts: Prompts,
        params: PoolingParams,
        tokenization: TokenizationParams,
        *,
        task: Task | tuple[Task, ...] = "embed",
        adapter: str | None = None,
        client: str = "",
        priority: int = 0,
        timeout: float | None = None,
        on_progress: Callable[[int], object] | None = None,
        cache_salt: str | None = None,
    ) -> PoolingResult:
        """Run the model on every prompt; answers come in the prompts' order, all or none.

        Of several tasks each prompt is run once and has a row a task: see `PoolingResult`. `adapter` is the name of the
        one to ride on; None is the model's default. `client` is whose share of the engine it is charged to; lower
        `priority` runs first; after `timeout` seconds DeadlineExceeded is raised. `on_progress(n)` is told of n more
        rows done. What was computed of prompts under one `cache_salt` is not used for those under another. Rows may be
        shared with other requests and are not to be written to. Raises the errors of `engine.errors`. Cancelling the
        awaiting task drops what still waits.
        """
        start = time.monotonic()
        self._admit_state()
        if not self.config.cache_size:  # else its answer may be at hand
            self._admission.check(1, self.waiting_tokens)  # spares the tokenizer what is refused anyway
        parts = self._loaded()
        tasks = task if isinstance(task, tuple) else (task,)
        self._check(prompts, params, tasks)
        request = Request(params, tasks, slot(parts.model, adapter), cache_salt, client, priority)
        longest = parts.model.max_embed_len if tasks == ("embed",) else -1
        prepare = partial(prepared, parts, request, prompts, tokenization, longest)
        ready = await self._off_loop(prepare, is_long(prompts))
        whole = ready.token_ids
        sliced = longest != -1 and any(len(ids) > parts.model.max_model_len for ids in whole)
        if sliced:
            slices, counts = slice_ids(whole, parts.model.max_model_len)
            if ready.skip:
                raise InvalidInput(
                    "This model leaves prompts out of its pooling, so a text with a prompt cannot be sliced.",
                    "input",
                )
            request = replace(request, params=replace(params, embed_dtype="float32"))  # slices are averaged
            ready = told(parts, request, Prepared(slices))
        spent = time.monotonic() - start
        if timeout is not None and spent >= timeout:
            raise DeadlineExceeded("The request's deadline passed before it could run.")
        self._admit_state()
        found = self._results.find(ready.keys)
        tokens = sum(len(ready.token_ids[i // len(tasks)]) for i, row in enumerate(found) if row is None)
        self._admission.check(tokens, self.waiting_tokens)
        left = None if timeout is None else timeout - spent
        result = await self._run(request, ready, found, left, on_progress)
        result.timings.tokenize = spent
        if sliced:
            lengths = list(map(len, ready.token_ids))
            result.rows = merge_rows(result.rows, lengths, counts)
            result.prompt_token_ids = whole
            of_slices = iter(result.cached)
            result.cached = [sum(islice(of_slices, count)) for count in counts]
        return result

    async def score(
        self,
        queries: list[str],
        documents: list[str],
        params: PoolingParams,
        tokenization: TokenizationParams,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        client: str = "",
        priority: int = 0,
        timeout: float | None = None,
        on_progress: Callable[[int], object] | None = None,
        cache_salt: str | None = None,
    ) -> ScoreResult:
        """A score for each query with its document, 1:1, 1:N or N:N, in the way the model is made for.

        `template` renders the pairs in place of the model's prompt; `template_kwargs` are for either. Raises as `pool`
        does; what is wrong with one text has `queries[i]` or `documents[i]` as its `param`.
        """
        start = time.monotonic()
        self._admit_state()
        parts = self._loaded()
        shape = partial(self._plan, parts, queries, documents, tokenization, template, template_kwargs)
        planned = await self._off_loop(shape, is_long(queries) or is_long(documents))
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
        try:
            result = await self.pool(
                planned.prompts,
                replace(params, embed_dtype="float32"),  # scores are computed on the host
                replace(tokenization, add_special_tokens=True),
                task=planned.task,
                adapter=adapter,
                client=client,
                priority=priority,
                timeout=left,
                on_progress=on_progress,
                cache_salt=cache_salt,
            )
        except InvalidInput as error:
            raise planned.blame(error) from None
        if on_progress and (spared := len(planned.asked) - len(planned.prompts)):
            on_progress(spared)
        measure = partial(planned.scores, result.rows, result.prompt_token_ids)
        scores = await self._off_loop(measure, planned.task == "token_embed")
        ids, cached = planned.by_pair(result.prompt_token_ids), planned.by_pair(result.cached)
        tokens = planned.prompt_tokens(result.prompt_token_ids)
        return ScoreResult(scores, tokens, result.timings, ids, cached, result.cached_tokens)

    def _plan(
        self,
        parts: Built,
        queries: list[str],
        documents: list[str],
        tokenization: TokenizationParams,
        template: str | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> Plan | ListPlan:
        longest = parts.model.max_model_len
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            limit = getattr(tokenization, name)
            if limit < 0:
                raise InvalidParameter(f"{name} must be a non-negative integer", name)
            if limit >= longest:
                raise InvalidParameter(f"{name} ({limit}) must be less than max_model_len ({longest}).", name)
        if tokenization.max_tokens_per_query:
            queries = parts.tokenizer.shorten(queries, tokenization.max_tokens_per_query)
        if tokenization.max_tokens_per_doc:
            documents = parts.tokenizer.shorten(documents, tokenization.max_tokens_per_doc)
        framer = parts.chat.replaced(template).for_pairs() if template else parts.framer
        limit = tokenization.truncate_prompt_tokens
        return plan(parts.model, queries, documents, framer, template_kwargs, limit)

    async def pair_prompts(self, pairs: list[tuple[str, str]]) -> Prompts:
        """Pairs of texts as the prompts that the model wants them in, to be given to `pool`."""
        parts = self._loaded()
        return await self._off_loop(partial(pair_prompts, parts.model, pairs, parts.framer), is_long(pairs))

    def render(
        self,
        messages: Seq[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the text that the model's chat template makes of it. May be called from any thread."""
        return self._loaded().chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )

    def _check(self, prompts: Prompts, params: PoolingParams, tasks: tuple[Task, ...]) -> None:
        model = self._loaded().model
        for task in tasks:
            if task not in model.tasks:
                raise UnsupportedTask(f"The model does not support the task {task}.", "task")
        if not prompts:
            raise EmptyInput("You must pass at least one prompt", "input")
        if not self.config.token_id_input and isinstance(prompts[0], list):
            raise InvalidInput("This server takes text, not token ids (--no-token-id-input).", "input")
        if {"embed", "token_embed"} & model.tasks:
            model.matryoshka.check(params.dimensions, self.config.model or model.root)

    def _admit_state(self) -> None:
        if self.state == "starting":
            raise NotReady("The model is still loading.", retry_after=5)
        if self.state == "dead":
            raise EngineDead("The engine has failed and is about to restart.", retry_after=10)
        if self.state != "ready":
            raise Draining("The server is shutting down.", retry_after=10)

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
        pending = _Pending(loop.create_future(), result, missing, tokens, now, on_progress=on_progress)
        self._admission.enter(tokens)
        deadline = None
        if timeout is not None:
            deadline = now + timeout
            pending.timer = loop.call_later(timeout, self._expire, number)
        self._pending[number] = pending
        self._all_answered.clear()
        for seq in request.sequences(number, ready, now, deadline):
            if found[seq.index] is None:
                self._scheduler.add(seq)
        self._fleet.dispatch_soon()
        try:
            return await pending.future
        finally:
            if number in self._pending:  # the caller was cancelled
                self._settle(number, None)

    # ── what the fleet says ──────────────────────────────────────────────────────────────────────────────

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
        if pending.on_progress:
            pending.on_progress(1)
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

    def _settle(self, request_id: int, error: EngineError | None) -> None:
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

    async def _off_loop(self, call: Callable[[], T], long: bool) -> T:
        """Run on the loop what is quick, in a thread what is not."""
        return await asyncio.get_running_loop().run_in_executor(None, call) if long else call()


def _anew(row: NDArray[Any] | InferenceFailed) -> NDArray[Any] | InferenceFailed:
    """A failure of its own for each request, since raising an error writes to it."""
    if not isinstance(row, InferenceFailed):
        return row
    failure = InferenceFailed(*row.args)
    failure.__cause__ = row.__cause__
    return failure
