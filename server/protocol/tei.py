"""What Text Embeddings Inference speaks: /embed and its like, /predict, /rerank with `texts`. It answers bare lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from carpool.engine.params import PoolingParams, TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Input
from carpool.server.protocol.model_request import CacheSalt, Priority

Direction = Literal["Left", "Right", "left", "right"]


class TeiRequest(Struct, kw_only=True, gc=False):
    """`model`, `priority`, `request_id` and `cache_salt` are no fields of TEI's and taken all the same."""

    model: str | None = None
    priority: Priority | None = None
    request_id: str | None = None
    cache_salt: CacheSalt | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None

    def tokenization(self) -> TokenizationParams:
        left = self.truncation_direction in ("Left", "left")
        return TokenizationParams(
            truncate_prompt_tokens=-1 if self.truncate else None,
            truncation_side="left" if left and self.truncate else None,
        )


class TeiInputsRequest(TeiRequest, kw_only=True, gc=False):
    inputs: Input
    prompt_name: str | None = None  # one of the model's own prompts, put before each text

    def prompt(self, prompts: Mapping[str, str]) -> str:
        if self.prompt_name is None:
            return ""
        if self.prompt_name not in prompts:
            known = f"it has {', '.join(sorted(prompts))}" if prompts else "it has none"
            raise InvalidRequest(f"The model has no prompt '{self.prompt_name}': {known}.", "prompt_name")
        return prompts[self.prompt_name]

    def pooling(self) -> PoolingParams:
        return PoolingParams()


class TeiEmbedRequest(TeiInputsRequest, kw_only=True, gc=False):
    normalize: bool | None = None  # by default true
    dimensions: int | None = None

    def pooling(self) -> PoolingParams:
        return PoolingParams(dimensions=self.dimensions, use_activation=self.normalize is not False)


class TeiPredictRequest(TeiRequest, kw_only=True, gc=False):
    """`inputs`: a text; two texts, which are a pair; or a list of [text] and [text, text]."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and any(isinstance(item, list) for item in self.inputs)

    def pairs(self) -> list[tuple[str, str]]:
        """Each input as a pair; the second text is empty where there is only one."""
        if isinstance(self.inputs, str):
            return [(self.inputs, "")]
        if not self.is_batch:
            return [_pair(self.inputs, "inputs")]
        return [
            _pair(item if isinstance(item, list) else [item], f"inputs[{index}]")
            for index, item in enumerate(self.inputs)
        ]

    def pooling(self) -> PoolingParams:
        return PoolingParams(use_activation=False if self.raw_scores else None)


def _pair(texts: Sequence[str | list[str]], path: str) -> tuple[str, str]:
    match texts:
        case [str(text)]:
            return text, ""
        case [str(first), str(second)]:
            return first, second
    raise InvalidRequest(f"{path} must hold one text, or two to be judged together.", path)


class TeiRerankRequest(TeiRequest, kw_only=True, gc=False):
    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None

    def pooling(self) -> PoolingParams:
        return PoolingParams(use_activation=False if self.raw_scores else None)


class TeiPrediction(Struct, gc=False):
    score: float
    label: str


class TeiWeight(Struct, gc=False):
    """What a text weighs in one entry of the vocabulary."""

    index: int
    value: float


class TeiRank(Struct, gc=False):
    index: int
    score: float
    text: str | UnsetType = UNSET


decode_tei_embed_request = RequestDecoder(TeiEmbedRequest)
decode_tei_inputs_request = RequestDecoder(TeiInputsRequest)
decode_tei_predict_request = RequestDecoder(TeiPredictRequest)
decode_tei_rerank_request = RequestDecoder(TeiRerankRequest)
