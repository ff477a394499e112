"""LLM: the engine for scripts and notebooks. Same engine as the server's, same numbers, no HTTP.

from carpool import LLM
(output,) = LLM("path/to/model").embed("Hello, my name is")
output.outputs.embedding
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.chat import text_of
from carpool.engine.config import CONVERT_OF_TASK, EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError, InvalidParameter, UnsupportedTask
from carpool.engine.loop_thread import LoopThread
from carpool.engine.model_info import ModelInfo
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import LoRARequest, PoolingParams, Task, TokenizationParams
from carpool.engine.reference_options import ONE_ONLY, WITHOUT_MEANING, require_one

Prompt = str | list[int] | Mapping[str, Any]
Params = PoolingParams | Seq[PoolingParams] | None
Loras = LoRARequest | Seq[LoRARequest] | None  # one for all prompts, or one each
ScoreInput = str | Mapping[str, Any]
Progress = bool | Callable[..., Any]  # shown or not, or what to show it with instead of tqdm
O = TypeVar("O")  # noqa: E741

# What `pooling_task` may say: the first of these that the model does.
_TASKS: Mapping[str, tuple[Task, ...]] = {
    "embed": ("embed",),
    "classify": ("classify",),
    "token_embed": ("token_embed",),
    "sparse_embed": ("sparse_embed",),
    "token_classify": ("token_classify",),
    "encode": ("token_embed", "token_classify"),  # the older name of both
    "reward": ("token_classify",),
    "score": ("classify",),  # until it got a method of its own
}
_API = {
    "embed": ("Embedding", "embed"),
    "classify": ("Classification", "classify"),
    "reward": ("Reward", "reward"),
}


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """`data`: float32 tensor, [D] for a pooled vector, [tokens, D] for a token task, [n, 2] for a sparse vector.

    Of several tasks it is a dict of such tensors by task.
    """

    data: Any


@dataclass(frozen=True, slots=True, repr=False)
class EmbeddingOutput:
    """`embedding`: the vector as plain floats."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:  # hundreds of numbers help nobody
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(frozen=True, slots=True, repr=False)
class ClassificationOutput:
    """`probs`: one number a class."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)

    def __repr__(self) -> str:
        return f"ClassificationOutput(num_classes={self.num_classes})"


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """`score`: how well the two texts go together."""

    score: float


@dataclass(frozen=True, slots=True)
class RequestOutput(Generic[O]):
    """The answer to one prompt, or to one pair."""

    request_id: str
    outputs: O
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0  # found in the prefix cache


class LLM:
    """Loads a model once and answers lists of prompts; one call at a time a thread, any number of threads."""

    def __init__(self, model: str = "", *, task: str | None = None, **options: Any) -> None:
        """`options` are EngineConfig's fields; options of the reference that mean nothing here are ignored.

        `lora_modules` may be a dict of a path a name. `task` and `override_pooler_config` are older spellings. Raises
        ConfigError for unknown options and for models that cannot be served.
        """
        config = _config(model, task, options)
        self._loop = LoopThread("carpool-llm")
        self._engine = AsyncEngine(config)
        try:
            self._loop.run(self._engine.start())
        except BaseException:  # also Ctrl-C while it loads
            _close(self._loop, self._engine)
            raise
        self._close = weakref.finalize(self, _close, self._loop, self._engine)

    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput[EmbeddingOutput]]:
        """One vector a prompt."""
        tokenization = _tokenization(truncate_prompt_tokens, tokenization_kwargs)
        answers = self._pool(prompts, pooling_params, "embed", use_tqdm, tokenization, lora_request)
        return [_with(answer, EmbeddingOutput(answer.outputs.data.tolist())) for answer in answers]

    def classify(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput[ClassificationOutput]]:
        """The probability of each class; logits with `PoolingParams(use_activation=False)`."""
        tokenization = _tokenization(truncate_prompt_tokens, tokenization_kwargs)
        answers = self._pool(prompts, pooling_params, "classify", use_tqdm, tokenization, lora_request)
        return [_with(answer, ClassificationOutput(answer.outputs.data.tolist())) for answer in answers]

    def reward(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput[PoolingOutput]]:
        """One row a token, or a step of a process reward model."""
        tokenization = _tokenization(truncate_prompt_tokens, tokenization_kwargs)
        return self._pool(prompts, pooling_params, "reward", use_tqdm, tokenization, lora_request)

    def encode(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: Params = None,
        *,
        use_tqdm: Progress = True,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Loras = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput[PoolingOutput]]:
        """What the model's pooler gives, as tensors. Without `pooling_task`, what the model is for.

        "embed" and "classify" are one row a prompt, "token_embed", "token_classify" (or, of either, "encode") and
        "reward" one a token, "sparse_embed" one a weight. Several, joined by "&", cost one run of the model.
        """
        tokenization = _tokenization(truncate_prompt_tokens, tokenization_kwargs)
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
    ) -> list[RequestOutput[ScoringOutput]]:
        """How well each first text goes with its second: 1:1, 1:N (one first text for all) or N:N.

        A text may be `{"content": [{"type": "text", "text": …}]}`. `chat_template` renders the pairs for a causal
        model, as --chat-template does.
        """
        model = self._engine.model
        adapter = _adapter(lora_request, model)
        if model.score_type is None:
            raise UnsupportedTask(
                "Scoring API is only enabled for num_labels == 1."
                if "classify" in model.tasks
                else "This model does not support the Scoring API."
            )
        queries, documents = _texts(data_1, "data_1"), _texts(data_2, "data_2")
        tokenization = _tokenization(truncate_prompt_tokens, tokenization_kwargs)
        # Queries that are prompts of their own.
        apart = len(queries) if model.score_type in ("bi-encoder", "late-interaction") else 0
        with _bar(use_tqdm, apart + len(documents)) as progress:
            result = self._loop.run(
                self._engine.score(
                    queries,
                    documents,
                    pooling_params or PoolingParams(),
                    tokenization,
                    template=chat_template,
                    template_kwargs=chat_template_kwargs,
                    adapter=adapter,
                    on_progress=progress,
                )
            )
        pairs = zip(result.scores, result.pair_token_ids, result.pair_cached, strict=True)
        return [
            RequestOutput(str(i), ScoringOutput(score), ids, num_cached_tokens=cached)
            for i, (score, ids, cached) in enumerate(pairs)
        ]

    @property
    def model_info(self) -> ModelInfo:
        """What the model is and how it is run: what `GET /info` tells of a server."""
        return self._engine.model

    def close(self) -> None:
        """Free the model. Called by itself when the object goes or the program ends."""
        self._close()

    def _pool(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: Params,
        name: str | None,
        use_tqdm: Progress,
        tokenization: TokenizationParams,
        lora_request: Loras,
    ) -> list[RequestOutput[PoolingOutput]]:
        tasks = _tasks(name, self._engine.model)
        many = _as_list(prompts)
        items, salts = [_unwrap(prompt) for prompt in many], [_salt(prompt) for prompt in many]
        groups = _groups(items, salts, pooling_params, lora_request, self._engine.model)
        answers: list[RequestOutput[PoolingOutput] | None] = [None] * len(items)
        with _bar(use_tqdm, len(items) * len(tasks)) as progress:
            for places, params, adapter, salt in groups:
                result = self._loop.run(
                    self._engine.pool(
                        [items[i] for i in places],  # type: ignore[arg-type]
                        params,
                        tokenization,
                        task=tasks,
                        adapter=adapter,
                        on_progress=progress,
                        cache_salt=salt,
                    )
                )
                for i, answer in zip(places, _answers(result, places, tasks), strict=True):
                    answers[i] = answer
        return [answer for answer in answers if answer is not None]


def _close(loop: LoopThread, engine: AsyncEngine) -> None:
    loop.close(engine.stop(timeout=0.0))


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────


def _config(model: str, task: str | None, options: Mapping[str, Any]) -> EngineConfig:
    """Keyword arguments to EngineConfig; unknown ones name their nearest neighbour."""
    for name in ONE_ONLY.keys() & options.keys():
        require_one(name, options[name])
    given = {
        name: value for name, value in options.items() if name not in WITHOUT_MEANING and name not in ONE_ONLY
    }
    if "override_pooler_config" in given:
        given["pooler_config"] = given.pop("override_pooler_config")
    if task is not None:
        if task not in CONVERT_OF_TASK:
            raise ConfigError(f"task={task!r} is not one of {', '.join(CONVERT_OF_TASK)}.")
        given.setdefault("convert", CONVERT_OF_TASK[task])
    _check_names("LLM()", given, EngineConfig)
    if isinstance(given.get("pooler_config"), Mapping):
        _check_names("pooler_config", given["pooler_config"], PoolerConfig)
        given["pooler_config"] = PoolerConfig(**given["pooler_config"])
    # As in the reference, None leaves an option to its default.
    return EngineConfig(model=model, **{name: value for name, value in given.items() if value is not None})


def _check_names(where: str, given: Mapping[str, Any], config: type) -> None:
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ConfigError(
                f"{where} has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )


def _tokenization(truncate: int | None, kwargs: Mapping[str, Any] | None) -> TokenizationParams:
    """`kwargs` are TokenizationParams' fields, or `truncation` and `max_length` as a tokenizer has them."""
    given = dict(kwargs or {})
    length = given.pop("max_length", None)
    if given.pop("truncation", length is not None):
        given.setdefault("truncate_prompt_tokens", -1 if length is None else length)
    if truncate is not None:
        given["truncate_prompt_tokens"] = truncate
    known = [field.name for field in fields(TokenizationParams)]
    for name in given:
        if name not in known:
            raise InvalidParameter(
                f"tokenization_kwargs has no {name!r}: it may name {', '.join(known)}.", name
            )
    return TokenizationParams(**given)


def _tasks(name: str | None, model: ModelInfo) -> tuple[Task, ...]:
    """The engine's tasks for what the caller named, joined by `&`; None is what the model is for."""
    if name is None:
        return (model.default_task,)
    return tuple(dict.fromkeys(_task(part, model) for part in name.split("&")))


def _task(name: str, model: ModelInfo) -> Task:
    if name not in _TASKS:
        raise UnsupportedTask(f"pooling_task={name!r} is not one of {', '.join(_TASKS)}.", "pooling_task")
    found = next((task for task in _TASKS[name] if task in model.tasks), None)
    if found is not None:
        return found
    if name in _API:
        api, convert = _API[name]
        raise UnsupportedTask(
            f"{api} API is not supported by this model. Try converting the model using `--convert {convert}`."
        )
    raise UnsupportedTask(
        f"Unsupported task: {name!r} Supported tasks: {', '.join(sorted(model.tasks))}.", "pooling_task"
    )


def _adapter(request: LoRARequest | None, model: ModelInfo) -> str | None:
    """The name of the adapter that a request is for. Adapters are loaded at start, and from one place."""
    if request is None:
        return None
    name, path = str(getattr(request, "lora_name", None)), str(getattr(request, "lora_path", ""))
    if name not in model.adapters:
        raise InvalidParameter(
            f"There is no adapter {name!r}: load it at start with LLM(lora_modules={{{name!r}: {path or '…'!r}}}).",
            "lora_request",
        )
    loaded = model.lora_modules.get(name)
    if (
        path
        and loaded is not None
        and Path(path).expanduser().resolve() != Path(loaded).expanduser().resolve()
    ):
        raise InvalidParameter(
            f"The adapter {name!r} was loaded from {loaded}, not from {path}.", "lora_request"
        )
    return name


# ── prompts and answers ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _bar(use_tqdm: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, which appears only when there is time to see it; told of how many more are done."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    with make(total=total, desc="Processed prompts", disable=not use_tqdm, delay=0.5) as bar:
        yield lambda done: bar.update(done)


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or many, each text, token ids, or a dict of either, as a list."""
    single = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return list(cast("Seq[Prompt]", [prompts] if single else prompts))


def _unwrap(prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Seq):
        return list(prompt)
    raise TypeError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")


def _salt(prompt: Prompt) -> str | None:
    """Only prompts with the same one share what the cache holds."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and not isinstance(salt, str):
        raise TypeError(f"a cache_salt is a text, not {type(salt).__name__}")
    return salt


def _texts(items: ScoreInput | Seq[ScoreInput], field: str) -> list[str]:
    """One side of the pairs, each text plain or in content parts, as a list."""
    many = [items] if isinstance(items, str | Mapping) else list(items)
    return [_text(item, f"{field}[{i}]") for i, item in enumerate(many)]


def _text(item: Any, field: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        parts = item.get("content", ())
        texts = [parts] if isinstance(parts, str) else [text_of(part, f"{field}.content") for part in parts]
        return "\n".join(texts)
    raise TypeError(f'{field} is a text or {{"content": […]}}, not {type(item).__name__}')


def _groups(
    items: list[str | list[int]], salts: list[str | None], params: Params, loras: Loras, model: ModelInfo
) -> list[tuple[list[int], PoolingParams, str | None, str | None]]:
    """Places of the prompts that can go in one call: of one kind, with one set of parameters, adapter and salt."""
    each = _one_each(items, params or PoolingParams(), "pooling_params")
    adapters = [_adapter(lora, model) for lora in _one_each(items, loras, "lora_request")]
    groups: dict[tuple[bool, PoolingParams, str | None, str | None], list[int]] = {}
    for i, (item, own, adapter, salt) in enumerate(zip(items, each, adapters, salts, strict=True)):
        groups.setdefault((isinstance(item, str), own, adapter, salt), []).append(i)
    return [(places, own, adapter, salt) for (_, own, adapter, salt), places in groups.items()]


def _one_each(items: Seq[object], given: O | Seq[O], name: str) -> list[O]:
    """What was given for each prompt, or the one thing given for all."""
    each = list(given) if isinstance(given, Seq) else [given] * len(items)
    if len(each) != len(items):
        raise ValueError(f"{len(items)} prompts but {len(each)} {name} were given.")
    return each


def _answers(
    result: PoolingResult, places: list[int], tasks: tuple[Task, ...]
) -> list[RequestOutput[PoolingOutput]]:
    tensors = [_tensor(row) for row in result.rows]
    each: Seq[Any] = tensors
    if len(tasks) > 1:
        by_prompt = zip(*(tensors[i :: len(tasks)] for i in range(len(tasks))), strict=True)
        each = [dict(zip(tasks, own, strict=True)) for own in by_prompt]
    return [
        RequestOutput(str(place), PoolingOutput(data), ids, num_cached_tokens=cached)
        for place, data, ids, cached in zip(places, each, result.prompt_token_ids, result.cached, strict=True)
    ]


def _with(answer: RequestOutput[PoolingOutput], outputs: O) -> RequestOutput[O]:
    return RequestOutput(
        answer.request_id, outputs, answer.prompt_token_ids, num_cached_tokens=answer.num_cached_tokens
    )


def _tensor(row: NDArray[Any]) -> torch.Tensor:
    """A copy. torch does not know the bfloat16 that numpy has from elsewhere."""
    if row.dtype.name == "bfloat16":
        return torch.from_numpy(row.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(row.copy())
