"""Scoring: how a query and documents become prompts, and what comes back becomes scores.

    cross-encoder      one prompt a pair                       the head's one number
    bi-encoder         the query once, each document            cosine of the two vectors, float32
    late interaction   the same, every token                   MaxSim: each query token's best product, summed

No model and no event loop here: `plan` says what to run, `Plan.scores` reads the answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from carpool.engine.chat import ChatTemplate
from carpool.engine.errors import EmptyInput, InvalidInput, UnsupportedTask
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import Task

Row = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plan:
    """`prompts` to run as `task`; `pairs` are places in `prompts` of each pair's two sides, or of the pair twice.

    Equal prompts are run once, so that equal documents score the same to the last bit; `asked` has the place of each
    prompt as it was asked for. `fields` name what a prompt was made of, for those who have to say what is wrong.
    """

    task: Task
    prompts: list[str] | list[tuple[str, str]]
    pairs: list[tuple[int, int]]
    measure: Callable[[Row, Row], float]
    fields: list[str]
    asked: list[int]

    @classmethod
    def of(
        cls,
        task: Task,
        prompts: Seq[str] | Seq[tuple[str, str]],
        pairs: Seq[tuple[int, int]],
        measure: Callable[[Row, Row], float],
        fields: Seq[str],
    ) -> Plan:
        """`pairs` and `fields` are about `prompts` as they are asked for, equal ones included."""
        place: dict[str | tuple[str, str], int] = {}
        asked = [place.setdefault(prompt, len(place)) for prompt in prompts]
        named = (
            [fields[asked.index(i)] for i in range(len(place))] if len(place) < len(asked) else list(fields)
        )
        distinct = cast("list[str] | list[tuple[str, str]]", list(place))
        return cls(task, distinct, [(asked[a], asked[b]) for a, b in pairs], measure, named, asked)

    def prompt_tokens(self, prompts: Seq[list[int]]) -> int:
        """How many tokens were asked for, equal prompts counted each."""
        return sum(len(prompts[i]) for i in self.asked)

    def scores(self, rows: Seq[Row]) -> list[float]:
        """One score a pair, in order."""
        return [self.measure(rows[a], rows[b]) for a, b in self.pairs]

    def token_ids(self, prompts: Seq[list[int]]) -> list[list[int]]:
        """The ids of each pair, both sides, from those of the prompts."""
        return [prompts[a] if a == b else prompts[a] + prompts[b] for a, b in self.pairs]

    def blame(self, error: InvalidInput) -> InvalidInput:
        """The same error, with the query or document to blame where it names a prompt."""
        place = re.fullmatch(r"input(?:\[(\d+)\])?", error.param or "")
        if place:
            error.param = self.fields[int(place[1] or 0)]
        return error


def plan(
    model: ModelInfo,
    queries: Seq[str],
    documents: Seq[str],
    chat: ChatTemplate,
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """How `model` scores each query with its document: 1:1, 1:N or N:N. `kwargs` go to a score template."""
    if not queries:
        raise EmptyInput("At least one text element must be given", "queries")
    if not documents:
        raise EmptyInput("At least one text_pair element must be given", "documents")
    if len(queries) not in (1, len(documents)):
        raise InvalidInput("Input lengths must be either 1:1, 1:N or N:N")
    kind = model.score_type
    if kind is None:
        raise UnsupportedTask("The model does not support Score API")
    one = len(queries) == 1
    if kind == "cross-encoder":
        matched = [(queries[0] if one else queries[i], document) for i, document in enumerate(documents)]
        return _cross_encoder(model, matched, chat, kwargs)
    pairs = [(0 if one else i, len(queries) + i) for i in range(len(documents))]
    prompts, fields = [*queries, *documents], _names("queries", queries) + _names("documents", documents)
    if kind == "bi-encoder":
        return Plan.of("embed", prompts, pairs, cosine, fields)
    return Plan.of("token_embed", prompts, pairs, max_sim, fields)


def _cross_encoder(
    model: ModelInfo, pairs: list[tuple[str, str]], chat: ChatTemplate, kwargs: Mapping[str, Any] | None
) -> Plan:
    both = [(i, i) for i in range(len(pairs))]
    prompts: Seq[str] | Seq[tuple[str, str]] = pairs
    if chat.given:
        prompts = [chat.render_pair(query, document, kwargs) for query, document in pairs]
    elif model.pairs == "concatenated":
        prompts = [query + document for query, document in pairs]
    fields = _names("documents", prompts)
    return Plan.of("classify", prompts, both, lambda row, _: float(row[0]), fields)


def _names(field: str, items: Seq[object]) -> list[str]:
    return [field] if len(items) == 1 else [f"{field}[{i}]" for i in range(len(items))]


def cosine(a: Row, b: Row) -> float:
    """Cosine of two vectors, in float32; 0 where one has no length."""
    lengths = np.float32(np.linalg.norm(a)) * np.float32(np.linalg.norm(b))
    return float(np.dot(a, b) / lengths) if lengths else 0.0


def max_sim(query: Row, document: Row) -> float:
    """Σ over query tokens of the largest product with a document token. query [Q, D], document [M, D]."""
    return float((query @ document.T).max(axis=1).sum(dtype=np.float32))
