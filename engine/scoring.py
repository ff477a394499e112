"""Scoring: how a query and documents become prompts, and what comes back becomes scores.

    cross-encoder      one prompt a pair                       the head's one number
    bi-encoder         the query once, each document            cosine of the two vectors, or (sparse) their product
    late interaction   the same, every token                   MaxSim: each query token's best product, summed
    listwise           all documents in one prompt              `listwise`: cosines with a vector of the query

No model and no event loop here: `plan` says what to run, `Plan.scores` reads the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from carpool.engine.bounds import check_text
from carpool.engine.errors import EmptyInput, InvalidInput, InvalidParameter, UnsupportedTask
from carpool.engine.framed import Framed
from carpool.engine.late_interaction import Role, RoleText
from carpool.engine.listwise import ListPlan, Listwise, Tokens
from carpool.engine.model_info import ModelInfo
from carpool.engine.params import Task

Row = NDArray[np.float32]
Prompt = str | tuple[str, str] | Framed | RoleText
Prompts = list[str] | list[tuple[str, str]] | list[Framed] | list[RoleText]


class Framer(Protocol):
    """Puts pairs of a query and a document into the words of a prompt: a template, or a row of `rerankers`."""

    def frames(self, pairs: Seq[tuple[str, str]], kwargs: Mapping[str, Any] | None) -> list[Framed]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """`prompts` to run as `task`; `pairs` are places in `prompts` of each pair's two sides, or of the pair twice.

    Equal prompts are run once, so that equal documents score the same to the last bit; `asked` has the place of each
    prompt as it was asked for. `fields` name what a prompt was made of, for those who have to say what is wrong.
    """

    task: Task
    prompts: Prompts
    pairs: list[tuple[int, int]]
    measure: Callable[[Row, Row], float]
    fields: list[str]
    asked: list[int]
    roles: Mapping[Role, frozenset[int]] = field(default_factory=dict)  # as ModelInfo has them

    @classmethod
    def of(
        cls,
        task: Task,
        prompts: Seq[Prompt],
        pairs: Seq[tuple[int, int]],
        measure: Callable[[Row, Row], float],
        fields: Seq[str],
        roles: Mapping[Role, frozenset[int]] | None = None,
    ) -> Plan:
        """`pairs` and `fields` are about `prompts` as they are asked for, equal ones included."""
        place: dict[Prompt, int] = {}
        asked = [place.setdefault(prompt, len(place)) for prompt in prompts]
        first = dict(zip(reversed(asked), reversed(fields), strict=True))
        named = [first[i] for i in range(len(place))]
        distinct = cast("Prompts", list(place))
        return cls(
            task, distinct, [(asked[a], asked[b]) for a, b in pairs], measure, named, asked, roles or {}
        )

    def prompt_tokens(self, prompts: Seq[list[int]]) -> int:
        """How many tokens were asked for, equal prompts counted each."""
        return sum(len(prompts[i]) for i in self.asked)

    def scores(self, rows: Seq[Row], token_ids: Seq[list[int]] = ()) -> list[float]:
        """One score a pair, in order, of the prompts' results; `token_ids` of the prompts, where there are roles."""
        if self.roles:
            rows = taking_part(rows, token_ids, cast("list[RoleText]", self.prompts), self.roles)
        return [self.measure(rows[a], rows[b]) for a, b in self.pairs]

    def by_pair(self, prompts: Seq[Tokens]) -> list[Tokens]:
        """Of each pair, both sides, what `prompts` says of the prompts: their ids, or how many tokens."""
        return [prompts[a] if a == b else prompts[a] + prompts[b] for a, b in self.pairs]

    def blame(self, error: InvalidInput) -> InvalidInput:
        """The same error, with the query or document to blame where it names a prompt."""
        return error.blaming(self.fields)


def plan(
    model: ModelInfo,
    queries: Seq[str],
    documents: Seq[str],
    framer: Framer | None,
    kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Plan | ListPlan:
    """How `model` scores each query with its document: 1:1, 1:N or N:N. `kwargs` are for the `framer`.

    `limit` is how long a prompt is to be at most; only a list is dealt out by it, other prompts are cut later.
    """
    _check_sides(queries, documents)
    match model.score_type:
        case None:
            raise UnsupportedTask("The model does not support Score API")
        case "listwise":
            if not isinstance(framer, Listwise):
                raise InvalidParameter(
                    "This model reads a query and all its documents in a prompt of its own, in place of which no "
                    "template can stand.",
                    "chat_template",
                )
            return framer.plan(queries, documents, kwargs, limit)
        case "cross-encoder":
            one = len(queries) == 1
            pairs = [(queries[0] if one else queries[i], document) for i, document in enumerate(documents)]
            return _plan_of_pairs(pair_prompts(model, pairs, framer, kwargs))
        case "bi-encoder" | "late-interaction":
            return _plan_of_sides(model, queries, documents)


def check_texts(queries: list[str], documents: list[str]) -> None:
    """Raise InvalidInput for what is not text, naming whose it is: later, texts that are alike are one."""
    for side, texts in (("queries", queries), ("documents", documents)):
        try:
            check_text(texts)
        except InvalidInput as error:
            raise error.blaming(_names(side, texts)) from None


def _check_sides(queries: Seq[str], documents: Seq[str]) -> None:
    if not queries:
        raise EmptyInput("At least one text element must be given", "queries")
    if not documents:
        raise EmptyInput("At least one text_pair element must be given", "documents")
    if len(queries) not in (1, len(documents)):
        raise InvalidInput("Input lengths must be either 1:1, 1:N or N:N")


def _plan_of_pairs(prompts: Prompts) -> Plan:
    """A prompt is a pair, and its result the score."""
    both = [(i, i) for i in range(len(prompts))]
    return Plan.of("classify", prompts, both, lambda row, _: float(row[0]), _names("documents", prompts))


def _plan_of_sides(model: ModelInfo, queries: Seq[str], documents: Seq[str]) -> Plan:
    """Each text is a prompt, and two results are compared."""
    pairs = [(0 if len(queries) == 1 else i, len(queries) + i) for i in range(len(documents))]
    fields = _names("queries", queries) + _names("documents", documents)
    if model.score_type == "bi-encoder":
        measure: Callable[[Row, Row], float] = dot if model.similarity == "dot" else cosine
        return Plan.of("embed", [*queries, *documents], pairs, measure, fields)
    measure = mean_max_sim if model.similarity == "meanmaxsim" else max_sim
    if not model.roles:
        return Plan.of("token_embed", [*queries, *documents], pairs, measure, fields)
    texts = [RoleText("query", text) for text in queries]
    texts += [RoleText("document", text) for text in documents]
    return Plan.of("token_embed", texts, pairs, measure, fields, model.roles)


def pair_prompts(
    model: ModelInfo,
    pairs: list[tuple[str, str]],
    framer: Framer | None,
    kwargs: Mapping[str, Any] | None = None,
) -> Prompts:
    """Each pair as one prompt: in the framer's words, one text after the other, or apart."""
    if framer is not None:
        return framer.frames(pairs, kwargs)
    if model.pairs == "concatenated":
        return [query + document for query, document in pairs]
    return pairs


def _names(field: str, items: Seq[object]) -> list[str]:
    return [field] if len(items) == 1 else [f"{field}[{i}]" for i in range(len(items))]


def cosine(a: Row, b: Row) -> float:
    """Cosine of two vectors, in float32; 0 where one has no length."""
    lengths = np.float32(np.linalg.norm(a)) * np.float32(np.linalg.norm(b))
    return float(np.dot(a, b) / lengths) if lengths else 0.0


def dot(a: Row, b: Row) -> float:
    """The product of two vectors, in float32: the weights of two texts for the words they share."""
    return float(np.dot(a, b))


def max_sim(query: Row, document: Row) -> float:
    """Σ over query tokens of the largest product with a document token. query [Q, D], document [M, D]."""
    return float((query @ document.T).max(axis=1).sum(dtype=np.float32)) if len(document) else 0.0


def mean_max_sim(query: Row, document: Row) -> float:
    """MaxSim a query token."""
    return max_sim(query, document) / max(1, len(query))


def taking_part(
    rows: Seq[Row], token_ids: Seq[list[int]], texts: Seq[RoleText], roles: Mapping[Role, frozenset[int]]
) -> list[Row]:
    """Of each text's vectors [tokens, D] those of tokens that its role does not leave out."""
    return [
        row[[token not in skipped for token in ids]] if (skipped := roles[text.role]) else row
        for row, ids, text in zip(rows, token_ids, texts, strict=True)
    ]
