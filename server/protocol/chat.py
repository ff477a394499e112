"""Chat messages: conversations to be rendered by the model's template, and what a request may say about that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from carpool.engine.params import TEXT_ONLY, text_of_part
from carpool.server.errors import InvalidRequest
from carpool.server.lax import Message, shown

Messages = list[Message | list[Message]]  # one conversation, or a list of them
Conversation = list[Message]


class ChatOptions(Protocol):
    """The fields of a request that say how its conversations are rendered."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    media_io_kwargs: Any


def read_conversations(value: Any, path: str) -> list[Conversation]:
    """One conversation or several; every message must be one that a template can work with."""
    if value and all(isinstance(item, list) for item in value):
        return [_read_conversation(item, f"{path}[{index}]") for index, item in enumerate(value)]
    return [_read_conversation(value, path)]


def _read_conversation(messages: list[Any], path: str) -> Conversation:
    if not messages:
        raise InvalidRequest(f"{path} must not be empty.", path)
    for index, message in enumerate(messages):
        _check_message(message, f"{path}[{index}]")
    return messages


def _check_message(message: Any, path: str) -> None:
    if not isinstance(message, dict):
        raise InvalidRequest(
            f"{path} must be a chat message, with a role and a content, got {shown(message)}.", path
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InvalidRequest(f"{path}.role must be a string, got {shown(role)}.", f"{path}.role")
    if not isinstance(content, str | list | None):
        raise InvalidRequest(
            f"{path}.content must be a text or a list of parts, got {shown(content)}.", f"{path}.content"
        )
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, str):
            text_of_part(part, f"{path}.content[{index}]")


def rendering(asked: ChatOptions, add_generation_prompt: bool = False) -> Mapping[str, Any]:
    """How to render, as `AsyncEngine.render` takes it. `add_generation_prompt` is the endpoint's own default."""
    if asked.chat_template is not None:
        raise InvalidRequest(
            "Refused request with untrusted chat template: start the server with --chat-template instead.",
            "chat_template",
        )
    if asked.media_io_kwargs:
        raise InvalidRequest(TEXT_ONLY, "media_io_kwargs")
    if asked.add_generation_prompt and asked.continue_final_message:
        raise InvalidRequest(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    generate = asked.add_generation_prompt
    if generate is None:
        generate = add_generation_prompt and not asked.continue_final_message
    return {
        "add_generation_prompt": generate,
        "continue_final_message": bool(asked.continue_final_message),
        "kwargs": asked.chat_template_kwargs,
    }
