"""POST /tokenize and /detokenize; and /tokenize and /decode as Text Embeddings Inference has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from carpool.server.decoding import RequestDecoder
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Input, Message, TokenId
from carpool.server.protocol.chat import Conversation, read_conversations, rendering
from carpool.server.protocol.model_request import read_prompts


class TokenizeRequest(Struct, kw_only=True, gc=False):
    """A text, or one conversation, which wins where both are given."""

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None  # by default true for a prompt, false for messages
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None  # by default true
    continue_final_message: bool | None = None
    chat_template: str | None = None  # refused: a template is code
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: Any = None
    tools: list[dict[str, Any]] | None = None  # that the template is to tell of
    inputs: Any = None  # in place of prompt and messages: a request to TEI, read by another struct

    @property
    def is_teis(self) -> bool:
        return self.prompt is None and self.messages is None and self.inputs is not None

    def text(self) -> str:
        if self.prompt is None:
            raise InvalidRequest("prompt is required.", "prompt")
        self.functions()  # which a prompt has no use for, but wrong ones are wrong
        return self.prompt

    def conversation(self) -> Conversation:
        [conversation] = read_conversations(self.messages, "messages")
        return conversation

    def rendering(self) -> Mapping[str, Any]:
        return {**rendering(self, add_generation_prompt=True), "tools": self.functions() or None}

    def functions(self) -> list[dict[str, Any]]:
        """The tools as templates get them."""
        return [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ())]

    @property
    def specials(self) -> bool:
        return self.messages is None if self.add_special_tokens is None else self.add_special_tokens


def _read_tool(tool: dict[str, Any], path: str) -> dict[str, Any]:
    """A function as templates get it from the reference: whole, with null for what was not said."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidRequest(f"{path} must be a function, with its facts in `function`.", path)
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}.function.name must be a string.", f"{path}.function.name")
    return {
        **tool,
        "type": "function",
        "function": {"name": None, "description": None, "parameters": None, **function},
    }


class DetokenizeRequest(Struct, kw_only=True, gc=False):
    tokens: list[TokenId]
    model: str | None = None


class TeiTokenizeRequest(Struct, kw_only=True, gc=False):
    inputs: str | list[str]
    add_special_tokens: bool | None = None  # by default true
    prompt_name: str | None = None
    model: str | None = None

    def texts(self) -> list[str]:
        if self.inputs == []:
            raise InvalidRequest("inputs must hold at least one text.", "inputs")
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class TeiDecodeRequest(Struct, kw_only=True, gc=False):
    """`ids`: one text's, or a list of several texts'."""

    ids: Input
    skip_special_tokens: bool | None = None  # by default true
    model: str | None = None

    def texts(self) -> list[list[int]]:
        """The token ids of each text."""
        texts: list[Any] = [*read_prompts(self.ids, "ids")]
        if any(isinstance(token_ids, str) or min(token_ids, default=0) < 0 for token_ids in texts):
            raise InvalidRequest("ids must be token ids, or lists of them, of at least 0.", "ids")
        return texts


class TeiToken(Struct, gc=False):
    """`start` and `stop` count the bytes of the text's UTF-8; special tokens stand nowhere in it."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TokenizeResponse(Struct, gc=False):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Struct, gc=False):
    prompt: str


decode_tokenize_request = RequestDecoder(TokenizeRequest)
decode_detokenize_request = RequestDecoder(DetokenizeRequest)
decode_tei_tokenize_request = RequestDecoder(TeiTokenizeRequest)
decode_tei_decode_request = RequestDecoder(TeiDecodeRequest)
