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
from itertools import islice, product
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from carpool.engine.config import EngineConfig
from carpool.engine.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    EmptyInput,
    EngineDead,
    EngineError,
    InferenceFailed,
    InputTooLong,
    InvalidInput,
    InvalidParameter,
    NotReady,
    Overloaded,
    Undone,
    UnsupportedTask,
)
from carpool.engine.fleet import Fleet
from carpool.engine.framed import Framed
from carpool.engine.late_interaction import RoleText
from carpool.engine.listwise import ListPlan
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult, ScoreResult, Timings
from carpool.engine.params import PoolingParams, Task, TokenizationParams
from carpool.engine.prepared import Prepared
from carpool.engine.scheduler import Scheduler
from carpool.engine.scoring import Framer, Plan, pair_prompts, plan
from carpool.engine.sequence import Sequence
from carpool.engine.slicing import merge_rows, slice_ids
from carpool.engine.stats import CacheStats, Observer, Unobserved

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from carpool.engine.batch import Batch
    from carpool.engine.cache.cache import Cache
    from carpool.engine.chat import ChatTemplate, Message
    from carpool.engine.tokenizer import Tokenizer
    from carpool.engine.worker import Row, Runner

State = Literal["starting", "ready", "draining", "dead", "stopped"]
T = TypeVar("T")
Prompts = list[str] | list[list[int]] | list[tuple[str, str]] | list[Framed] | list[RoleText]

_INLINE_CHARS = 4_000  # tokenised on the loop: under half a millisecond, less than a trip to a thread
_INLINE_IDS = 20_000
_WARM_UP_TOKENS = 512  # a worker
_QUEUE_SECONDS = 60.0  # of measured throughput may wait, by default


class Built(Protocol):
    """The parts an engine is made of: see `engine/build.py`."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def chat(self) -> ChatTemplate: ...

    @property
    def framer(self) -> Framer | None: ...

    @property
    def cache(self) -> Cache | None: ...

    @property
    def runners(self) -> Seq[Runner]: ...


@dataclass(slots=True, eq=False)
class _Pending:
    """One request that has been accepted and not yet answered."""

    future: asyncio.Future[PoolingResult]
    result: PoolingResult
    remaining: int
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
        self.tokens_per_second = 0.0  # measured at warm-up, all workers together
        self.max_queued_tokens = config.max_queued_tokens or 0  # resolved at warm-up
        self._build = build
        self._parts: Built | None = None
        self._scheduler: Scheduler | None = None
        self._fleet: Fleet | None = None
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
        self._scheduler = Scheduler(info.max_num_batched_tokens, info.max_num_seqs, paging=paging)
        self._fleet = Fleet(self._scheduler, parts.runners, self)
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
            warm = Prepared(prompts)
            await self._run(warm, PoolingParams(), (parts.model.default_task,), "", 0, None, None)
            self.tokens_per_second = count * length / (time.perf_counter() - start)
        if not self.max_queued_tokens:
            self.max_queued_tokens = int(_QUEUE_SECONDS * self.tokens_per_second)

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

    def _loaded(self) -> Built:
        if self._parts is None:
            raise NotReady("The model is still loading.", retry_after=5)
        return self._parts

    async def tokenize(self, texts: list[str], params: TokenizationParams) -> list[list[int]]:
        """Ids of each text, whatever their number."""
        encode = partial(self._loaded().tokenizer.encode, texts, params.add_special_tokens)
        return await self._off_loop(encode, sum(map(len, texts)) > _INLINE_CHARS)

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's entry for each id."""
        return self._loaded().tokenizer.tokens(token_ids)

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of the ids, special tokens kept, unknown ids skipped."""
        return await self._off_loop(
            partial(self._loaded().tokenizer.decode, token_ids), len(token_ids) > _INLINE_CHARS
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
        rows done. What was computed of prompts under one `cache_salt` is not used for those under another. Raises the
        errors of `engine.errors`. Cancelling the awaiting task drops what still waits.
        """
        start = time.monotonic()
        self._admit_state()
        parts = self._loaded()
        tasks = task if isinstance(task, tuple) else (task,)
        self._check(prompts, params, tasks)
        slot = _slot(parts.model, adapter)
        longest = parts.model.max_embed_len if tasks == ("embed",) else -1
        prepare = partial(_prepared, parts, prompts, tokenization, longest, tasks, slot, cache_salt)
        prepared = await self._off_loop(prepare, _is_long(prompts))
        whole = prepared.token_ids
        sliced = longest != -1 and any(len(ids) > parts.model.max_model_len for ids in whole)
        if sliced:
            slices, counts = slice_ids(whole, parts.model.max_model_len)
            if prepared.skip:
                raise InvalidInput(
                    "This model leaves prompts out of its pooling, so a text with a prompt cannot be sliced.",
                    "input",
                )
            prepared = _known(parts, Prepared(slices), tasks, slot, cache_salt)
            params = replace(params, embed_dtype="float32")  # slices are averaged
        spent = time.monotonic() - start
        if timeout is not None and spent >= timeout:
            raise DeadlineExceeded("The request's deadline passed before it could run.")
        self._admit_tokens(prepared.num_tokens * len(tasks))
        left = None if timeout is None else timeout - spent
        result = await self._run(prepared, params, tasks, client, priority, left, on_progress, slot)
        result.timings.tokenize = spent
        if sliced:
            lengths = list(map(len, prepared.token_ids))
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
        planned = await self._off_loop(shape, _is_long(queries) or _is_long(documents))
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
        return await self._off_loop(partial(pair_prompts, parts.model, pairs, parts.framer), _is_long(pairs))

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

    def _admit_tokens(self, tokens: int) -> None:
        """Refuse what would wait too long. An empty queue takes anything: no size of request is refused for good."""
        self._admit_state()
        waiting = self.waiting_tokens
        if waiting and waiting + tokens > self.max_queued_tokens:
            wait = waiting / max(self.tokens_per_second, 1.0)
            raise Overloaded(
                f"The queue is full: {waiting} tokens wait and at most {self.max_queued_tokens} may.",
                retry_after=max(1.0, wait / 2),
            )

    async def _run(
        self,
        prepared: Prepared,
        params: PoolingParams,
        tasks: tuple[Task, ...],
        client: str,
        priority: int,
        timeout: float | None,
        on_progress: Callable[[int], object] | None,
        adapter: int = 0,
    ) -> PoolingResult:
        assert self._scheduler is not None
        assert self._fleet is not None
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        token_ids = prepared.token_ids
        nowhere: list[int | None] = [None] * len(token_ids)
        starts, unseen = prepared.type_starts or nowhere, prepared.unseen or nowhere
        request_id = self._next_request_id
        self._next_request_id += 1
        empty: list[Row | None] = [None] * (len(token_ids) * len(tasks))
        pending = _Pending(
            future=loop.create_future(),
            result=PoolingResult(empty, token_ids, Timings(), list(map(len, token_ids))),  # type: ignore[arg-type]
            remaining=len(empty),
            arrival=now,
            on_progress=on_progress,
        )
        deadline = None
        if timeout is not None:
            deadline = now + timeout
            pending.timer = loop.call_later(timeout, self._expire, request_id)
        self._pending[request_id] = pending
        self._all_answered.clear()
        known = prepared.prompts or [None] * len(token_ids)
        prompts = product(zip(token_ids, starts, unseen, known, strict=True), tasks)
        for index, ((ids, start, end, prompt), task) in enumerate(prompts):
            self._scheduler.add(
                Sequence(
                    request_id,
                    index,
                    ids,
                    params,
                    task,
                    now,
                    deadline,
                    priority,
                    client,
                    type_start=start,
                    adapter=adapter,
                    unseen=end,
                    skip=prepared.skip,
                    prompt=prompt,
                )
            )
        self._fleet.dispatch_soon()
        try:
            return await pending.future
        finally:
            if request_id in self._pending:  # the caller was cancelled
                self._settle(request_id, None)

    # ── what the fleet says ──────────────────────────────────────────────────────────────────────────────

    def is_waited_for(self, seq: Sequence) -> bool:
        return seq.request_id in self._pending

    def landed(self, batch: Batch, rows: list[Row], seconds: float, began: float) -> None:
        """Hand out what came back; what is None or undone is run on by itself."""
        if self.state != "starting":  # the warm-up is nobody's traffic
            self.observer.batch_done(batch.num_tokens, len(batch.sequences), seconds)
        for seq, row in zip(batch.sequences, rows, strict=True):
            pending = self._pending.get(seq.request_id)
            if pending is None:  # its client left, or another of its sequences failed
                continue
            pending.result.timings.forward = max(pending.result.timings.forward, seconds)
            if row is None or isinstance(row, Undone):
                continue
            if isinstance(row, InferenceFailed):
                self._settle(seq.request_id, row)
                continue
            pending.result.rows[seq.index] = row
            cached = pending.result.cached
            prompt = seq.index * len(cached) // len(pending.result.rows)  # each has a row a task
            cached[prompt] = min(cached[prompt], seq.cached)
            pending.result.timings.queue = max(0.0, began - pending.arrival)
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
        if pending.timer is not None:
            pending.timer.cancel()
        if pending.remaining and self._scheduler is not None:
            dropped = self._scheduler.abort(request_id)
            if dropped:
                self.observer.sequences_cancelled(dropped)
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


def _prepared(
    parts: Built,
    prompts: Prompts,
    tokenization: TokenizationParams,
    longest: int | None,
    tasks: tuple[Task, ...],
    adapter: int,
    salt: str | None,
) -> Prepared:
    """The prompts as ids, and what the cache is told of them."""
    return _known(parts, parts.tokenizer.prepare(prompts, tokenization, longest), tasks, adapter, salt)


def _known(
    parts: Built, prepared: Prepared, tasks: tuple[Task, ...], adapter: int, salt: str | None
) -> Prepared:
    """Raises InputTooLong for a prompt that no batch takes whole and the cache cannot hold."""
    cache, most = parts.cache, parts.model.max_num_batched_tokens
    for i, ids in enumerate(prepared.token_ids):
        if len(ids) > most and not (cache and cache.paging.holds(len(ids))):
            held = f", and the cache of keys and values holds {cache.num_tokens}" if cache else ""
            where = f"input[{i}]" if len(prepared.token_ids) > 1 else "input"
            raise InputTooLong(
                f"This prompt has {len(ids)} tokens. A batch of this server takes {most}{held}.", where
            )
    if cache is None or prepared.unseen:
        return prepared
    return replace(prepared, prompts=cache.prompts(prepared.token_ids, tasks, adapter, salt))


def _slot(model: ModelInfo, adapter: str | None) -> int:
    """The adapter's number, as sequences have it; 0 is the model as it stands."""
    name = model.default_adapter if adapter is None else adapter
    if name is None:
        return 0
    if name not in model.adapters:
        loaded = f"loaded are {', '.join(model.adapters)}" if model.adapters else "none were loaded at start"
        raise InvalidParameter(f"There is no adapter {name!r}: {loaded}.", "adapter")
    return model.adapters.index(name) + 1


def _is_long(prompts: Prompts) -> bool:
    if not prompts:
        return False
    if isinstance(prompts[0], Framed):
        return sum(len(part) for prompt in prompts for part in prompt.parts) > _INLINE_CHARS
    if isinstance(prompts[0], tuple):
        return sum(len(side) for pair in prompts for side in pair) > _INLINE_CHARS
    return sum(map(len, prompts)) > (_INLINE_CHARS if isinstance(prompts[0], str) else _INLINE_IDS)
