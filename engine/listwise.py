"""Listwise: a reranker that reads a query and all its documents in one prompt, as jina-reranker-v3 does. Pure.

    many documents → blocks, a prompt each → a vector behind each document and one behind the query → cosines

The model looks back only: a document's vector knows the query and the documents before it, the query's knows all. So
scores depend on the order of a list and on its company, and equal documents do not score the same. Where a list takes
several prompts, their vectors of the query are averaged, each weighing as much as the best document that it found.

Prompt, limits and arithmetic are the published code's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from carpool.engine.bounds import check_text
from carpool.engine.errors import InferenceFailed, InputTooLong, InvalidInput, InvalidParameter
from carpool.engine.framed import Framed
from carpool.engine.params import Task
from carpool.engine.rerankers import instruction_of

Row = NDArray[np.float32]
Tokens = TypeVar("Tokens", list[int], int)  # the ids of a prompt, or how many tokens of it

DOCUMENT_MARK = "<|embed_token|>"
QUERY_MARK = "<|rerank_token|>"
MARKS = (DOCUMENT_MARK, QUERY_MARK)

_MOST = 125  # documents in a prompt
_SEAMS = 8  # tokens that a prompt may have beyond those of its parts, each tokenised by itself
_TINY = np.float32(1e-12)

_BEGINNING = (
    "<|im_start|>system\n"
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to "
    "the query. If the query is a question, how relevant a passage is depends on how well it answers the question. If "
    "not, try to analyze the intent of the query and assess how well each passage satisfies the intent. If an "
    "instruction is provided, you should follow the instruction when determining the ranking.<|im_end|>\n"
    "<|im_start|>user\n"
    "I will provide you with {count} passages, each indicated by a numerical identifier. Rank the passages based on "
    "their relevance to query: {query}\n"
)
_INSTRUCTION = "<instruct>\n{instruction}\n</instruct>\n"
_PASSAGE = '<passage id="{i}">\n{document}' + DOCUMENT_MARK + "\n</passage>\n"
_END = (
    "<query>\n{query}" + QUERY_MARK + "\n</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


class Words(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]: ...

    def shorten(self, texts: list[str], limit: int) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class ListPlan:
    """`prompts` to run as `task`, of `sizes[i]` documents each; all of one query, or each of its own.

    What a caller of `scoring.Plan` needs to know is called here as there.
    """

    prompts: list[Framed]
    sizes: list[int]
    one_query: bool

    @property
    def task(self) -> Task:
        return "token_embed"

    @property
    def asked(self) -> list[int]:
        """The place of each document's prompt."""
        return [i for i, size in enumerate(self.sizes) for _ in range(size)]

    def prompt_tokens(self, prompts: Seq[list[int]]) -> int:
        return sum(map(len, prompts))

    def scores(self, rows: Seq[Row], token_ids: Seq[list[int]] = ()) -> list[float]:
        """One score a document, in order, of the prompts' vectors [size + 1, D]: the documents', then the query's."""
        if any(len(row) != size + 1 for row, size in zip(rows, self.sizes, strict=True)):
            raise InferenceFailed("A prompt came back with another number of vectors than it has documents.")
        lists = [rows] if self.one_query else [[row] for row in rows]
        return [score for blocks in lists for score in list_scores(blocks)]

    def by_pair(self, prompts: Seq[Tokens]) -> list[Tokens]:
        """What `prompts` says of each document's prompt: its ids, or how many tokens."""
        return [prompts[i] for i in self.asked]

    def blame(self, error: InvalidInput) -> InvalidInput:
        """No text alone makes a prompt too long, so it is all of them that are named."""
        if error.param and error.param.startswith("input"):
            error.param = "documents"
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Listwise:
    """`longest`: tokens of a prompt. Queries and documents are cut to `max_query` and `max_document` tokens."""

    tokenizer: Words
    longest: int
    max_query: int = 512
    max_document: int = 2048

    def frames(self, pairs: Seq[tuple[str, str]], kwargs: Mapping[str, Any] | None) -> list[Framed]:
        """Each query with its document, in a prompt of their own."""
        return self.plan([query for query, _ in pairs], [document for _, document in pairs], kwargs).prompts

    def plan(
        self,
        queries: Seq[str],
        documents: Seq[str],
        kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> ListPlan:
        """One query with all documents, or each with its own. No prompt is to be longer than `limit` tokens (None, -1:
        than the model takes); `kwargs` may name an `instruction`."""
        room = self.longest if limit is None or limit < 0 else min(limit, self.longest)
        instruction = _without_marks(instruction_of(kwargs))
        asked = self._cut(list(map(_without_marks, queries)), [self.max_query] * len(queries), "queries")
        around, passage = self._around(asked, instruction)
        free = [room - own - passage - _SEAMS for own in around]  # for a document alone
        if min(free) < 1:
            _refuse(limit, room, room - min(free))
        of = [0] * len(documents) if len(queries) == 1 else range(len(documents))
        limits = [min(self.max_document, free[i]) for i in of]
        told = self._cut(list(map(_without_marks, documents)), limits, "documents")
        if len(queries) > 1:
            prompts = [
                _prompt(query, [document], instruction) for query, document in zip(asked, told, strict=True)
            ]
            return ListPlan(prompts, [1] * len(prompts), one_query=False)
        lengths = self._lengths([*told, asked[0]])
        capacity = room - 2 * lengths.pop()
        shared = blocks(lengths, capacity, self.max_document, free[0] + passage, passage)
        prompts = [_prompt(asked[0], [told[i] for i in block], instruction) for block in shared]
        return ListPlan(prompts, list(map(len, shared)), one_query=True)

    def _cut(self, texts: list[str], limits: list[int], field: str) -> list[str]:
        """The texts, each with as many of its tokens as it may have."""
        try:
            check_text(texts)
        except InvalidInput as error:
            error.param = (error.param or "").replace("input", field) or None
            raise
        cut: dict[int, Iterator[str]] = {}
        for limit in set(limits):
            alike = [text for text, own in zip(texts, limits, strict=True) if own == limit]
            cut[limit] = iter(self.tokenizer.shorten(alike, limit))
        return [next(cut[limit]) for limit in limits]

    def _around(self, queries: list[str], instruction: str) -> tuple[list[int], int]:
        """Tokens of a prompt without a document, for each query; and those around a document."""
        bare = [_text(query, [], instruction) for query in queries]
        *around, passage = self._lengths([*bare, _PASSAGE.format(i=_MOST, document="")])
        return around, passage

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer.encode(texts, add_special_tokens=False)]


def blocks(lengths: Seq[int], capacity: int, longest: int, free: int, around: int = 0) -> list[range]:
    """Which documents of `lengths` tokens share a prompt.

    The published rule: a prompt is full when it has 125 documents, or when of its `capacity` no more is left than the
    `longest` document takes. It does not count what stands `around` each; that a prompt's `free` tokens hold all of it
    is seen to here. In a small prompt half of it is kept for the next document at most.
    """
    reserve = min(longest, capacity // 2)
    found, start, used, taken = [], 0, 0, 0
    for i, length in enumerate(lengths):
        if i > start and taken + length + around > free:
            found.append(range(start, i))
            start, used, taken = i, 0, 0
        used, taken = used + length, taken + length + around
        if i + 1 - start >= _MOST or capacity - used <= reserve:
            found.append(range(start, i + 1))
            start, used, taken = i + 1, 0, 0
    if start < len(lengths):
        found.append(range(start, len(lengths)))
    return found


def list_scores(blocks: Seq[Row]) -> list[float]:
    """Cosine of each document with the query, in float32, of the blocks' vectors [n + 1, D]: documents, then query."""
    queries = np.stack([block[-1] for block in blocks])
    weights = [(1 + _cosines(block[-1], block[:-1]).max()) / 2 for block in blocks]
    query = np.average(queries, axis=0, weights=np.maximum(weights, _TINY)) if len(blocks) > 1 else queries[0]
    return [float(score) for block in blocks for score in _cosines(query, block[:-1])]


def _cosines(query: Row, documents: Row) -> Row:
    """query [D], documents [n, D] → [n]; 0 where one has no length."""
    lengths = np.linalg.norm(query) * np.linalg.norm(documents, axis=1)
    cosines: Row = (documents @ query) / np.maximum(lengths, _TINY)
    return cosines


def _prompt(query: str, documents: Seq[str], instruction: str) -> Framed:
    return Framed((_text(query, documents, instruction),), (), specials=True)


def _text(query: str, documents: Seq[str], instruction: str) -> str:
    parts = [_BEGINNING.format(count=len(documents), query=query)]
    parts += [_INSTRUCTION.format(instruction=instruction)] if instruction else []
    parts += [_PASSAGE.format(i=i, document=document) for i, document in enumerate(documents)]
    return "".join([*parts, _END.format(query=query)])


def _without_marks(text: str) -> str:
    """What the model takes for the end of a document or of the query may stand nowhere else.

    Until there is none left: taken out once, the pieces around a mark may make another.
    """
    while any(mark in text for mark in MARKS):
        for mark in MARKS:
            text = text.replace(mark, "")
    return text


def _refuse(limit: int | None, room: int, needed: int) -> None:
    if limit is None or limit < 0:
        raise InputTooLong(
            f"This model's maximum context length is {room} tokens, and the query and the prompt around it leave no "
            f"room for a document: they need more than {needed}. Please reduce the query's length.",
            "query",
        )
    raise InvalidParameter(
        f"truncate_prompt_tokens {limit} leaves no room for a query and a document: the model's prompt around them "
        f"needs more than {needed} tokens.",
        "truncate_prompt_tokens",
    )
