"""POST /v1/embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from msgspec import Struct

from carpool.engine.params import TEXT_ONLY, PoolingParams, TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import lax_bool
from carpool.server.protocol.formats import FormattedRequest
from carpool.server.protocol.usage import Usage


class EmbeddingRequest(FormattedRequest, kw_only=True, gc=False):
    """`output_dimension`, `truncation` and `truncate` are Voyage's, NVIDIA's and Jina's words for ours.

    `modality` is Infinity's, whose clients write 0 for no `dimensions`, and NVIDIA's.
    """

    task: str | None = None  # Jina's: which of the checkpoint's own adapters; ignored where there are none
    output_dimension: int | None = None
    truncation: Any = None  # true; anything else is none of our business
    truncate: Any = None  # true or "END", "START"; anything else, too
    modality: Any = None  # "text", or NVIDIA's ["text"]
    late_chunking: bool | None = None  # Jina's, who takes the inputs for parts of one text then; refused
    # Voyage's, and Jina's and NVIDIA's: the numbers that their clients are about to read, whatever was answered.
    output_dtype: Literal["float"] | None = None
    embedding_type: Literal["float"] | None = None

    @property
    def width_field(self) -> Literal["dimensions", "output_dimension"]:
        """Which of the two counts."""
        none = self.dimensions is None or (self.modality is not None and self.dimensions == 0)
        return "output_dimension" if none else "dimensions"

    @property
    def width(self) -> int | None:
        return self.output_dimension if self.width_field == "output_dimension" else self.dimensions

    def pooling(self, dimensions: int | None = None) -> PoolingParams:
        if self.modality not in (None, "text", ["text"]):
            raise InvalidRequest(TEXT_ONLY, "modality")
        if self.late_chunking:
            raise InvalidRequest(
                "late_chunking is not served over HTTP: each input is embedded by itself.", "late_chunking"
            )
        return super().pooling(dimensions)

    def tokenization(self) -> TokenizationParams:
        params = super().tokenization()
        if params.truncate_prompt_tokens is not None:
            return params
        if self.truncate == "START":
            return replace(params, truncate_prompt_tokens=-1, truncation_side="left")
        if lax_bool(self.truncation) is True or self.truncate in (True, "END"):
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
