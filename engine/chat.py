"""ChatTemplate: conversations and scored pairs to text, by the model's Jinja template or the user's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Any

from carpool.engine.config import ContentFormat
from carpool.engine.errors import ConfigError, InvalidInput, InvalidParameter
from carpool.engine.fast_tokenizer import load_fast
from carpool.engine.framed import Framed
from carpool.engine.params import text_of_part
from carpool.engine.rerankers import instruction_of

Message = Mapping[str, Any]  # {"role": …, "content": text or list of parts}

_RESERVED = frozenset({"chat_template", "tools", "tokenize", "messages", "conversation"})
_WALKS_PARTS = re.compile(r"\bfor\s+\w+\s+in\s+(\w+(\.content\b|\[.content.\])|content\b)")


class ChatTemplate:
    """Renders messages with transformers' sandboxed Jinja. Usable from any thread."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        *,
        content_format: ContentFormat = "auto",
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`tokenizer`: a transformers one. `kwargs`: variables of the template that a call may set otherwise."""
        self.tokenizer = tokenizer
        self._template = template
        self._content_format = content_format
        self._kwargs = kwargs or {}

    @classmethod
    def load(cls, path: Path, template: str | None, *, trust_remote_code: bool) -> ChatTemplate:
        """`template` is Jinja or a file of it; None takes the one the tokenizer brings, if any."""
        return cls.of(load_fast(path, trust_remote_code=trust_remote_code), template)

    @classmethod
    def of(cls, tokenizer: Any, template: str | None, **options: Any) -> ChatTemplate:
        """As `load`, with a tokenizer of transformers that is loaded already."""
        _check_names(options.get("kwargs"), "--default-chat-template-kwargs", ConfigError)
        made = cls(tokenizer, _read(template) if template else _own_template(tokenizer), **options)
        if template:
            made._require_jinja()
        return made

    def _require_jinja(self) -> None:
        """Raise ConfigError if no conversation at all can be rendered."""
        try:
            self.apply([{"role": "user", "content": ""}], {})
        except InvalidInput as error:
            cause: Any = error.__cause__
            if type(cause).__name__ == "TemplateSyntaxError":  # of Jinja, which transformers brings along
                raise ConfigError(
                    f"--chat-template is no Jinja template: {str(cause.message).rstrip('.')} (line {cause.lineno})."
                ) from error

    @property
    def of_the_folder(self) -> ChatTemplate:
        """The same with the template that the tokenizer brings, if any, in place of the user's."""
        return self.replaced(_own_template(self.tokenizer))

    def replaced(self, template: str | None) -> ChatTemplate:
        """The same with another Jinja template (never a file's name)."""
        return ChatTemplate(
            self.tokenizer, template, content_format=self._content_format, kwargs=self._kwargs
        )

    def pairs_by(self, template: str) -> PairTemplate:
        """A Jinja template that comes with one call, as what pairs are put into. Raises InvalidParameter if they are
        lost in it."""
        given = self.replaced(template).for_pairs()
        if given.drops_pairs:
            raise InvalidParameter(
                "The chat template has no place for a query and a document, which are messages of these two roles.",
                "chat_template",
            )
        return given

    def for_pairs(self, **asking: Any) -> PairTemplate:
        """It as what pairs to be scored are put into; `asking` are PairTemplate's options."""
        if self._content_format != "auto":
            asking.setdefault("parts", self._content_format == "openai")
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
        tools: Seq[Mapping[str, Any]] | None = None,
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
            tools=tools,
        )

    def apply(self, messages: Seq[Message], kwargs: Mapping[str, Any], **options: Any) -> str:
        """What the template makes of the messages just as they are. Raises InvalidInput if it does not take them.

        Where both name one thing, `kwargs` win over `options`.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                **{**self._kwargs, **options, **kwargs},
            )
        except Exception as error:  # a template raises what it likes, mostly jinja2.TemplateError
            raise InvalidInput(
                f"The chat template does not take these messages: {error}", "messages"
            ) from error
        return text

    def _shape(self, message: Message, index: int) -> Message:
        """The message with its content as the template wants it."""
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content or ()
        texts = [text_of(part, f"messages[{index}].content[{i}]") for i, part in enumerate(parts)]
        if self._wants_parts:
            return {**message, "content": [{"type": "text", "text": text} for text in texts]}
        return {**message, "content": "\n".join(filter(None, texts))}

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template walks a message's parts itself, texts included; all others want its text.

        One that walks them under another name shows it by losing a plain text.
        """
        if self._content_format != "auto":
            return self._content_format == "openai"
        return bool(_WALKS_PARTS.search(self._template or "")) or (
            not self._carries(_BLANK) and self._carries([{"type": "text", "text": _BLANK}])
        )

    def _carries(self, content: Any) -> bool:
        try:
            return _BLANK in self.apply([{"role": "user", "content": content}], {})
        except InvalidInput:
            return False


class PairTemplate:
    """Asks by a Jinja template: a query and a document are messages of these two roles."""

    def __init__(
        self,
        chat: ChatTemplate,
        *,
        specials: bool = True,
        options: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        prompts: Mapping[str, str] | None = None,
        parts: bool | None = None,
        instruction_is_system: bool = False,
    ) -> None:
        """`specials`: the tokenizer's own special tokens go around what is rendered, as the reference has it.

        `options` are variables of every rendering; `parts`: the template wants content as a list of parts, or (None)
        as it is found to take it; `instruction_is_system`: an instruction is a system message as well, and `prompt` the
        one for want of another. A request may name another of `prompts` (`prompt_name`), or bring its own (`prompt`).
        """
        self._chat = chat
        self._specials = specials
        self._options = options or {}
        self._prompt = prompt
        self._prompts = prompts or {}
        self._parts = parts
        self._instruction_is_system = instruction_is_system

    def frames(self, pairs: Seq[tuple[str, str]], kwargs: Mapping[str, Any] | None) -> list[Framed]:
        """Each query with its document, and what the template puts behind both, which is not to be cut."""
        allowed = _allowed(kwargs)
        blank = self._render(_BLANK, _BLANK, allowed, self._wants_parts)
        framed = []
        for query, document in pairs:
            text = self._render(query, document, allowed, self._wants_parts)
            framed.append(Framed((text,), (0,), _common_end(text, blank), self._specials))
        return framed

    @property
    def carries_pairs(self) -> bool:
        """Whether both texts come out."""
        return self._carried(self._wants_parts) is True

    @property
    def drops_pairs(self) -> bool:
        """Whether one is lost without a word, as templates of conversations lose roles that they do not know."""
        return self._carried(self._wants_parts) is False

    @cached_property
    def _wants_parts(self) -> bool:
        if self._parts is not None:
            return self._parts
        return not self._carried(parts=False) and self._carried(parts=True) is True

    def _carried(self, parts: bool) -> bool | None:
        """Whether both texts come out; None if the template does not take a pair, or not without more."""
        pairs = ((_BLANK, _BLANK), (_OTHER, _BLANK), (_BLANK, _OTHER))
        try:
            blank, *others = (self._render(*pair, {}, parts) for pair in pairs)
        except InvalidInput:
            return None
        return blank not in others

    def _render(self, query: str, document: str, kwargs: Mapping[str, Any], parts: bool) -> str:
        system = None
        if self._instruction_is_system:
            system = self._system(kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in ("prompt", "prompt_name")}
        roles = (("system", system), ("query", query), ("document", document))
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in roles
            if text is not None
        ]
        try:
            return self._chat.apply(messages, {**self._options, **kwargs})
        except InvalidInput as error:
            error.param = "chat_template_kwargs" if kwargs else None  # no client sent these messages
            raise

    def _system(self, kwargs: Mapping[str, Any]) -> str | None:
        """What the request asks for, by the first of its words for it; else the saved prompt."""
        own, name = kwargs.get("prompt"), kwargs.get("prompt_name")
        if own is not None:
            if not isinstance(own, str):
                raise InvalidInput("prompt must be a text.", "chat_template_kwargs")
            return own or None
        if asked := instruction_of(kwargs):
            return asked
        if name is None:
            return self._prompt
        if not isinstance(name, str) or name not in self._prompts:
            known = ", ".join(sorted(self._prompts)) or "none"
            raise InvalidInput(
                f"Unsupported prompt_name {name!r}. Supported values: {known}.", "chat_template_kwargs"
            )
        return self._prompts[name]


_BLANK = "\ue000"  # a character of nobody's: what it stands in for cannot be mistaken for the template's own
_OTHER = "\ue001"  # another, as long


def _common_end(text: str, other: str) -> str:
    both = enumerate(zip(reversed(text), reversed(other), strict=False))
    same = next((i for i, (a, b) in both if a != b), min(len(text), len(other)))
    return text[len(text) - same :]


def text_of(part: Any, param: str) -> str:
    """The text of one content part, which may be a bare one. Raises InvalidInput for every other kind."""
    return part if isinstance(part, str) else text_of_part(part, param)


def _allowed(kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    _check_names(kwargs, "chat_template_kwargs", lambda words: InvalidInput(words, "chat_template_kwargs"))
    return kwargs or {}


def _check_names(names: Iterable[str] | None, where: str, error: Callable[[str], Exception]) -> None:
    """Raise it if one of the template's variables would be what is rendered, or how."""
    for name in names or ():
        if name in _RESERVED:
            raise error(f"{where} must not set {name}.")


def _own_template(tokenizer: Any) -> str | None:
    own: dict[str, str] | str | None = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own  # by name, or the only one


def _read(template: str) -> str:
    """A file's text, or the template itself when it is plainly one."""
    if any(mark in template for mark in "{}\n"):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--chat-template {template}: there is no such file ({error.strerror}).") from error
