"""What scripts give LLM to read: prompts and texts in all the forms that they come in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from carpool.engine.chat import text_of
from carpool.engine.errors import InvalidInput
from carpool.engine.params import TEXT_ONLY

Prompt = str | list[int] | Mapping[str, Any]
ScoreInput = str | Mapping[str, Any]  # a text, or {"content": …} with a text or its parts

_FIELDS = ("prompt", "prompt_token_ids", "cache_salt")
_OF_OTHER_SENSES = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs")
_WHAT = "a prompt is a text or a list of token ids"


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Any]:
    """One prompt or many, each text, token ids, or a dict of either, as a list."""
    prompts = _plain(prompts)
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"{_WHAT}, or a list of prompts, not {type(prompts).__name__}")
    many = list(prompts)
    return [many] if many and isinstance(many[0], int) else many


def read_prompt(prompt: Any) -> str | list[int]:
    """The text or the ids; of a dict that has both, the ids."""
    if not isinstance(prompt, Mapping):
        return prompt if isinstance(prompt, str) else _ids(prompt)
    for name in prompt:
        if name in _OF_OTHER_SENSES and prompt[name]:
            raise InvalidInput(TEXT_ONLY, name)
        if name not in _FIELDS and name not in _OF_OTHER_SENSES:
            raise TypeError(f"a prompt in a dict has {', '.join(_FIELDS)}, and no {name!r}")
    if (ids := prompt.get("prompt_token_ids")) is not None:
        return _ids(ids)
    text = prompt.get("prompt")
    if not isinstance(text, str):
        raise TypeError(f"the prompt in a dict is a text, not {type(text).__name__}")
    return text


def _ids(value: Any) -> list[int]:
    value = _plain(value)
    if not isinstance(value, Seq) or isinstance(value, str | bytes):
        raise TypeError(f"{_WHAT}, not {type(value).__name__}")
    kinds = set(map(type, value))
    for other in kinds - {int, bool}:
        raise TypeError(f"{_WHAT}, not of {other.__name__}")
    return list(map(int, value)) if bool in kinds else list(value)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists of Python's own numbers and texts."""
    return value.tolist() if hasattr(value, "tolist") else value


def read_salt(prompt: Prompt) -> str | None:
    """Only prompts with the same one share what the cache holds."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is not None and not isinstance(salt, str):
        raise TypeError(f"a cache_salt is a text, not {type(salt).__name__}")
    return salt


def read_texts(items: Any, field: str) -> list[str]:
    """One side of the pairs, ScoreInput or several, as a list of texts."""
    if isinstance(items, str | Mapping):
        return [_text(items, field)]
    if isinstance(items, bytes) or not isinstance(items, Iterable):
        raise TypeError(f"{field} is a text or a list of texts, not {type(items).__name__}")
    return [_text(item, f"{field}[{i}]") for i, item in enumerate(items)]


def _text(item: Any, field: str) -> str:
    if isinstance(item, str):
        return item
    parts = item.get("content") if isinstance(item, Mapping) else None
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, Seq) or not parts:
        what = "a dict without any" if isinstance(item, Mapping) else type(item).__name__
        raise TypeError(f'{field} is a text or {{"content": […]}}, not {what}')
    return "\n".join(text_of(part, f"{field}.content") for part in parts)
