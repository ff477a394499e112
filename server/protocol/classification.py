"""POST /classify."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from carpool.server.decoding import RequestDecoder
from carpool.server.protocol.model_request import TextRequest
from carpool.server.protocol.usage import Usage

if TYPE_CHECKING:
    from carpool.engine.params import PoolingParams


class ClassificationRequest(TextRequest, kw_only=True, gc=False):
    """Each input gets a probability for each class; `use_activation: false` asks for logits."""

    raw_scores: bool | None = (
        None  # Infinity's word for that; where it is said, the answer has Infinity's shape
    )

    def pooling(self, dimensions: int | None = None) -> PoolingParams:
        params = super().pooling(dimensions)
        return replace(params, use_activation=False) if self.raw_scores else params


class Classification(Struct, gc=False):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassificationResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


decode_classification_request = RequestDecoder(ClassificationRequest)
