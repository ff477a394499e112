"""Dialect: one row of the table of config.json files that we put into transformers' words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dialect:
    """`speaks(config)` tells one by its model_type, architectures and auto_map; `translate(config)` is its meaning."""

    name: str
    speaks: Callable[[Config], bool]
    translate: Callable[[Config], dict[str, Any]]
