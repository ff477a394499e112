"""The reference's lax rules: a JSON value read as the type a field declares, or one sentence on why not.

"32", 32.0 and true pass for an integer, 32.5 does not; "false", 0 and "off" pass for a boolean; a text is
only ever a text; null means absent. What a rule leaves alone is refused by the field's own type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from carpool.server.errors import InvalidRequest

Message = dict[str, Any]  # of a chat: {"role": …, "content": …}
Input = str | list[str | int | Message | list[int | Message]]
TokenId = Annotated[int, msgspec.Meta(ge=0, description="an integer of at least 0")]
S = TypeVar("S", bound=msgspec.Struct)

MOST_DIGITS = 4300  # that Python turns into an int
INTEGER = re.compile(r"\s*[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?\s*")
BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def read_struct(kind: type[S], document: Any, path: str = "") -> S:
    """`document` as a request of this kind, or the part of one at `path`; unknown fields are none of its business."""
    if not isinstance(document, dict):
        what = path or "The body"
        raise InvalidRequest(f"{what} must be a JSON object, got {shown(document)}.", path or None)
    values = {}
    for field in fields_of(kind):
        value = document.get(field.name)
        place = f"{path}.{field.name}" if path else field.name
        if value is not None:
            values[field.name] = field.read(value, place)
        elif field.required:
            raise InvalidRequest(f"{place} is required.", place)
    return kind(**values)


class Field(NamedTuple):
    name: str
    required: bool
    read: Callable[[Any, str], Any]


@cache
def fields_of(kind: type[msgspec.Struct]) -> tuple[Field, ...]:
    return tuple(Field(f.name, f.required, _reader(f.type)) for f in msgspec.structs.fields(kind))


def _reader(declared: Any) -> Callable[[Any, str], Any]:
    """How to read a value of the declared type: `T`, `T | None`, a list of `T`; `T` bare or with bounds."""
    if declared in (Input, Input | None):
        return read_input
    if declared is Any:
        return lambda value, path: value
    if get_origin(declared) in (Union, UnionType):
        members = tuple(arg for arg in get_args(declared) if arg is not NoneType)
        return _reader(members[0]) if len(members) == 1 else _union_reader(members)
    if get_origin(declared) is list:
        read_item = _reader(*get_args(declared))
        return lambda value, path: _read_list(value, path, read_item)
    if get_origin(declared) is dict:
        return read_object
    plain, *bounds = get_args(declared) if get_origin(declared) is Annotated else (declared,)
    phrase = bounds[0].description if bounds else PHRASES.get(plain) or _choices(plain)
    coerce = COERCIONS.get(plain, _as_it_is)
    return lambda value, path: _read_scalar(value, path, declared, coerce, phrase)


def _union_reader(members: tuple[Any, ...]) -> Callable[[Any, str], Any]:
    """Of texts, objects and lists: what a value is decides which member reads it."""
    readers = {get_origin(member) or member: _reader(member) for member in members}
    *others, last = (NOUNS[kind] for kind in readers)
    phrase = f"{', '.join(others)} or {last}"

    def read(value: Any, path: str) -> Any:
        read_member = readers.get(type(value))
        if read_member is None:
            raise InvalidRequest(f"{path} must be {phrase}, got {shown(value)}.", path)
        return read_member(value, path)

    return read


def _read_scalar(value: Any, path: str, declared: Any, coerce: Callable[[Any], Any], phrase: str) -> Any:
    try:
        return msgspec.convert(coerce(value), declared)
    except UnicodeError:
        raise _not_text(path) from None
    except ValueError:  # msgspec's refusal, or more digits than Python turns into an int
        raise InvalidRequest(f"{path} must be {phrase}, got {shown(value)}.", path) from None


def _read_list(value: Any, path: str, read_item: Callable[[Any, str], Any]) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{path} must be a list, got {shown(value)}.", path)
    return [read_item(item, f"{path}[{index}]") for index, item in enumerate(value)]


def read_object(value: Any, path: str) -> dict[str, Any]:
    """A JSON object, whatever is in it."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must be an object, got {shown(value)}.", path)
    return value


def read_input(value: Any, path: str) -> Input:
    """A text, a prompt as token ids, a chat message, or a list of those. The first item says which."""
    if isinstance(value, str):
        return read_text(value, path)
    if not isinstance(value, list):
        raise InvalidRequest(
            f"{path} must be a text, a list of texts, a list of token ids or a list of those, got {shown(value)}.",
            path,
        )
    match value:
        case []:
            return []
        case [str(), *_]:
            return _read_list(value, path, read_text)
        case [dict(), *_]:
            return _read_list(value, path, read_object)
        case [list(), *_]:
            read_item = read_object if _holds_messages(value) else read_token_id
            return _read_list(value, path, lambda item, at: _read_list(item, at, read_item))
        case [int() | float(), *_]:
            return _read_list(value, path, read_token_id)
    raise InvalidRequest(
        f"{path}[0] must be a text, a token id or a list of token ids, got {shown(value[0])}.", f"{path}[0]"
    )


def _holds_messages(lists: list[Any]) -> bool:
    """Whether the first item there is, is a message and no token id."""
    return isinstance(
        next((item for inner in lists if isinstance(inner, list) for item in inner), None), dict
    )


def read_text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{path} must be a text like the items before it, got {shown(value)}.", path)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _not_text(path) from None
    return value


def read_token_id(value: Any, path: str) -> int:
    """Any integer: which of them are tokens, the engine knows."""
    number = lax_int(value)
    if type(number) is not int:
        raise InvalidRequest(f"{path} must be a token id (an integer), got {shown(value)}.", path)
    return number


def lax_int(value: Any) -> Any:
    match value:
        case bool():
            return int(value)
        case float() if value.is_integer():
            return int(value)
        case str() if len(value) <= MOST_DIGITS and INTEGER.fullmatch(value):
            return int(value.partition(".")[0])
    return value


def lax_bool(value: Any) -> Any:
    match value:
        case bool():
            return value
        case int() | float() if value in (0, 1):
            return bool(value)
        case str():
            return BOOLEANS.get(value.lower(), value)
    return value


def _text(value: Any) -> Any:
    if isinstance(value, str):
        value.encode()
    return value


def _as_it_is(value: Any) -> Any:
    return value


COERCIONS: dict[Any, Callable[[Any], Any]] = {int: lax_int, bool: lax_bool, str: _text}
PHRASES = {int: "an integer", bool: "true or false", str: "a string"}
NOUNS: dict[Any, str] = {str: "a text", dict: "an object", list: "a list"}


def _choices(literal: Any) -> str:
    *others, last = (f"'{choice}'" for choice in get_args(literal))
    return f"{', '.join(others)} or {last}" if others else last


def _not_text(path: str) -> InvalidRequest:
    return InvalidRequest(f"{path} holds half of a surrogate pair, which is no character.", path)


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, and never a whole list."""
    match value:
        case list():
            return "a list"
        case dict():
            return "an object"
        case str() if len(value) > 40:
            return json.dumps(value[:40]) + "…"
        case int() if abs(value) >= 10**40:
            return "a very large number"
    return json.dumps(value)
