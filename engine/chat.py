"""ChatTemplate: conversations and scored pairs to text, by the model's Jinja template or the user's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from carpool.engine.errors import ConfigError, InvalidInput
from carpool.engine.fast_tokenizer import load_fast
from carpool.engine.framed import Framed

Message = Mapping[str, Any]  # {"role": …, "content": text or list of parts}

_RESERVED = frozenset({"chat_template", "tools", "tokenize", "messages", "conversation"})


class ChatTemplate:
    """Renders messages with transformers' sandboxed Jinja. Usable from any thread."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        """`tokenizer`: a transformers one."""
        self._tokenizer = tokenizer
        self._template = template
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
        return cls(tokenizer, _read(template) if template else own)

    def replaced(self, template: str) -> ChatTemplate:
        """The same with a Jinja template (never a file's name) that comes with one call."""
        return ChatTemplate(self._tokenizer, template)

    def for_pairs(self, **asking: Any) -> PairTemplate:
        """It as what pairs to be scored are put into; `asking` are PairTemplate's options."""
        return PairTemplate(self, **asking)

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
        return self.apply(
            shaped,
            _allowed(kwargs),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def apply(self, messages: Seq[Message], kwargs: Mapping[str, Any], **options: bool) -> str:
        """What the template makes of the messages just as they are. Raises InvalidInput if it does not take them."""
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


class PairTemplate:
    """Asks by a Jinja template: a query and a document are messages of these two roles."""

    def __init__(
        self,
        chat: ChatTemplate,
        *,
        specials: bool = True,
        options: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        parts: bool = False,
        instruction_is_system: bool = False,
    ) -> None:
        """`specials`: the tokenizer's own special tokens go around what is rendered, as the reference has it.

        `options` are variables of every rendering; `parts`: the template wants content as a list of parts;
        `instruction_is_system`: an instruction is a system message as well, and `prompt` the one for want of another.
        """
        self._chat = chat
        self._specials = specials
        self._options = options or {}
        self._prompt = prompt
        self._parts = parts
        self._instruction_is_system = instruction_is_system

    def frames(self, pairs: Seq[tuple[str, str]], kwargs: Mapping[str, Any] | None) -> list[Framed]:
        """Each query with its document, and what the template puts behind both, which is not to be cut."""
        allowed = _allowed(kwargs)
        blank = self._render(_BLANK, _BLANK, allowed)
        framed = []
        for query, document in pairs:
            text = self._render(query, document, allowed)
            framed.append(Framed((text,), (0,), _common_end(text, blank), self._specials))
        return framed

    @property
    def carries_pairs(self) -> bool:
        """Whether both texts come out: templates of conversations drop roles that they do not know."""
        try:
            blank = self._render(_BLANK, _BLANK, {})
            return blank not in (self._render("query", _BLANK, {}), self._render(_BLANK, "document", {}))
        except InvalidInput:
            return False

    def _render(self, query: str, document: str, kwargs: Mapping[str, Any]) -> str:
        system = kwargs.get("instruction") or self._prompt if self._instruction_is_system else None
        roles = (("system", system), ("query", query), ("document", document))
        messages = [
            {"role": role, "content": self._content(text)} for role, text in roles if text is not None
        ]
        return self._chat.apply(messages, {**self._options, **kwargs})

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text


_BLANK = "\ue000"  # a character of nobody's: what it stands in for cannot be mistaken for the template's own


def _common_end(text: str, other: str) -> str:
    both = enumerate(zip(reversed(text), reversed(other), strict=False))
    same = next((i for i, (a, b) in both if a != b), min(len(text), len(other)))
    return text[len(text) - same :]


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
