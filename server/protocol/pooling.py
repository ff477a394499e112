"""POST /pooling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from msgspec import Struct

from carpool.engine.params import TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.protocol.formats import FormattedRequest
from carpool.server.protocol.usage import Usage

Result = list[float | list[float]] | str  # of a text, or of each token; base64 if that was asked for


class PoolingRequest(FormattedRequest, kw_only=True, gc=False):
    task: str | None = None  # the handler knows which the model has; several are joined by "&"
    input_type: str | None = None  # "query" or "document", to models that write them differently
    data: Any = None  # for plugins of the reference, which carpool has none of

    def tokenization(self) -> TokenizationParams:
        params = super().tokenization()
        return params if self.input_type is None else replace(params, input_type=self.input_type)


class Pooled(Struct, gc=False):
    index: int
    object: Literal["pooling"]
    data: Result | dict[str, Result]  # of several tasks, each by its name


class PoolingResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


decode_pooling_request = RequestDecoder(PoolingRequest)
