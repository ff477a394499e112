"""What a caller may ask of one request: the task, how the text is cut, how the vectors are finished."""

from dataclasses import dataclass
from typing import Literal

from carpool.engine.errors import InvalidParameter

Task = Literal["embed", "token_embed", "sparse_embed", "classify", "token_classify"]
Side = Literal["left", "right"]
Padding = Literal["max_length", "do_not_pad"]
EmbedDType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How the pooled vector is finished.

    `dimensions`: keep the first so many components (Matryoshka models only), before normalising.
    `use_activation`: None is the model's own choice; for embeddings it means L2 normalisation.
    `normalize`, `softmax` and `activation` are older names of `use_activation`.
    `embed_dtype`: what embeddings of unit length may come in, to nearest even; all other results are float32.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    embed_dtype: EmbedDType = "float32"

    def __post_init__(self) -> None:
        for alias in ("normalize", "softmax", "activation"):
            value = getattr(self, alias)
            if value is not None and self.use_activation is None:
                object.__setattr__(self, "use_activation", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizationParams:
    """How a prompt becomes token ids.

    `truncate_prompt_tokens`: None refuses what is too long, -1 cuts at the model's maximum, k at k tokens.
    `truncation_side`: None keeps the special tokens and cuts on the tokenizer's own side; "right" keeps the
    first k of the whole sequence and "left" the last k, special tokens not spared.
    `max_tokens_per_query`, `max_tokens_per_doc`: of a scored pair, cut each side to so many tokens of its own; 0 is
    off.
    `prompt`: what the caller put before each text; a model whose files leave prompts out of its pooling needs to know.
    `padding`: "max_length" appends the pad token, as content, up to the model's maximum (SigLIP needs it).
    """

    truncate_prompt_tokens: int | None = None
    truncation_side: Side | None = None
    add_special_tokens: bool = True
    prompt: str = ""
    padding: Padding | None = None
    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Which adapter a prompt rides on, as the reference spells it. It must have been loaded at start.

    Adapters are known here by `lora_name` alone; `lora_path` may be left out, and is checked if it is not.
    """

    lora_name: str
    lora_int_id: int = 1
    lora_path: str = ""


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
