"""Every struct on the wire, and the decoder of each request.

In requests null means absent, so each optional field is `T | None`; unknown fields are ignored. The
`description` of a bound completes the sentence "{field} must be …".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from msgspec import Meta, Raw, Struct

from carpool.engine.params import Padding, PoolingParams, Side, TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Input, TokenId, read_input

if TYPE_CHECKING:
    from carpool.engine.async_engine import Prompts

EncodingFormat = Literal["float", "base64", "bytes", "bytes_only"]
EmbedDType = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
Endianness = Literal["native", "big", "little"]

Priority = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="an integer of 64 bits")]
Truncation = Annotated[int, Meta(ge=-1, description="an integer of at least -1")]
CacheSalt = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        pattern=r"^[^@/\\\x00]*$",
        description="1 to 128 characters without @, /, \\ and NUL",
    ),
]


class PoolingRequest(Struct, kw_only=True, gc=False):
    """What all requests share that run texts through the model."""

    input: Input | None = None
    messages: Any = None
    model: str | None = None
    user: str | None = None  # accepted and forgotten
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None
    add_special_tokens: bool | None = None
    padding: Padding | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    priority: Priority | None = None
    request_id: str | None = None
    cache_salt: CacheSalt | None = None  # names a prefix cache, which an encoder does not have
    mm_processor_kwargs: Any = None

    def prompts(self, token_ids_allowed: bool = True) -> Prompts:
        """`input` as the list of prompts it stands for: texts, or lists of token ids."""
        prompts = self.input
        if prompts is None:
            raise _no_input(self.messages)
        if self.mm_processor_kwargs:
            raise InvalidRequest("This model accepts text only.", "mm_processor_kwargs")
        if isinstance(prompts, str):
            return [prompts]
        if len(set(map(type, prompts))) > 1:
            prompts = read_input(prompts, "input")  # names the first that does not fit
        match prompts:
            case []:
                raise InvalidRequest("You must pass at least one prompt", "input")
            case [str(), *_]:
                pass
            case _ if not token_ids_allowed:
                raise InvalidRequest("This server takes texts, not token ids (--no-token-id-input).", "input")
            case [int(), *_]:
                return cast("Prompts", [prompts])
        return cast("Prompts", prompts)  # of one type throughout, which no type checker can see

    def pooling(self) -> PoolingParams:
        return PoolingParams(
            dimensions=self.dimensions,
            use_activation=self.use_activation,
            normalize=self.normalize,
            softmax=self.softmax,
            activation=self.activation,
        )

    def tokenization(self) -> TokenizationParams:
        return TokenizationParams(
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            add_special_tokens=self.add_special_tokens is not False,
            padding=self.padding,
        )


class EmbeddingRequest(PoolingRequest, kw_only=True, gc=False):
    encoding_format: EncodingFormat | None = None
    embed_dtype: EmbedDType | None = None
    endianness: Endianness | None = None


class TokenizeRequest(Struct, kw_only=True, gc=False):
    prompt: str | None = None
    messages: Any = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def text(self) -> str:
        if self.prompt is None:
            raise _no_input(self.messages, "prompt")
        return self.prompt


class DetokenizeRequest(Struct, kw_only=True, gc=False):
    tokens: list[TokenId]
    model: str | None = None


def _no_input(messages: Any, field: str = "input") -> InvalidRequest:
    if messages is None:
        return InvalidRequest(f"{field} is required.", field)
    return InvalidRequest(f"This server does not take chat messages; send the text as {field}.", "messages")


decode_embedding_request = RequestDecoder(EmbeddingRequest)
decode_tokenize_request = RequestDecoder(TokenizeRequest)
decode_detokenize_request = RequestDecoder(DetokenizeRequest)


class Usage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class EmbeddingResponse(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: Raw  # [{"index", "object": "embedding", "embedding"}, …], written by `encoding`
    usage: Usage


class VectorPlace(Struct, gc=False):
    """Where one vector lies in a binary body."""

    index: int
    embed_dtype: EmbedDType
    endianness: Endianness
    start: int
    end: int
    shape: tuple[int, ...]


class BinaryUsage(Struct, gc=False):
    prompt_tokens: int
    total_tokens: int


class BinaryMetadata(Struct, gc=False):
    """The `metadata` header of a binary answer."""

    id: str
    created: int
    model: str
    data: list[VectorPlace]
    usage: BinaryUsage


class TokenizeResponse(Struct, gc=False):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Struct, gc=False):
    prompt: str


class ModelPermission(Struct, gc=False):
    """The reference lists one; no client is known to read it."""

    id: str
    created: int
    object: Literal["model_permission"] = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(Struct, kw_only=True, gc=False):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "carpool"
    root: str
    parent: None = None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(Struct, kw_only=True, gc=False):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionResponse(Struct, gc=False):
    version: str
