"""POST /v2/embed, as Cohere's second API has it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, Literal

from msgspec import UNSET, Struct, UnsetType

from carpool.engine.params import TEXT_ONLY, PoolingParams, TokenizationParams, text_of_part
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_text
from carpool.server.protocol.chat import Conversation
from carpool.server.protocol.model_request import CacheSalt, Priority, Truncation

EmbeddingType = Literal["float", "binary", "ubinary", "base64"]
Item = str | list[str]  # to embed: a text, or the texts of its parts

# Cohere's names for what checkpoints with an adapter a task call by Jina's.
TASKS = {
    "search_query": ("retrieval.query",),
    "search_document": ("retrieval.passage",),
    "clustering": ("separation",),
}

ONE_OF = "Exactly one of texts, images, or inputs must be provided, and it must be non-empty"


class CohereEmbedRequest(Struct, kw_only=True, gc=False):
    remedy: ClassVar[str] = "truncate to END or START"
    model: str | None = None
    texts: list[str] | None = None
    inputs: list[dict[str, Any]] | None = None  # {"content": [{"type": "text", "text": …}]}
    images: list[Any] | None = None
    input_type: str | None = None  # one of the model's own prompts
    embedding_types: list[EmbeddingType] | None = None
    output_dimension: int | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: Truncation | None = None
    priority: Priority | None = None
    request_id: str | None = None
    cache_salt: CacheSalt | None = None

    @property
    def types(self) -> list[EmbeddingType]:
        return self.embedding_types or ["float"]

    def items(self) -> Sequence[Item]:
        """What to embed, before any prompt."""
        given = [field for field in ("texts", "images", "inputs") if getattr(self, field) is not None]
        if len(given) != 1 or not getattr(self, given[0]):
            raise InvalidRequest(f"{ONE_OF}.", given[-1] if given else "texts")
        if self.images is not None:
            raise InvalidRequest(TEXT_ONLY, "images")
        return self.texts or [_parts_of(item, f"inputs[{i}]") for i, item in enumerate(self.inputs or ())]

    def task(self, tasks: Container[str]) -> str | None:
        """Which of the checkpoint's own tasks `input_type` means, by its own name or by Cohere's; None if none."""
        named = (self.input_type or "", *TASKS.get(self.input_type or "", ()))
        return next((name for name in named if name in tasks), None)

    def instruction(self, prompts: Mapping[str, str]) -> str:
        """The model's prompt for `input_type`; empty where none was asked for."""
        if self.input_type is None:
            return ""
        if self.input_type not in prompts:
            supported = f"Supported values: {', '.join(sorted(prompts))}."
            none = "This model does not define any input_type task instructions."
            raise InvalidRequest(
                f"Unsupported input_type '{self.input_type}'. {supported if prompts else none}", "input_type"
            )
        return prompts[self.input_type]

    def pooling(self) -> PoolingParams:
        return PoolingParams(dimensions=self.output_dimension)

    def tokenization(self, longest: int | None, add_special_tokens: bool) -> TokenizationParams:
        """`longest`: how many tokens the model embeds at most; None is any number."""
        limit = -1 if self.max_tokens is None else self.max_tokens
        if self.truncate != "NONE" and (limit == 0 or (longest is not None and limit > longest)):
            most = "" if longest is None else f" and at most {longest}, what the model takes"
            raise InvalidRequest(f"max_tokens must be at least 1{most}, or -1; got {limit}.", "max_tokens")
        return TokenizationParams(
            truncate_prompt_tokens=None if self.truncate == "NONE" else limit,
            truncation_side="left" if self.truncate == "START" else None,
            add_special_tokens=add_special_tokens,
        )


def _parts_of(item: Mapping[str, Any], path: str) -> list[str]:
    parts = item.get("content")
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{path}.content must be a list of parts.", f"{path}.content")
    places = [f"{path}.content[{index}]" for index in range(len(parts))]
    return [read_text(text_of_part(part, at), at) for part, at in zip(parts, places, strict=True)]


def conversation(instruction: str, item: Item) -> Conversation:
    """What to embed and, if anything, what is to be done with it, for models that have a chat template."""
    said = {"role": "user", "content": item}
    return [{"role": "system", "content": instruction}, said] if instruction else [said]


class ApiVersion(Struct, frozen=True, gc=False):
    version: str = "2"


class EmbedUnits(Struct, gc=False):
    input_tokens: int
    image_tokens: int = 0


class EmbedMeta(Struct, gc=False):
    api_version: ApiVersion
    billed_units: EmbedUnits


class EmbeddingsByType(Struct, rename={"floats": "float"}, kw_only=True, gc=False):
    """Only the types that were asked for are there."""

    floats: list[list[float]] | UnsetType = UNSET
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET
    base64: list[str] | UnsetType = UNSET


class CohereEmbedResponse(Struct, kw_only=True, gc=False):
    id: str
    embeddings: EmbeddingsByType
    texts: list[str] | UnsetType = UNSET
    meta: EmbedMeta
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"


decode_cohere_embed_request = RequestDecoder(CohereEmbedRequest)
