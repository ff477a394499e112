"""AsyncEngine: the one object the server holds. Prompts in, vectors out, on one event loop.

prompts → tokenizer → Prepared → the core: this process's own, or another's over a socket → rows → answers
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from carpool.engine.admission import admit
from carpool.engine.changes import Change
from carpool.engine.config import EngineConfig
from carpool.engine.core import Core
from carpool.engine.errors import (
    DeadlineExceeded,
    EmptyInput,
    InvalidInput,
    InvalidParameter,
    NotReady,
    UnknownAdapter,
    UnsupportedTask,
)
from carpool.engine.late_interaction import in_role
from carpool.engine.listwise import ListPlan
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import Piece, PoolingResult, ScoreResult
from carpool.engine.params import PoolingParams, Task, TokenizationParams, check_dimensions
from carpool.engine.preparation import INLINE_CHARS, Built, is_long, needs_slicing, prepared, slot, told
from carpool.engine.preparation import Prompts as Prompts
from carpool.engine.prepared import Prepared
from carpool.engine.request import Request
from carpool.engine.scoring import Plan, check_texts, pair_prompts, plan, taking_part
from carpool.engine.slicing import Slices
from carpool.engine.stats import CacheStats, Observer, ResultStats, State
from carpool.engine.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from carpool.engine.chat import Message
    from carpool.engine.preparation import Known
    from carpool.engine.remote import RemoteCore

_INLINE_SCORES = 500  # of two vectors each: some milliseconds
_NO_TERMS = Terms()

T = TypeVar("T")


class AsyncEngine:
    """What prompts go in by, and answers come out. All methods are called on the event loop that started it."""

    def __init__(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], Built] | None = None,
        core: Core | RemoteCore | None = None,
    ) -> None:
        """`core` runs what is made ready here; None is one of this process, over what `build` loads."""
        self.config = config
        self.core = core or (Core(config, build) if build else Core(config))

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Load, check and warm up; raises ConfigError if the model cannot be served."""
        await self.core.start()

    def drain(self) -> None:
        """Let `state` say that no more are to be let in. What comes all the same is run until `stop`."""
        self.core.drain()

    async def stop(self, timeout: float) -> bool:
        """Drain, wait up to `timeout` s for accepted work, then end the workers. True if all of it was answered."""
        return await self.core.stop(timeout)

    async def died(self) -> None:
        """Returns when the engine is dead: a worker is lost or hangs, and the process should exit."""
        await self.core.died()

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model(self) -> ModelInfo:
        """Raises NotReady while loading."""
        return self._loaded().model

    @property
    def state(self) -> State:
        return self.core.state

    @property
    def observer(self) -> Observer:
        """Who is told of batches and of what was dropped."""
        return self.core.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self.core.observer = observer

    @property
    def waiting_tokens(self) -> int:
        return self.core.waiting_tokens

    @property
    def waiting_sequences(self) -> int:
        return self.core.waiting_sequences

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, measured at warm-up and whenever they were busy."""
        return self.core.tokens_per_second

    @property
    def cache_stats(self) -> CacheStats | None:
        """None where no keys and values are kept."""
        return self.core.cache_stats

    @property
    def result_stats(self) -> ResultStats | None:
        """None where no results are kept."""
        return self.core.result_stats

    def _loaded(self) -> Known:
        if self.core.parts is None:
            raise NotReady("The model is still loading.", retry_after=5)
        return self.core.parts

    async def tokenize(self, texts: list[str], params: TokenizationParams) -> list[list[int]]:
        """Ids of each text, whatever their number."""
        encode = partial(self._loaded().tokenizer.encode, texts, params.add_special_tokens)
        return await self._off_loop(encode, is_long(texts))

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's entry for each id."""
        return self._loaded().tokenizer.tokens(token_ids)

    def offsets(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Its ids, and the characters that each stands for; blocks as long as the tokenizer takes."""
        return self._loaded().tokenizer.offsets(text, add_special_tokens)

    def fast_tokenizer(self) -> Any:
        """The model's tokenizer as transformers has it: a copy, for callers who want more of it than ids."""
        return deepcopy(self._loaded().chat.tokenizer)

    async def pieces(self, texts: list[str], add_special_tokens: bool) -> list[list[Piece]]:
        """Each text's tokens, and where in it each stands."""
        find = partial(self._loaded().tokenizer.pieces, texts, add_special_tokens)
        return await self._off_loop(find, is_long(texts))

    async def detokenize(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids, unknown ones skipped."""
        decode = partial(self._loaded().tokenizer.decode, token_ids, skip_special_tokens)
        return await self._off_loop(decode, len(token_ids) > INLINE_CHARS)

    async def change(self, change: Change) -> None:
        """Have adapters come and go, or caches emptied. Whoever asks after that finds it done. Raises InvalidInput for
        what cannot be; what was asked before is answered as it was asked.
        """
        await self.core.change(change)

    # ── the road of a request ────────────────────────────────────────────────────────────────────────────

    async def pool(
        self,
        prompts: Prompts,
        params: PoolingParams,
        tokenization: TokenizationParams,
        terms: Terms = _NO_TERMS,
        *,
        task: Task | tuple[Task, ...] = "embed",
    ) -> PoolingResult:
        """Run the model on every prompt; answers come in the prompts' order, all or none.

        Of several tasks each prompt is run once and has a row a task: see `PoolingResult`. Rows may be shared with
        other requests and are not to be written to. Raises the errors of `engine.errors`. Cancelling the awaiting task
        drops what still waits.
        """
        start = time.monotonic()
        admit(self.state)
        if not self.config.cache_size:  # else its answer may be at hand
            self.core.check()  # spares the tokenizer what is refused anyway
        parts = self._loaded()
        model = parts.model
        tasks = task if isinstance(task, tuple) else (task,)
        self._check(model, prompts, params, tasks)
        in_roles = in_role(prompts, tokenization.input_type, model.roles)
        texts = prompts if in_roles is None else in_roles
        number = slot(model, terms.adapter)
        request = Request(params, tasks, number, terms.cache_salt, terms.client, terms.priority)
        longest = model.max_embed_len if tasks == ("embed",) else -1
        prepare = partial(prepared, parts, request, texts, tokenization, longest)
        ready = await self._off_loop(prepare, is_long(texts))
        slices = None
        if needs_slicing(parts, ready):
            slices = Slices.of(ready, model.max_model_len)
            request = replace(request, params=replace(params, embed_dtype="float32"))  # slices are averaged
            ready = told(parts, request, Prepared(slices.token_ids))
        now = time.monotonic()
        # Seconds from here on: the engine may be another process.
        left = None if terms.deadline is None else terms.deadline - now
        if left is not None and left <= 0:
            raise DeadlineExceeded("The request's deadline passed before it could run.")
        try:
            result = await self.core.run(request, ready, left, terms.on_progress)
        except UnknownAdapter:
            if terms.adapter is None or self.model.adapters.get(terms.adapter) in (None, number):
                raise
            # Another has been loaded in its place meanwhile.
            return await self.pool(prompts, params, tokenization, terms, task=task)
        result.timings.tokenize = now - start
        if slices is not None:
            slices.merge(result)
        if in_roles is not None:
            chosen = partial(taking_part, result.rows, result.prompt_token_ids, in_roles, model.roles)
            result.rows = await self._off_loop(chosen, is_long(in_roles))
        return result

    async def score(
        self,
        queries: list[str],
        documents: list[str],
        params: PoolingParams,
        tokenization: TokenizationParams,
        terms: Terms = _NO_TERMS,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ScoreResult:
        """A score for each query with its document, 1:1, 1:N or N:N, in the way the model is made for.

        `template` renders the pairs in place of the model's prompt; `template_kwargs` are for either. Raises as `pool`
        does; what is wrong with one text has `queries[i]` or `documents[i]` as its `param`.
        """
        admit(self.state)
        parts = self._loaded()
        shape = partial(self._plan, parts, queries, documents, tokenization, template, template_kwargs)
        planned = await self._off_loop(shape, is_long(queries) or is_long(documents))
        params = replace(params, embed_dtype="float32")  # scores are computed on the host
        tokenization = replace(tokenization, add_special_tokens=True, input_type=None)
        try:
            result = await self.pool(planned.prompts, params, tokenization, terms, task=planned.task)
        except InvalidInput as error:
            raise planned.blame(error) from None
        if terms.on_progress and (spared := len(planned.asked) - len(planned.prompts)):
            terms.on_progress(spared)
        measure = partial(planned.scores, result.rows, result.prompt_token_ids)
        many = planned.task == "token_embed" or len(documents) > _INLINE_SCORES
        scores = await self._off_loop(measure, many)
        ids, cached = planned.by_pair(result.prompt_token_ids), planned.by_pair(result.cached)
        tokens = planned.prompt_tokens(result.prompt_token_ids)
        return ScoreResult(scores, tokens, result.timings, ids, cached, result.cached_tokens)

    def _plan(
        self,
        parts: Known,
        queries: list[str],
        documents: list[str],
        tokenization: TokenizationParams,
        template: str | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> Plan | ListPlan:
        check_texts(queries, documents)
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
        framer = parts.chat.pairs_by(template) if template else parts.framer
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
        tools: Seq[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the text that the model's chat template makes of it. May be called from any thread."""
        return self._loaded().chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
        )

    def _check(
        self, model: ModelInfo, prompts: Prompts, params: PoolingParams, tasks: tuple[Task, ...]
    ) -> None:
        for task in tasks:
            if task not in model.tasks:
                raise UnsupportedTask(f"The model does not support the task {task}.", "task")
        if not prompts:
            raise EmptyInput("You must pass at least one prompt", "input")
        if not self.config.token_id_input and isinstance(prompts[0], list):
            raise InvalidInput("This server takes text, not token ids (--no-token-id-input).", "input")
        check_dimensions(params.dimensions, tasks, model.matryoshka, self.config.model or model.root)

    async def _off_loop(self, call: Callable[[], T], long: bool) -> T:
        """Run on the loop what is quick, in a thread what is not."""
        return await asyncio.get_running_loop().run_in_executor(None, call) if long else call()
