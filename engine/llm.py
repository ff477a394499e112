"""LLM: the engine for scripts and notebooks. Same engine as the server's, same numbers, no HTTP.

from carpool import LLM
(output,) = LLM("path/to/model").embed("Hello, my name is")
output.outputs.embedding
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NoReturn

from tqdm.auto import tqdm

from carpool.engine.answers import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.changes import ResetCaches
from carpool.engine.errors import InvalidParameter, UnsupportedTask
from carpool.engine.llm_absent import ABSENT
from carpool.engine.llm_groups import grouped
from carpool.engine.llm_options import config_of
from carpool.engine.llm_params import (
    adapter_of,
    check_params,
    cut_as_told,
    engines_own,
    one_each,
    template_variables,
    tokenization_of,
)
from carpool.engine.loop_thread import LoopThread
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import LoRARequest, PoolingParams, TokenizationParams
from carpool.engine.prompts import Prompt, ScoreInput, as_list, read_prompt, read_salt, read_texts
from carpool.engine.task_names import TASK_OF_SCORES, tasks_of
from carpool.engine.terms import Terms

Params = PoolingParams | Seq[PoolingParams] | None
Loras = LoRARequest | Seq[LoRARequest] | None  # one for all prompts, or one each
Progress = bool | Callable[..., Any]  # shown or not, or what to show it with instead of tqdm

_DEFAULT = PoolingParams()
_AT_ONCE = 512  # calls whose prompts wait to be run together: enough to fill batches of single prompts


class LLM:
    """Loads a model once and answers lists of prompts; one call at a time a thread, any number of threads."""

    def __init__(self, model: str = "", *, task: str | None = None, **options: Any) -> None:
        """`options` are EngineConfig's fields; options of the reference that mean nothing here are ignored.

        `lora_modules` may be a dict of a path a name. `task` and `override_pooler_config` are older spellings. Raises
        ConfigError for unknown options and for models that cannot be served.
        """
        config = config_of(model, task, options)
        self._loop = LoopThread("carpool-llm")
        engine = AsyncEngine(config)
        try:
            self._loop.run(engine.start())
        except BaseException:  # also Ctrl-C while it loads
            _close(self._loop, engine)
            raise
        self._running: AsyncEngine | None = engine
        self._close = weakref.finalize(self, _close, self._loop, engine)
        self._ids = count()

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector a prompt."""
        tokenization = self._tokenization(truncate_prompt_tokens, tokenization_kwargs)
        answers = self._pool(prompts, pooling_params, "embed", use_tqdm, tokenization, lora_request)
        return list(map(EmbeddingRequestOutput.from_base, answers))

    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each class; logits with `PoolingParams(use_activation=False)`."""
        tokenization = self._tokenization(truncate_prompt_tokens, tokenization_kwargs)
        answers = self._pool(prompts, pooling_params, "classify", use_tqdm, tokenization, lora_request)
        return list(map(ClassificationRequestOutput.from_base, answers))

    def reward(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """One row a token, or a step of a process reward model."""
        tokenization = self._tokenization(truncate_prompt_tokens, tokenization_kwargs)
        return self._pool(prompts, pooling_params, "reward", use_tqdm, tokenization, lora_request)

    def encode(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: Params = None,
        *,
        use_tqdm: Progress = True,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What the model's pooler gives, as tensors. Without `pooling_task`, what the model is for.

        "embed" and "classify" are one row a prompt, "token_embed", "token_classify" (or, of either, "encode") and
        "reward" one a token, "sparse_embed" one a weight. Several, joined by "&", cost one run of the model.
        """
        tokenization = self._tokenization(truncate_prompt_tokens, tokenization_kwargs)
        return self._pool(prompts, pooling_params, pooling_task, use_tqdm, tokenization, lora_request)

    def score(
        self,
        data_1: ScoreInput | Seq[ScoreInput],
        data_2: ScoreInput | Seq[ScoreInput],
        /,
        *,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each first text goes with its second: 1:1, 1:N (one first text for all) or N:N.

        A text may be `{"content": [{"type": "text", "text": …}]}`. `chat_template` renders the pairs for a causal
        model, as --chat-template does.
        """
        model = self._engine.model
        adapter = self._adapter(lora_request)
        if model.score_type is None:
            raise UnsupportedTask(
                "Scoring API is only enabled for num_labels == 1."
                if "classify" in model.tasks
                else "This model does not support the Scoring API."
            )
        queries, documents = read_texts(data_1, "data_1"), read_texts(data_2, "data_2")
        tokenization = self._tokenization(truncate_prompt_tokens, tokenization_kwargs)
        params = pooling_params or _DEFAULT
        check_params(params, ("score", TASK_OF_SCORES[model.score_type]))
        if params.late_chunking_params:
            raise InvalidParameter("Late chunking requires token_embed.", "late_chunking_params")
        tokenization = cut_as_told(tokenization, params)
        variables = template_variables(chat_template_kwargs, params)
        # Queries that are prompts of their own.
        apart = len(queries) if model.score_type in ("bi-encoder", "late-interaction") else 0
        with _bar(use_tqdm, apart + len(documents)) as progress:
            result = self._loop.run(
                self._engine.score(
                    queries,
                    documents,
                    engines_own(params),
                    tokenization,
                    Terms(adapter=adapter, on_progress=progress),
                    template=chat_template,
                    template_kwargs=variables,
                )
            )
        pairs = zip(result.scores, result.pair_token_ids, result.pair_cached, strict=True)
        return [
            ScoringRequestOutput(str(next(self._ids)), ScoringOutput(score), ids, cached)
            for score, ids, cached in pairs
        ]

    @property
    def model_info(self) -> ModelInfo:
        """What the model is and how it is run: what `GET /info` tells of a server."""
        return self._engine.model

    def generate(self, *_: object, **__: object) -> NoReturn:
        """Raises UnsupportedTask: there is no text to be had of a pooling model."""
        raise UnsupportedTask("carpool runs pooling models and generates no text: try LLM.encode.")

    chat = generate

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Use nothing again that was computed before: no prompt's beginning, and no result. Calls under way in other
        threads go on with what they have, whatever is said of them.
        """
        self._loop.run(self._engine.change(ResetCaches()))
        return True

    def get_world_size(self, include_dp: bool = True) -> int:
        """GPUs that one copy of the model is split over, which is 1; with `include_dp`, over all copies."""
        return self._engine.config.data_parallel_size if include_dp else 1

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            raise AttributeError(f"There is no LLM.{name}: {ABSENT[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Any:
        """The model's tokenizer as transformers has it: a copy, which the caller may change. Adapters share it."""
        return self._engine.fast_tokenizer()

    def close(self) -> None:
        """Free the model; nothing can be asked of it after that. Comes by itself when the object goes."""
        self._close()
        self._running = None

    @property
    def _engine(self) -> AsyncEngine:
        if self._running is None:
            raise RuntimeError("This LLM is closed: make another to go on.")
        return self._running

    def _pool(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: Params,
        name: str | None,
        use_tqdm: Progress,
        tokenization: TokenizationParams,
        lora_request: Loras,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        engine = self._engine
        tasks = tasks_of(name, engine.model)
        if tokenization.max_tokens_per_query or tokenization.max_tokens_per_doc:
            raise InvalidParameter(
                "max_tokens_per_query and max_tokens_per_doc are for LLM.score.", "tokenization_kwargs"
            )
        many = as_list(prompts)
        items = [read_prompt(prompt) for prompt in many]
        params = one_each(many, _DEFAULT if pooling_params is None else pooling_params, "pooling_params")
        adapters = self._adapters(one_each(many, lora_request, "lora_request"))
        for own in params:
            check_params(own, (name, "&".join(tasks)))
        terms = [
            Terms(adapter=adapter, cache_salt=read_salt(prompt))
            for prompt, adapter in zip(many, adapters, strict=True)
        ]
        groups = grouped(items, params, terms, tokenization)
        for group in groups:
            group.check(tasks, engine.model)
        ids = [str(next(self._ids)) for _ in items]
        with _bar(use_tqdm, len(items) * len(tasks)) as progress:
            calls = [partial(group.run, engine, tasks, progress) for group in groups]
            results = self._loop.run_all(calls, _AT_ONCE)
        found: dict[int, PoolingRequestOutput[PoolingOutput]] = {}
        for group, result in zip(groups, results, strict=True):
            found |= group.answers(engine, tasks, result, ids)
        return [found[i] for i in range(len(items))]

    def _tokenization(self, truncate: int | None, kwargs: Mapping[str, Any] | None) -> TokenizationParams:
        return tokenization_of(truncate, kwargs, self._engine.model.max_model_len)

    def _adapters(self, requests: Seq[LoRARequest | None]) -> list[str | None]:
        """The name of the adapter that each is for, looked up once where one is given for many prompts."""
        names = {key: self._adapter(own) for key, own in {id(own): own for own in requests}.items()}
        return [names[id(own)] for own in requests]

    def _adapter(self, request: LoRARequest | None) -> str | None:
        """The name of the adapter that a request is for; it is loaded if need be, and may."""
        if request is None:
            return None
        model, config = self._engine.model, self._engine.config
        name, load = adapter_of(request, model, may_load=config.allow_runtime_lora_updating)
        if load is not None:
            self._loop.run(self._engine.change(load))
        return name


def _close(loop: LoopThread, engine: AsyncEngine) -> None:
    loop.close(engine.stop(timeout=0.0))


@contextmanager
def _bar(use_tqdm: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, which appears only when there is time to see it; told of how many more are done."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    with make(total=total, desc="Processed prompts", disable=not use_tqdm, delay=0.5) as bar:
        yield lambda done: bar.update(done)
