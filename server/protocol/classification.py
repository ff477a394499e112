"""POST /classify."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from carpool.server.decoding import RequestDecoder
from carpool.server.protocol.model_request import TextRequest
from carpool.server.protocol.usage import Usage


class ClassificationRequest(TextRequest, kw_only=True, gc=False):
    """Each input gets a probability for each class; `use_activation: false` asks for logits."""


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
