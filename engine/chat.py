"""ChatTemplate: conversations and scored pairs to text, by the model's Jinja template or the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from carpool.engine.errors import ConfigError, InvalidInput
from carpool.engine.tokenizer import load_fast

Message = Mapping[str, Any]  # {"role": …, "content": text or list of parts}

_RESERVED = frozenset({"chat_template", "tools", "tokenize", "messages", "conversation"})


class ChatTemplate:
    """Renders messages with transformers' sandboxed Jinja. Usable from any thread."""

    def __init__(self, tokenizer: Any, template: str | None, given: bool) -> None:
        """`tokenizer`: a transformers one. `given`: the template is the user's own (--chat-template)."""
        self._tokenizer = tokenizer
        self._template = template
        self.given = given
        # Some templates walk a message's parts themselves; all others want its text.
        self._wants_parts = bool(
            template and re.search(r"for \w+ in (message|m)(\.content|\[.content.\])", template)
        )

    @classmethod
    def load(cls, path: Path, template: str | None, *, trust_remote_code: bool) -> ChatTemplate:
        """`template` is Jinja or a file of it; None takes the one the tokenizer brings, if any."""
        return cls.of(load_fast(path, trust_remote_code=trust_remote_code), template)

    @classmethod
    def of(cls, tokenizer: Any, template: str | None) -> ChatTemplate:
        """As `load`, with a tokenizer of transformers that is loaded already."""
        own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        return cls(tokenizer, _read(template) if template else own, bool(template))

    def replaced(self, template: str) -> ChatTemplate:
        """The same with a Jinja template (never a file's name) that comes with one call."""
        return ChatTemplate(self._tokenizer, template, True)

    @property
    def present(self) -> bool:
        """Whether conversations can be rendered."""
        return self._template is not None

    def render(
        self,
        messages: Seq[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """One conversation as text. Raises InvalidInput if there is no template or it does not fit."""
        if self._template is None:
            raise InvalidInput(
                "This model has no chat template: send text, or start the server with --chat-template.",
                "messages",
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidInput(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                "continue_final_message",
            )
        if not messages:
            raise InvalidInput("messages must not be empty.", "messages")
        shaped = [self._shape(message, i) for i, message in enumerate(messages)]
        return self._apply(
            shaped,
            _allowed(kwargs),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def render_pair(self, query: str, document: str, kwargs: Mapping[str, Any] | None) -> str:
        """A query and a document to be scored, as the user's template asks a model to judge them."""
        assert self.given, "the tokenizer's own chat template is not meant for scoring"
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return self._apply(messages, _allowed(kwargs))

    def _apply(self, messages: Seq[Message], kwargs: Mapping[str, Any], **options: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, **options, **kwargs
            )
        except Exception as error:  # a template raises what it likes, mostly jinja2.TemplateError
            raise InvalidInput(
                f"The chat template does not take these messages: {error}", "messages"
            ) from error
        return text

    def _shape(self, message: Message, index: int) -> Message:
        """The message with its content as the template wants it."""
        content = message.get("content")
        if isinstance(content, str):
            return message
        texts = [text_of(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content or ())]
        if self._wants_parts:
            return {**message, "content": [{"type": "text", "text": text} for text in texts]}
        return {**message, "content": "\n".join(texts)}


def text_of(part: Any, param: str) -> str:
    """The text of one content part. Raises InvalidInput for every other kind."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text"):
        if isinstance(part.get("text"), str):
            return str(part["text"])
        raise InvalidInput(f"{param}.text must be a string.", param)
    if isinstance(part, Mapping) and isinstance(part.get("type"), str):
        raise InvalidInput("This model accepts text only.", param)
    raise InvalidInput(f"{param} must be a text part.", param)


def _allowed(kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name in kwargs or ():
        if name in _RESERVED:
            raise InvalidInput(f"chat_template_kwargs must not set {name}.", "chat_template_kwargs")
    return kwargs or {}


def _read(template: str) -> str:
    """A file's text, or the template itself when it is plainly one."""
    if any(mark in template for mark in "{}\n"):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--chat-template {template}: there is no such file ({error.strerror}).") from error
