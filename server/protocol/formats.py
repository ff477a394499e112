"""Ways that vectors leave: as float text, base64 or raw bytes, and of which numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from msgspec import Struct

from carpool.engine.params import PoolingParams
from carpool.server.protocol.model_request import TextRequest
from carpool.server.protocol.usage import BinaryUsage

EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
EmbedDType = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]


class FormattedRequest(TextRequest, kw_only=True, gc=False):
    """A request whose results are vectors."""

    dimensions: int | None = None
    encoding_format: EncodingFormat | None = None
    embed_dtype: EmbedDType | None = None
    endianness: Endianness | None = None

    @property
    def layout(self) -> tuple[EmbedDType, Endianness]:
        """Of base64 and bytes."""
        return self.embed_dtype or "float32", self.endianness or "native"

    def pooling(self, dimensions: int | None = None) -> PoolingParams:
        """The engine gives 16-bit numbers where they leave as they are; all others are made of float32 on the way."""
        params = super().pooling(dimensions)
        if self.encoding_format in (None, "float"):
            return params
        match self.embed_dtype:
            case "float16" | "bfloat16" as dtype:
                return replace(params, embed_dtype=dtype)
        return params


class VectorPlace(Struct, gc=False):
    """Where one result lies in a binary body."""

    index: int
    embed_dtype: EmbedDType
    endianness: Endianness
    start: int
    end: int
    shape: tuple[int, ...]


class BinaryMetadata(Struct, gc=False):
    """The `metadata` header of a binary answer."""

    id: str
    created: int
    model: str
    data: list[VectorPlace]
    usage: BinaryUsage
