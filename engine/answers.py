"""What LLM gives back, under the names that scripts of the reference know."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from carpool.engine.late_chunking import LateChunkingMetadata
from carpool.engine.outputs import PoolingResult
from carpool.engine.params import Task

O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True, slots=True, eq=False)
class PoolingOutput:
    """`data`: float32 tensor, [D] for a pooled vector, [tokens, D] for a token task, [n, 2] for a sparse vector.

    Of several tasks it is a dict of such tensors by task.
    """

    data: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PoolingOutput):
            return NotImplemented
        ours, theirs = _by_task(self.data), _by_task(other.data)
        return ours.keys() == theirs.keys() and all(torch.equal(ours[task], theirs[task]) for task in ours)

    __hash__ = None  # type: ignore[assignment]


def _by_task(data: Any) -> dict[str, torch.Tensor]:
    return data if isinstance(data, dict) else {"": data}


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
class PoolingRequestOutput(Generic[O]):
    """The answer to one prompt, or to one pair. `request_id` counts the prompts that an LLM was given.

    `late_chunking` is of results a chunk: which tokens and characters each row stands for.
    """

    request_id: str
    outputs: O
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0  # found in the prefix cache
    finished: bool = True
    late_chunking: LateChunkingMetadata | None = field(default=None, repr=False)


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    __slots__ = ()

    @classmethod
    def from_base(cls, answer: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
        """The same answer, its tensor as plain floats."""
        outputs = EmbeddingOutput(answer.outputs.data.tolist())
        return cls(answer.request_id, outputs, answer.prompt_token_ids, answer.num_cached_tokens)


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    __slots__ = ()

    @classmethod
    def from_base(cls, answer: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
        """The same answer, its tensor as plain floats."""
        outputs = ClassificationOutput(answer.outputs.data.tolist())
        return cls(answer.request_id, outputs, answer.prompt_token_ids, answer.num_cached_tokens)


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    __slots__ = ()


def answers_of(
    result: PoolingResult, ids: list[str], tasks: tuple[Task, ...]
) -> list[PoolingRequestOutput[PoolingOutput]]:
    """One a prompt, numbered by `ids`; of several tasks with a tensor a task."""
    tensors = [_tensor(row) for row in result.rows]
    each: Seq[Any] = tensors
    if len(tasks) > 1:
        by_prompt = zip(*(tensors[i :: len(tasks)] for i in range(len(tasks))), strict=True)
        each = [dict(zip(tasks, own, strict=True)) for own in by_prompt]
    parts = zip(ids, map(PoolingOutput, each), result.prompt_token_ids, result.cached, strict=True)
    return [PoolingRequestOutput(*part) for part in parts]


def _tensor(row: NDArray[Any]) -> torch.Tensor:
    """A copy. torch does not know the bfloat16 that numpy has from elsewhere."""
    if row.dtype.name == "bfloat16":
        return torch.from_numpy(row.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(row.copy())
