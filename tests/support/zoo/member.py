"""Member: one family of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from carpool.engine.params import Task


class Reference(Protocol):
    """What the model answers to one prompt alone, float32: the finished result, as a client gets it by default.

    embed: [D]; token_embed: [tokens, D]; classify: [labels]; token_classify: [tokens, labels]. `types` are token
    types of a pair; `adapter` is the name of the task or LoRA adapter, None for the model as it stands.
    """

    def __call__(
        self, task: Task, ids: list[int], types: list[int] | None = None, adapter: str | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Member:
    """`name` is the published model it is shaped like, `family` the class or dialect; both appear in the table.

    `make(folder)` writes the checkpoint into an existing empty folder and returns its reference. `options` are
    fields of EngineConfig that a user would have to give; empty for nearly all.
    """

    name: str
    family: str
    make: Callable[[Path], Reference]
    tasks: tuple[Task, ...] = ("embed",)  # those that the reference answers
    adapters: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()  # what to ask it, where the usual texts would not show what it does
    pairs: bool = False  # whether its prompts are pairs of two token types
    note: str = ""
