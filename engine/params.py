"""What a caller may ask of one request: the task, how the text is cut, how the vectors are finished."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from carpool.engine.errors import InvalidInput, InvalidParameter

Task = Literal["embed", "token_embed", "sparse_embed", "classify", "token_classify"]
Side = Literal["left", "right"]
Padding = Literal["max_length", "do_not_pad"]
EmbedDType = Literal["float32", "float16", "bfloat16"]

_SIDES = (None, *get_args(Side))
_PADDINGS = (None, *get_args(Padding))
_EMBED_DTYPES = get_args(EmbedDType)
_SWITCH = (True, False)
_SWITCH_OR_NONE = (None, *_SWITCH)

# The parts of a chat message that are text, and where it stands in them.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
TEXT_ONLY = "This model accepts text only."


def text_of_part(part: Any, path: str) -> str:
    """The text of `{"type": "text", "text": …}` and its kin. Raises InvalidInput for images and all else."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if isinstance(kind, str):
        if kind not in TEXT_PARTS:
            raise InvalidInput(TEXT_ONLY, path)
        text = part.get(TEXT_PARTS[kind])
        if isinstance(text, str):
            return text
    raise InvalidInput(f"{path} must be a text part, with its text a string.", path)


@dataclass(frozen=True, slots=True)
class LateChunkingParams:
    """For `token_embed`: the vectors of every `chunk_size` tokens, special ones included, are averaged to one."""

    chunk_size: int

    def __post_init__(self) -> None:
        if isinstance(self.chunk_size, bool) or not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise InvalidParameter(
                f"chunk_size must be a positive integer, got {self.chunk_size!r}.", "chunk_size"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How the pooled vector is finished. Raises InvalidParameter for values of other types.

    `dimensions`: keep the first so many components (Matryoshka models only), before normalising.
    `use_activation`: None is the model's own choice; for embeddings it means L2 normalisation.
    `normalize`, `softmax` and `activation` are older names of `use_activation`.
    `embed_dtype`: what embeddings of unit length may come in, to nearest even; all other results are float32.

    The rest is for LLM, which scripts of the reference give them to; the engine never sees them:
    `task`: what the parameters are meant for; a method that does another refuses them.
    `truncate_prompt_tokens`: as the argument of that name, which wins.
    `extra_kwargs`: `max_tokens_per_query`, `max_tokens_per_doc` and `chat_template_kwargs` of a scored pair.
    `late_chunking_params`: a vector for every so many tokens in place of one for each.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    embed_dtype: EmbedDType = "float32"
    task: str | None = None
    truncate_prompt_tokens: int | None = None
    extra_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    late_chunking_params: LateChunkingParams | None = None

    def __post_init__(self) -> None:
        check_integer("dimensions", self.dimensions)
        check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
        _check_choice("embed_dtype", self.embed_dtype, _EMBED_DTYPES)
        _check_kind("extra_kwargs", self.extra_kwargs, Mapping, "a dict")
        _check_kind(
            "late_chunking_params", self.late_chunking_params, LateChunkingParams, "LateChunkingParams"
        )
        for name in ("use_activation", "normalize", "softmax", "activation"):
            value = getattr(self, name)
            _check_choice(name, value, _SWITCH_OR_NONE)
            if value is not None and self.use_activation is None:
                object.__setattr__(self, "use_activation", value)

    def clone(self) -> PoolingParams:
        """The same: parameters never change, and need no copy to be kept."""
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizationParams:
    """How a prompt becomes token ids. Raises InvalidParameter for values of other types.

    `truncate_prompt_tokens`: None refuses what is too long, -1 cuts at the model's maximum, k at k tokens.
    `truncation_side`: None keeps the special tokens and cuts on the tokenizer's own side; "right" keeps the
    first k of the whole sequence and "left" the last k, special tokens not spared.
    `max_tokens_per_query`, `max_tokens_per_doc`: of a scored pair, cut each side to so many tokens of its own; 0 is
    off.
    `prompt`: what the caller put before each text; a model whose files leave prompts out of its pooling needs to know.
    `input_type`: "query" or "document"; models of late interaction write them differently, to others it says nothing.
    `padding`: "max_length" appends the pad token, as content, up to the model's maximum (SigLIP needs it).
    """

    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None
    add_special_tokens: bool = True
    prompt: str = ""
    padding: Padding | None = None
    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0
    input_type: str | None = None

    def __post_init__(self) -> None:
        check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            check_integer(name, getattr(self, name), optional=False)
        _check_choice("truncation_side", self.truncation_side, _SIDES)
        _check_choice("padding", self.padding, _PADDINGS)
        _check_choice("add_special_tokens", self.add_special_tokens, _SWITCH)
        _check_kind("prompt", self.prompt, str, "a text", optional=False)
        _check_kind("input_type", self.input_type, str, "a text")


def check_integer(name: str, value: Any, *, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{name} must be an int, got {value!r}.", name)


def _check_kind(name: str, value: Any, kind: type, described: str, *, optional: bool = True) -> None:
    if not (isinstance(value, kind) or (value is None and optional)):
        raise InvalidParameter(f"{name} must be {described}, got {value!r}.", name)


def _check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    # An array, for one, is equal to nothing in one word.
    if (value is None or isinstance(value, str | int)) and value in choices:
        return
    *most, last = map(repr, choices)
    raise InvalidParameter(f"{name} must be {', '.join(most)} or {last}, got {value!r}.", name)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Which adapter a prompt rides on, as the reference spells it. With LLM(enable_lora=True) it is loaded when it is
    first asked for, else it must have been at start.

    Adapters are known here by `lora_name` alone; `lora_path` may be left out where it is loaded, and is checked if it
    is not. `load_inplace` reads it again, in place of what went by that name.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""
    base_model_name: str | None = None  # without effect: there is one
    load_inplace: bool = False


@dataclass(frozen=True, slots=True)
class TaskAdapter:
    """What a task of the checkpoint's own means: the adapter to ride on, and the `prompt` before each text."""

    adapter: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """Which output widths an embedding model can be cut to, and the refusals of all others.

    `size` is the native width E, `flexible` allows every width 1…E, `allowed` only those listed.
    """

    size: int
    flexible: bool = False
    allowed: tuple[int, ...] = ()

    @property
    def supported(self) -> bool:
        return self.flexible or bool(self.allowed)

    def check(self, dimensions: int | None, model: str, param: str = "dimensions") -> None:
        """Raise InvalidParameter unless `dimensions` can be served.

        `model` is the name shown to the caller, `param` what the caller calls the number.
        """
        if dimensions is None or dimensions == self.size:
            return
        if not self.supported:
            raise InvalidParameter(
                f'Model "{model}" does not support matryoshka representation, '
                "changing output dimensions will lead to poor results."
            )
        if dimensions < 1:
            raise InvalidParameter("Dimensions must be greater than 0", param)
        if dimensions > self.size:
            raise InvalidParameter(
                f'Model "{model}" only supports dimensions in the range [1, {self.size}], got {dimensions}.',
                param,
            )
        if self.allowed and dimensions not in self.allowed:
            raise InvalidParameter(
                f'Model "{model}" only supports {list(self.allowed)} matryoshka dimensions, '
                "use other output dimensions will lead to poor results.",
                param,
            )


def check_dimensions(
    dimensions: int | None, tasks: Iterable[Task], matryoshka: Matryoshka, model: str
) -> None:
    """`Matryoshka.check` for what is to be done: sparse vectors and classes have no width to ask for."""
    if {"embed", "token_embed"}.intersection(tasks):
        matryoshka.check(dimensions, model)
    elif dimensions is not None:
        raise InvalidParameter(
            "dimensions is for dense embeddings, which this task does not give.", "dimensions"
        )
