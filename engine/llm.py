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
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from tqdm.auto import tqdm

from carpool.engine.answers import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    answers_of,
)
from carpool.engine.async_engine import AsyncEngine
from carpool.engine.changes import LoadAdapter, ResetCaches
from carpool.engine.errors import InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.late_chunking import LateChunkingMetadata, chunk_means
from carpool.engine.llm_absent import ABSENT
from carpool.engine.llm_options import config_of
from carpool.engine.llm_params import (
    check_late_chunking,
    check_params,
    cut_as_told,
    engines_own,
    tokenization_of,
)
from carpool.engine.loop_thread import LoopThread
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import LoRARequest, PoolingParams, TokenizationParams
from carpool.engine.prompts import Prompt, ScoreInput, as_list, read_prompt, read_salt, read_texts
from carpool.engine.task_names import TASK_OF_SCORES, tasks_of

Params = PoolingParams | Seq[PoolingParams] | None
Loras = LoRARequest | Seq[LoRARequest] | None  # one for all prompts, or one each
Progress = bool | Callable[..., Any]  # shown or not, or what to show it with instead of tqdm
O = TypeVar("O")  # noqa: E741

_DEFAULT = PoolingParams()
_AT_ONCE = 512  # calls whose prompts wait to be run together: enough to fill batches of single prompts


class _Group(NamedTuple):
    """What prompts that go in one call have in common."""

    texts: bool  # or token ids
    params: PoolingParams
    adapter: str | None
    salt: str | None


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
        tokenization = tokenization_of(
            truncate_prompt_tokens, tokenization_kwargs, self._engine.model.max_model_len
        )
        answers = self._pool(prompts, pooling_params, "embed", use_tqdm, tokenization, lora_request)
        return [
            EmbeddingRequestOutput(
                answer.request_id,
                EmbeddingOutput(answer.outputs.data.tolist()),
                answer.prompt_token_ids,
                answer.num_cached_tokens,
            )
            for answer in answers
        ]

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
        tokenization = tokenization_of(
            truncate_prompt_tokens, tokenization_kwargs, self._engine.model.max_model_len
        )
        answers = self._pool(prompts, pooling_params, "classify", use_tqdm, tokenization, lora_request)
        return [
            ClassificationRequestOutput(
                answer.request_id,
                ClassificationOutput(answer.outputs.data.tolist()),
                answer.prompt_token_ids,
                answer.num_cached_tokens,
            )
            for answer in answers
        ]

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
        tokenization = tokenization_of(
            truncate_prompt_tokens, tokenization_kwargs, self._engine.model.max_model_len
        )
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
        tokenization = tokenization_of(
            truncate_prompt_tokens, tokenization_kwargs, self._engine.model.max_model_len
        )
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
        tokenization = tokenization_of(
            truncate_prompt_tokens, tokenization_kwargs, self._engine.model.max_model_len
        )
        params = pooling_params or PoolingParams()
        check_params(params, ("score", TASK_OF_SCORES[model.score_type]))
        if params.late_chunking_params:
            raise InvalidParameter("Late chunking requires token_embed.", "late_chunking_params")
        tokenization = cut_as_told(tokenization, params)
        variables = chat_template_kwargs or (params.extra_kwargs or {}).get("chat_template_kwargs")
        if not isinstance(variables, Mapping | None):
            raise InvalidParameter(
                f"chat_template_kwargs must be a dict, got {variables!r}.", "chat_template_kwargs"
            )
        # Queries that are prompts of their own.
        apart = len(queries) if model.score_type in ("bi-encoder", "late-interaction") else 0
        with _bar(use_tqdm, apart + len(documents)) as progress:
            result = self._loop.run(
                self._engine.score(
                    queries,
                    documents,
                    engines_own(params),
                    tokenization,
                    template=chat_template,
                    template_kwargs=variables,
                    adapter=adapter,
                    on_progress=progress,
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
        model = engine.model
        tasks = tasks_of(name, model)
        names = (name, "&".join(tasks))
        if tokenization.max_tokens_per_query or tokenization.max_tokens_per_doc:
            raise InvalidParameter(
                "max_tokens_per_query and max_tokens_per_doc are for LLM.score.", "tokenization_kwargs"
            )
        many = as_list(prompts)
        items = [read_prompt(prompt) for prompt in many]
        each = _one_each(many, _DEFAULT if pooling_params is None else pooling_params, "pooling_params")
        loras = _one_each(many, lora_request, "lora_request")
        named = {key: self._adapter(lora) for key, lora in {id(lora): lora for lora in loras}.items()}
        groups: dict[_Group, list[int]] = {}
        for i, (prompt, params, lora) in enumerate(zip(many, each, loras, strict=True)):
            check_params(params, names)
            group = _Group(isinstance(items[i], str), params, named[id(lora)], read_salt(prompt))
            groups.setdefault(group, []).append(i)
        cuts = {group.params: cut_as_told(tokenization, group.params) for group in groups}
        for group, places in groups.items():
            if group.params.extra_kwargs:
                raise InvalidParameter("extra_kwargs is for LLM.score.", "extra_kwargs")
            if group.params.late_chunking_params:
                for i in places:
                    check_late_chunking(items[i], cuts[group.params], tasks, model)
        ids = [str(next(self._ids)) for _ in items]
        found: dict[int, PoolingRequestOutput[PoolingOutput]] = {}
        with _bar(use_tqdm, len(items) * len(tasks)) as progress:

            async def run(group: _Group, places: list[int]) -> PoolingResult:
                try:
                    return await engine.pool(
                        [items[i] for i in places],  # type: ignore[arg-type]
                        engines_own(group.params),
                        cuts[group.params],
                        task=tasks,
                        adapter=group.adapter,
                        on_progress=progress,
                        cache_salt=group.salt,
                    )
                except InvalidInput as error:
                    own = [f"input[{i}]" if len(items) > 1 else "input" for i in places]
                    raise error.blaming(own) from None

            results = self._loop.run_all([partial(run, *group) for group in groups.items()], _AT_ONCE)
        for (group, places), result in zip(groups.items(), results, strict=True):
            answers = answers_of(result, [ids[i] for i in places], tasks)
            if group.params.late_chunking_params:
                chunked = partial(self._chunked, params=group.params, special=tokenization.add_special_tokens)
                answers = list(map(chunked, answers, [str(items[i]) for i in places]))
            found |= zip(places, answers, strict=True)
        return [found[i] for i in range(len(items))]

    def _adapter(self, request: LoRARequest | None) -> str | None:
        """The name of the adapter that a request is for; it is loaded if need be, and may."""
        if request is None:
            return None
        if not hasattr(request, "lora_name"):
            raise TypeError(f"lora_request is made of LoRARequest, not of {type(request).__name__}")
        name, path = str(request.lora_name), str(getattr(request, "lora_path", ""))
        again = bool(getattr(request, "load_inplace", False))
        model, config = self._engine.model, self._engine.config
        if config.allow_runtime_lora_updating and path and (again or name not in model.adapters):
            self._loop.run(self._engine.change(LoadAdapter(name, path, again, once=not again)))
            return name
        if name not in model.adapters:
            told = f"{name!r}: {path or '…'!r}"
            raise InvalidParameter(
                f"There is no adapter {name!r}: load it at start with LLM(lora_modules={{{told}}}), or have it loaded "
                "when it is first asked for, with LLM(enable_lora=True) and its lora_path.",
                "lora_request",
            )
        loaded = model.lora_modules.get(name)
        if path and loaded is not None and not _from(path, loaded):
            raise InvalidParameter(
                f"The adapter {name!r} was loaded from {loaded}, not from {path}.", "lora_request"
            )
        return name

    def _chunked(
        self, answer: PoolingRequestOutput[PoolingOutput], text: str, params: PoolingParams, special: bool
    ) -> PoolingRequestOutput[PoolingOutput]:
        """Of an answer with a row a token, as the head left them: one with a row a chunk, finished."""
        assert params.late_chunking_params is not None
        size, rows = params.late_chunking_params.chunk_size, answer.outputs.data
        ids, offsets = self._engine.offsets(text, special)
        if not ids == answer.prompt_token_ids or len(rows) != len(ids):
            raise InvalidParameter(
                "Late chunking needs a vector and a place in the text for every token: this model has some without.",
                "late_chunking_params",
            )
        unit = self._engine.model.normalize if params.use_activation is None else params.use_activation
        means = chunk_means(rows, size, unit=unit)
        return replace(
            answer, outputs=PoolingOutput(means), late_chunking=LateChunkingMetadata.of(offsets, size)
        )


def _close(loop: LoopThread, engine: AsyncEngine) -> None:
    loop.close(engine.stop(timeout=0.0))


def _from(path: str, loaded: str) -> bool:
    """Whether both name one folder; a path that cannot be names none."""
    try:
        return Path(path).expanduser().resolve() == Path(loaded).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return False


@contextmanager
def _bar(use_tqdm: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, which appears only when there is time to see it; told of how many more are done."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    with make(total=total, desc="Processed prompts", disable=not use_tqdm, delay=0.5) as bar:
        yield lambda done: bar.update(done)


def _one_each(items: Seq[object], given: O | Seq[O], name: str) -> list[O]:
    """What was given for each prompt, or the one thing given for all."""
    each = list(given) if isinstance(given, Seq) else [given] * len(items)
    if len(each) != len(items):
        raise ValueError(f"{len(items)} prompts but {len(each)} {name} were given.")
    return each
