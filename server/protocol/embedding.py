"""POST /v1/embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from msgspec import Struct

from carpool.engine.params import TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.protocol.formats import FormattedRequest
from carpool.server.protocol.usage import Usage


class EmbeddingRequest(FormattedRequest, kw_only=True, gc=False):
    """`output_dimension`, `truncation` and `truncate` are Voyage's, NVIDIA's and Jina's words for ours."""

    task: str | None = None  # Jina's: which of the checkpoint's own adapters; ignored where there are none
    output_dimension: int | None = None
    truncation: bool | None = None
    truncate: Any = None  # true or "END", "START"; anything else is none of our business

    @property
    def width(self) -> int | None:
        return self.dimensions if self.dimensions is not None else self.output_dimension

    def tokenization(self) -> TokenizationParams:
        params = super().tokenization()
        if params.truncate_prompt_tokens is not None:
            return params
        if self.truncate == "START":
            return replace(params, truncate_prompt_tokens=-1, truncation_side="left")
        if self.truncation or self.truncate in (True, "END"):
            return replace(params, truncate_prompt_tokens=-1)
        return params


class Embedding(Struct, gc=False):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str  # base64 if that was asked for


class EmbeddingResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


decode_embedding_request = RequestDecoder(EmbeddingRequest)
