"""What requests share that run the model: which, how long, how finished, for whom; and texts or chats as input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from msgspec import Meta, Struct

from carpool.engine.errors import InputTooLong
from carpool.engine.params import TEXT_ONLY, Padding, PoolingParams, Side, TokenizationParams
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Input, read_input
from carpool.server.protocol.chat import Conversation, Messages, read_conversations, rendering

if TYPE_CHECKING:
    from carpool.engine.async_engine import Prompts

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

# Most requests ask for the same as the last one, and parameters never change.
_pooling_params = lru_cache(maxsize=256)(PoolingParams)


@lru_cache(maxsize=256)
def tokenization_params(**fields: Any) -> TokenizationParams:
    if fields["truncate_prompt_tokens"] == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens must be at least 1, or -1: 0 would leave nothing to run the model on.",
            "truncate_prompt_tokens",
        )
    return TokenizationParams(**fields)


class ModelRequest(Struct, kw_only=True, gc=False):
    """Fields of every request that runs the model."""

    remedy: ClassVar[str] = InputTooLong.REMEDY
    model: str | None = None
    user: str | None = None  # accepted and forgotten
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side | None = None
    padding: Padding | None = None
    use_activation: bool | None = None
    normalize: bool | None = None
    softmax: bool | None = None
    activation: bool | None = None
    priority: Priority | None = None
    request_id: str | None = None
    cache_salt: CacheSalt | None = None  # only requests with the same one share what is computed
    mm_processor_kwargs: Any = None

    def pooling(self, dimensions: int | None = None) -> PoolingParams:
        if self.mm_processor_kwargs:
            raise InvalidRequest(TEXT_ONLY, "mm_processor_kwargs")
        return _pooling_params(
            dimensions=dimensions,
            use_activation=self.use_activation,
            normalize=self.normalize,
            softmax=self.softmax,
            activation=self.activation,
        )

    def tokenization(self) -> TokenizationParams:
        return tokenization_params(
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            padding=self.padding,
        )


class TextRequest(ModelRequest, kw_only=True, gc=False):
    """A request whose `input`, or chat `messages`, each get a result. `messages` win where both are given."""

    input: Input | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # by default true for input, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None  # refused: a template is code
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: Any = None

    @property
    def field(self) -> str:
        """Where the texts stand."""
        return "input" if self.messages is None else "messages"

    @property
    def is_chat(self) -> bool:
        return self.messages is not None or _holds_chats(self.input)

    def prompts(self) -> Prompts:
        """`input` as the list of prompts it stands for: texts, or lists of token ids."""
        if self.input is None:
            raise InvalidRequest("input is required.", "input")
        return read_prompts(self.input, "input")

    def conversations(self) -> list[Conversation]:
        """`messages`, or chats in `input`, as conversations."""
        if self.messages is not None:
            return read_conversations(self.messages, "messages")
        return read_conversations(self.input, "input")

    def rendering(self) -> Mapping[str, Any]:
        return rendering(self)

    def tokenization(self) -> TokenizationParams:
        special = self.add_special_tokens
        return tokenization_params(
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            add_special_tokens=not self.is_chat if special is None else special,
            padding=self.padding,
        )


def read_prompts(value: Input, path: str) -> Prompts:
    """A field of the type Input as the list of prompts it stands for: texts, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest("You must pass at least one prompt", path)
    shape = _shape(value)
    if shape is None:
        value = cast(
            "list[Any]", read_input(value, path)
        )  # reads [1, "2"]; names the first that does not fit
        shape = _shape(value)
    if shape is None:
        raise InvalidRequest(f"{path} must be texts or token ids here, not chat messages.", path)
    return cast("Prompts", [value] if shape is int else value)  # of one type, which no type checker can see


def _shape(items: list[Any]) -> type | None:
    """str, int, or list for lists of integers; None if they are of several types or of another."""
    kinds = set(map(type, items))
    if kinds == {list} and set(map(type, chain.from_iterable(items))) <= {int}:
        return list
    return kinds.pop() if kinds in ({str}, {int}) else None


def _holds_chats(value: Input | None) -> bool:
    """Whether a list begins with a message, or with a list that does."""
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    return isinstance(first, dict) or (isinstance(first, list) and bool(first) and isinstance(first[0], dict))
