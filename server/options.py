"""The options, one a configuration field, and how a raw value becomes the field's; for flags and YAML alike.

A raw value is a text (flag, environment) or what YAML made of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from carpool.engine.config import EngineConfig
from carpool.engine.errors import ConfigError
from carpool.server.config import ServerConfig

C = TypeVar("C")

TRUTHS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
# The reference's: 8k is 8,000 and 8K is 8,192.
MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
MULTIPLES |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
BYTES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True)
class Option:
    """One field of a configuration, as users name it and as they write its values."""

    name: str
    type: Any  # the field's, without `| None`
    default: Any
    help: str
    several: bool = False
    unit: str = ""
    shown: str = ""  # in place of the default, where that needs words
    auto: int | None = None  # what the word stands for, in place of an integer
    of: str = ""  # the flag of the object that this is a key of

    @property
    def flag(self) -> str:
        return f"{self.of}.{self.name}" if self.of else flag_of(self.name)

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def is_object(self) -> bool:
        return get_origin(self.type) is Mapping or dataclasses.is_dataclass(self.type)

    def read(self, raw: Any) -> Any:
        """The field's value; raises ConfigError with one sentence."""
        if get_origin(self.type) is Literal:
            self._expect(raw in get_args(self.type), raw, f"one of {', '.join(get_args(self.type))}")
            return raw
        if self.is_list:
            item = dataclasses.replace(self, type=get_args(self.type)[0])
            return tuple(item.read(value) for value in (raw if isinstance(raw, list) else [raw]))
        if hasattr(self.type, "parse"):
            return self.type.parse(raw)
        if isinstance(self.type, type) and dataclasses.is_dataclass(self.type):
            return build(self.type, raw, f"{self.flag} key", self.flag)
        if self.is_object:
            return raw
        if self.is_switch:
            return self._read_switch(raw)
        if self.type is int:
            return self._read_int(raw)
        if self.type is float:
            return self._read_float(raw)
        self._expect(isinstance(raw, str | int | float) and not isinstance(raw, bool), raw, "a text")
        return str(raw)

    def _read_switch(self, raw: Any) -> bool:
        value = TRUTHS.get(str(raw).lower())
        self._expect(value is not None, raw, "true or false")
        return bool(value)

    def _read_int(self, raw: Any) -> int:
        if self.auto is not None and raw == "auto":
            return self.auto
        multiples = BYTES if self.unit == "bytes" else MULTIPLES
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(raw))
        number, suffix = match.groups() if match else ("0", "?")
        if self.unit == "bytes":
            suffix = suffix.lower()
        value = Fraction(number) * multiples.get(suffix, 0)
        fits = suffix in multiples and value.denominator == 1 and (suffix or "." not in number)
        self._expect(bool(fits), raw, "a size such as 64MiB" if self.unit == "bytes" else "an integer")
        self._expect(abs(value) < 2**63, raw, "a number of 64 bits")
        return int(value)

    def _read_float(self, raw: Any) -> float:
        self._expect(not isinstance(raw, bool), raw, "a number")
        try:
            return float(raw)
        except (TypeError, ValueError):
            raise ConfigError(f"{self.flag} must be a number, got {_shown(raw)}.") from None

    def _expect(self, condition: bool, raw: Any, phrase: str) -> None:
        if not condition:
            raise ConfigError(f"{self.flag} must be {phrase}, got {_shown(raw)}.")


def _shown(raw: Any) -> str:
    """A value in a sentence; one of blanks alone, which a script's unset variable leaves, in quotes."""
    return str(raw) if str(raw).strip() else repr(raw)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was most likely meant."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def options_of(config: type, of: str = "") -> dict[str, Option]:
    """By field name. `of` is the flag, if the configuration is the value of one."""
    hints = get_type_hints(config)
    return {
        field.name: Option(
            name=field.name,
            type=_without_none(hints[field.name]),
            default=field.default,
            of=of,
            **field.metadata,
        )
        for field in dataclasses.fields(config)
        if "help" in field.metadata
    }


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        [hint] = [arg for arg in get_args(hint) if arg is not NoneType]
    return hint


def build(config: type[C], raw: Mapping[str, Any], what: str, of: str = "") -> C:
    """A configuration from raw values; null leaves the default."""
    options = options_of(config, of)
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in options:
            raise ConfigError(f"Unknown {what} {key}; did you mean {nearest(name, options)}?")
        if value is not None:
            values[name] = options[name].read(value)
    return config(**values)


def read_object(flag: str, raw: Any) -> dict[str, Any]:
    """JSON text, or what YAML made of it, as an object."""
    try:
        value = json.loads(raw) if isinstance(raw, str) else raw
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} must be a JSON object, got {_shown(raw)}.")
    return value


ENGINE_OPTIONS = options_of(EngineConfig)
SERVER_OPTIONS = options_of(ServerConfig)
OPTIONS = {**ENGINE_OPTIONS, **SERVER_OPTIONS}


def build_config(raw: Mapping[str, Any]) -> ServerConfig:
    """The whole configuration from one flat set of raw values."""
    engine = build(EngineConfig, {name: raw[name] for name in raw if name in ENGINE_OPTIONS}, "option")
    server = build(ServerConfig, {name: raw[name] for name in raw if name not in ENGINE_OPTIONS}, "option")
    return dataclasses.replace(server, engine=engine)
