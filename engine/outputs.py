"""What comes back for one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class Timings:
    """Seconds a request spent in each stage; the slowest of its sequences counts."""

    tokenize: float = 0.0
    queue: float = 0.0
    forward: float = 0.0


@dataclass(slots=True)
class PoolingResult:
    """The answers to one request, in the order of its prompts.

    `rows[i]` is `[D]` for a pooled vector, `[tokens, D]` for a token task, `[n, 2]` for a sparse vector: float32, or an
    embedding's `embed_dtype`. Of several tasks a prompt has as many rows, in the order of the tasks, before those of
    the next.
    """

    rows: list[NDArray[Any]]
    prompt_token_ids: list[list[int]]
    timings: Timings = field(default_factory=Timings)
    cached: list[int] = field(default_factory=list)  # of each prompt, the tokens that had been run for others

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompt_token_ids))

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached)


@dataclass(slots=True)
class ScoreResult:
    """One score a pair, in order, and the ids of both its texts.

    In `prompt_tokens` a query that meets many documents by itself is counted once.
    """

    scores: list[float]
    prompt_tokens: int
    timings: Timings
    pair_token_ids: list[list[int]] = field(default_factory=list)
    # Of each pair, the tokens that had been run for others; and of all prompts that were run.
    pair_cached: list[int] = field(default_factory=list)
    cached_tokens: int = 0


class Piece(NamedTuple):
    """A token of a text: what it stands for there, and from which character up to which; of a special one its name."""

    token: int
    text: str
    start: int | None
    stop: int | None
