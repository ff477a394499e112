"""LLM: the engine for scripts and notebooks. Same engine as the server's, same numbers, no HTTP.

from carpool import LLM
(output,) = LLM("path/to/model").embed("Hello, my name is")
output.outputs.embedding
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.config import IGNORED_OPTIONS, EngineConfig, PoolerConfig
from carpool.engine.errors import ConfigError
from carpool.engine.loop_thread import LoopThread
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import PoolingParams, Task, TokenizationParams

Prompt = str | list[int] | Mapping[str, Any]
O = TypeVar("O")  # noqa: E741

# What `pooling_task` may say, older names included, and what it means here.
_TASKS: Mapping[str, Task] = {"embed": "embed", "token_embed": "token_embed", "encode": "token_embed"}


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """`data`: float32 tensor, [D] for a pooled vector, [tokens, D] for a token task."""

    data: Tensor


@dataclass(frozen=True, slots=True, repr=False)
class EmbeddingOutput:
    """`embedding`: the vector as plain floats."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:  # hundreds of numbers help nobody
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass(frozen=True, slots=True)
class RequestOutput(Generic[O]):
    """The answer to one prompt."""

    request_id: str
    outputs: O
    prompt_token_ids: list[int]
    finished: bool = True


class LLM:
    """Loads a model once and answers lists of prompts; one call at a time a thread, any number of threads."""

    def __init__(self, model: str = "", *, task: str | None = None, **options: Any) -> None:
        """`options` are EngineConfig's fields; options of the reference that mean nothing here are ignored.

        `task` and `override_pooler_config` are older spellings. Raises ConfigError for unknown options and for
        models that cannot be served.
        """
        if task not in (None, "auto", "embed", "embedding"):
            raise ConfigError(f"task={task!r}: this model is served for embeddings only.")
        self._loop = LoopThread("carpool-llm")
        self._engine = self._loop.run(_start(_config(model, options)))
        self._close = weakref.finalize(self, _close, self._loop, self._engine)

    def embed(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[RequestOutput[EmbeddingOutput]]:
        """One vector a prompt."""
        answers = self._pool(prompts, pooling_params, "embed", use_tqdm, truncate_prompt_tokens)
        return [
            RequestOutput(
                answer.request_id, EmbeddingOutput(answer.outputs.data.tolist()), answer.prompt_token_ids
            )
            for answer in answers
        ]

    def encode(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: PoolingParams | Seq[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        pooling_task: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[RequestOutput[PoolingOutput]]:
        """What the model's pooler gives, as tensors. Without `pooling_task`, what the model is for.

        "embed" is one vector a prompt, "token_embed" (or "encode") one a token.
        """
        task = "embed" if pooling_task is None else pooling_task
        if task not in _TASKS:
            raise ValueError(f"pooling_task={pooling_task!r} is not one of {', '.join(_TASKS)}.")
        return self._pool(prompts, pooling_params, _TASKS[task], use_tqdm, truncate_prompt_tokens)

    def close(self) -> None:
        """Free the model. Called by itself when the object goes or the program ends."""
        self._close()

    def _pool(
        self,
        prompts: Prompt | Seq[Prompt],
        pooling_params: PoolingParams | Seq[PoolingParams] | None,
        task: Task,
        use_tqdm: bool,
        truncate: int | None,
    ) -> list[RequestOutput[PoolingOutput]]:
        items = _as_list(prompts)
        tokenization = TokenizationParams(truncate_prompt_tokens=truncate)
        groups = _groups(items, pooling_params)
        answers: list[RequestOutput[PoolingOutput] | None] = [None] * len(items)
        # The bar appears only when there is time to see it.
        with tqdm(total=len(items), desc="Processed prompts", disable=not use_tqdm, delay=0.5) as bar:
            for places, params in groups:
                result = self._loop.run(
                    self._engine.pool(
                        [items[i] for i in places],  # type: ignore[arg-type]
                        params,
                        tokenization,
                        task=task,
                        on_progress=lambda done: bar.update(done),
                    )
                )
                for i, answer in zip(places, _answers(result, places), strict=True):
                    answers[i] = answer
        return [answer for answer in answers if answer is not None]


async def _start(config: EngineConfig) -> AsyncEngine:
    engine = AsyncEngine(config)
    await engine.start()
    return engine


def _close(loop: LoopThread, engine: AsyncEngine) -> None:
    loop.close(engine.stop(timeout=0.0))


def _config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """Keyword arguments to EngineConfig; unknown ones name their nearest neighbour."""
    given = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
    if "override_pooler_config" in given:
        given["pooler_config"] = given.pop("override_pooler_config")
    _check_names("LLM()", given, EngineConfig)
    if isinstance(given.get("pooler_config"), Mapping):
        _check_names("pooler_config", given["pooler_config"], PoolerConfig)
        given["pooler_config"] = PoolerConfig(**given["pooler_config"])
    if given.get("pooler_config", ...) is None:
        del given["pooler_config"]
    return EngineConfig(model=model, **given)


def _check_names(where: str, given: Mapping[str, Any], config: type) -> None:
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise ConfigError(
                f"{where} has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[str | list[int]]:
    """One prompt or many, each text, token ids, or a dict of either, as a list of texts and ids."""
    single = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))
    many = cast("Seq[Prompt]", [prompts] if single else prompts)
    return [_unwrap(prompt) for prompt in many]


def _unwrap(prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Seq):
        return list(prompt)
    raise TypeError(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")


def _groups(
    items: list[str | list[int]], params: PoolingParams | Seq[PoolingParams] | None
) -> list[tuple[list[int], PoolingParams]]:
    """Places of the prompts that can go in one call: of one kind, with one set of parameters."""
    each = [params or PoolingParams()] * len(items) if not isinstance(params, Seq) else list(params)
    if len(each) != len(items):
        raise ValueError(f"{len(items)} prompts but {len(each)} pooling_params were given.")
    groups: dict[tuple[bool, PoolingParams], list[int]] = {}
    for i, (item, own) in enumerate(zip(items, each, strict=True)):
        groups.setdefault((isinstance(item, str), own), []).append(i)
    return [(places, own) for (_, own), places in groups.items()]


def _answers(result: PoolingResult, places: list[int]) -> list[RequestOutput[PoolingOutput]]:
    return [
        RequestOutput(str(place), PoolingOutput(torch.from_numpy(row.copy())), ids)
        for place, row, ids in zip(places, result.rows, result.prompt_token_ids, strict=True)
    ]
