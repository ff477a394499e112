"""POST /rerank: documents in the order of their relevance. Cohere's, Jina's and Voyage's requests fit, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from carpool.engine.params import PoolingParams, TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_text
from carpool.server.protocol.cohere import ApiVersion
from carpool.server.protocol.infinity import InfinityRanked
from carpool.server.protocol.scoring import PairRequest, ScoreItem, ScoreItems, read_item
from carpool.server.protocol.usage import Usage

Count = Annotated[int, Meta(ge=0, description="an integer of at least 0")]


class RerankRequest(PairRequest, kw_only=True, gc=False):
    """The query and documents may be objects with a `text`, as Jina has them.

    `top_k` and `truncation` are Voyage's words, and nobody else's: either tells that its client is about to read the
    answer. Its Python client always says `truncation`, others at most `top_k`.
    """

    query: ScoreItem | None = None
    documents: ScoreItems | None = None
    texts: Any = None  # in place of documents: a request to TEI, read by another struct
    top_n: Count | None = None  # null and 0: all
    top_k: Count | None = None
    return_documents: bool | None = None  # by default true
    truncation: bool | None = None
    raw_scores: bool | None = None  # Infinity's; where it is said, the answer has Infinity's shape

    @property
    def is_teis(self) -> bool:
        return self.documents is None and self.texts is not None

    @property
    def is_infinitys(self) -> bool:
        return self.raw_scores is not None

    @property
    def is_voyages(self) -> bool:
        return self.truncation is not None or self.top_k is not None

    def pooling(self, dimensions: int | None = None) -> PoolingParams:
        params = super().pooling(dimensions)
        return replace(params, use_activation=False) if self.raw_scores else params

    @property
    def most(self) -> int | None:
        """How many results are wanted; None is all."""
        return self.top_n or self.top_k or None

    def query_text(self) -> str:
        if self.query is None:
            raise InvalidRequest("query is required.", "query")
        return _text(self.query, "query")

    def document_texts(self) -> list[str]:
        if self.documents is None:
            raise InvalidRequest("documents is required.", "documents")
        if isinstance(self.documents, list):
            return [_text(item, f"documents[{index}]") for index, item in enumerate(self.documents)]
        return [_text(self.documents, "documents")]

    def tokenization(self) -> TokenizationParams:
        params = super().tokenization()
        if self.truncation and params.truncate_prompt_tokens is None:
            return replace(params, truncate_prompt_tokens=-1)
        return params


def _text(item: ScoreItem, path: str) -> str:
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return read_text(item["text"], path)
    return read_item(item, path)


class Document(Struct, gc=False):
    text: str


class Ranked(Struct, gc=False):
    index: int
    document: Document | UnsetType
    relevance_score: float


class SearchUnits(Struct, frozen=True, gc=False):
    search_units: int = 1


class RerankMeta(Struct, frozen=True, gc=False):
    """What Cohere's clients look for."""

    api_version: ApiVersion = ApiVersion()
    billed_units: SearchUnits = SearchUnits()


class RerankResponse(Struct, kw_only=True, gc=False):
    """`data`: the results once more, for Voyage's clients, who look for them there."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]
    meta: RerankMeta = RerankMeta()
    data: list[InfinityRanked] | UnsetType = UNSET


decode_rerank_request = RequestDecoder(RerankRequest)
