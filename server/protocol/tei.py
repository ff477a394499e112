"""What Text Embeddings Inference speaks: /embed and its like, /predict, /rerank with `texts`. It answers bare lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from carpool.engine.params import PoolingParams, TokenizationParams
from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Input, read_struct
from carpool.server.protocol.model_request import CacheSalt, Priority, Truncation, tokenization_params

Direction = Literal["Left", "Right", "left", "right"]


class TeiRequest(Struct, kw_only=True, gc=False):
    """TEI knows no `model`, `priority`, `request_id`, `cache_salt`, `truncate_prompt_tokens`; they are taken too."""

    remedy: ClassVar[str] = "truncate to true"
    model: str | None = None
    priority: Priority | None = None
    request_id: str | None = None
    cache_salt: CacheSalt | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    truncate_prompt_tokens: Truncation | None = None

    def tokenization(self) -> TokenizationParams:
        most = self.truncate_prompt_tokens
        if most is None and self.truncate:
            most = -1
        left = most is not None and self.truncation_direction in ("Left", "left")
        return tokenization_params(truncate_prompt_tokens=most, truncation_side="left" if left else None)


def prompt_of(name: str | None, prompts: Mapping[str, str]) -> str:
    """What the model's own prompt of that name puts before each text."""
    if name is None:
        return ""
    if name not in prompts:
        known = f"it has {', '.join(sorted(prompts))}" if prompts else "it has none"
        raise InvalidRequest(f"The model has no prompt '{name}': {known}.", "prompt_name")
    return prompts[name]


class TeiInputsRequest(TeiRequest, kw_only=True, gc=False):
    inputs: Input
    prompt_name: str | None = None  # one of the model's own prompts, put before each text

    def pooling(self) -> PoolingParams:
        return PoolingParams()


class TeiEmbedRequest(TeiInputsRequest, kw_only=True, gc=False):
    normalize: bool | None = None  # by default true
    dimensions: int | None = None

    def pooling(self) -> PoolingParams:
        return PoolingParams(dimensions=self.dimensions, use_activation=self.normalize is not False)


class TeiSentences(Struct, gc=False):
    source_sentence: str
    sentences: list[str]


class TeiSimilarityParameters(Struct, gc=False):
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class TeiSimilarityRequest(TeiRequest, kw_only=True, gc=False):
    """One text and those that it is compared with; TEI says how in an object of its own."""

    inputs: dict[str, Any]
    parameters: dict[str, Any] | None = None

    def as_inputs(self) -> TeiEmbedRequest:
        """The request for the vectors of all texts, the source's first."""
        given = read_struct(TeiSentences, self.inputs, "inputs")
        if not given.sentences:
            raise InvalidRequest("inputs.sentences must hold at least one text.", "inputs.sentences")
        how = read_struct(TeiSimilarityParameters, self.parameters or {}, "parameters")
        return TeiEmbedRequest(
            inputs=[given.source_sentence, *given.sentences],
            prompt_name=how.prompt_name,
            model=self.model,
            priority=self.priority,
            request_id=self.request_id,
            cache_salt=self.cache_salt,
            truncate=self.truncate if how.truncate is None else how.truncate,
            truncation_direction=how.truncation_direction or self.truncation_direction,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )


class TeiPredictParameters(Struct, gc=False):
    """What clients of transformers' pipelines put beside the text."""

    top_k: Annotated[int, Meta(ge=1, description="an integer of at least 1")] | None = None
    function_to_apply: str | None = None
    candidate_labels: Any = None


class TextPair(Struct, gc=False):
    """A pair as pipelines of transformers take it."""

    text: str
    text_pair: str | None = None


class TeiPredictRequest(TeiRequest, kw_only=True, gc=False):
    """`inputs`: a text; two texts, which are a pair; or a list of [text], [text, text] and objects for a TextPair.

    `parameters`, even if empty, makes it a request to a pipeline of transformers, to which texts in a list are so many
    inputs, and which answers a text with a list of one list of classes.
    """

    inputs: str | dict[str, Any] | list[str | list[str] | dict[str, Any]]
    raw_scores: bool | None = None
    parameters: dict[str, Any] | None = None

    @property
    def is_batch(self) -> bool:
        if not isinstance(self.inputs, list):
            return False
        return self.parameters is not None or not all(isinstance(item, str) for item in self.inputs)

    def pairs(self) -> list[tuple[str, str]]:
        """Each input as a pair; the second text is empty where there is only one."""
        if self.inputs == []:
            raise InvalidRequest("You must pass at least one prompt", "inputs")
        if not self.is_batch:
            return [_pair(self.inputs, "inputs")]
        return [_pair(item, f"inputs[{index}]") for index, item in enumerate(self.inputs)]

    @property
    def is_bare(self) -> bool:
        """Whether the only answer comes without a list around it."""
        return not self.is_batch and self.parameters is None

    def how(self) -> TeiPredictParameters:
        how = read_struct(TeiPredictParameters, self.parameters or {}, "parameters")
        if how.candidate_labels is not None:
            raise InvalidRequest(
                "Texts are classified by the model's own classes here, not by candidate_labels.",
                "parameters.candidate_labels",
            )
        if how.function_to_apply not in (None, "default", "none"):
            raise InvalidRequest(
                "function_to_apply must be none, or left out for the model's own activation.",
                "parameters.function_to_apply",
            )
        return how

    def pooling(self) -> PoolingParams:
        raw = self.raw_scores or self.how().function_to_apply == "none"
        return PoolingParams(use_activation=False if raw else None)


def _pair(item: Any, path: str) -> tuple[str, str]:
    match item:
        case str(text) | [str(text)]:
            return text, ""
        case [str(first), str(second)]:
            return first, second
        case dict():
            pair = read_struct(TextPair, item, path)
            return pair.text, pair.text_pair or ""
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
decode_tei_similarity_request = RequestDecoder(TeiSimilarityRequest)
decode_tei_predict_request = RequestDecoder(TeiPredictRequest)
decode_tei_rerank_request = RequestDecoder(TeiRerankRequest)
