"""Dialect: one row of the table of config.json files that we put into transformers' words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from carpool.engine.errors import ConfigError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """`speaks(config)` tells one by its model_type, architectures and auto_map; `translate(config)` is its meaning."""

    name: str
    speaks: Callable[[Config], bool]
    translate: Callable[[Config], dict[str, Any]]


def expect(config: Config, model: str, usual: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ConfigError if a key has a value that `model` has no counterpart for.

    `usual`: the values that it does have; None among them where a key may also be absent.
    """
    for key, values in usual.items():
        if config.get(key) not in values:
            raise ConfigError(
                f"config.json has {key} {config.get(key)!r}, and carpool's {model} knows only {values[0]!r}: "
                "this checkpoint cannot be served without the code it was published with."
            )


def renamed_classes(config: Config, prefix: str, native: str) -> list[str]:
    """`architectures` with `native` in place of a leading `prefix`; what is not called so is left alone."""
    return [
        native + name.removeprefix(prefix) if name.startswith(prefix) else name
        for name in config.get("architectures") or ()
    ]
