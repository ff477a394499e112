"""POST /score: pairs of texts, under any of four pairs of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from msgspec import Struct

from carpool.engine.params import TokenizationParams, text_of_part
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_text
from carpool.server.protocol.model_request import ModelRequest
from carpool.server.protocol.usage import Usage

ScoreItem = str | dict[str, Any]  # a text, or {"content": [{"type": "text", "text": …}, …]}
ScoreItems = str | dict[str, Any] | list[ScoreItem]

NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


class PairRequest(ModelRequest, kw_only=True, gc=False):
    """What /score and /rerank share. `instruction` and `chat_template_kwargs` go to a score template."""

    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def tokenization(self) -> TokenizationParams:
        return replace(
            super().tokenization(),
            max_tokens_per_query=self.max_tokens_per_query or 0,
            max_tokens_per_doc=self.max_tokens_per_doc or 0,
        )

    def template_kwargs(self) -> Mapping[str, Any]:
        own = {} if self.instruction is None else {"instruction": self.instruction}
        return own | (self.chat_template_kwargs or {})


class ScoreRequest(PairRequest, kw_only=True, gc=False):
    queries: ScoreItems | None = None
    documents: ScoreItems | None = None
    items: ScoreItems | None = None
    data_1: ScoreItems | None = None
    data_2: ScoreItems | None = None
    text_1: ScoreItems | None = None
    text_2: ScoreItems | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What queries and documents are called here; the first pair of names that is complete."""
        for pair in NAMES:
            if all(getattr(self, name) is not None for name in pair):
                return pair
        half = next(
            (pair for pair in NAMES if any(getattr(self, name) is not None for name in pair)), NAMES[-1]
        )
        missing = next(name for name in half if getattr(self, name) is None)
        raise InvalidRequest(f"{missing} is required: send {half[0]} and {half[1]}.", missing)

    def pairs(self) -> tuple[list[str], list[str]]:
        """Queries and documents, as texts."""
        first, second = (read_texts(getattr(self, name), name) for name in self.names)
        return first, second


class Score(Struct, gc=False):
    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


decode_score_request = RequestDecoder(ScoreRequest)


def read_texts(value: ScoreItems, path: str) -> list[str]:
    """One side of the pairs, as texts."""
    if isinstance(value, list):
        return [read_item(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return [read_item(value, path)]


def read_item(item: ScoreItem, path: str) -> str:
    """A text, or the texts of an object's parts, a line each."""
    if isinstance(item, str):
        return item
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{path} must be a text or an object with a list of parts as its content.", path)
    texts = [text_of_part(part, f"{path}.content[{index}]") for index, part in enumerate(parts)]
    return read_text("\n".join(texts), path)
