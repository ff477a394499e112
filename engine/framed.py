"""Framed: a query and a document in the words of a model's prompt, and what has to stay when it is cut. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Framed:
    """`parts` are tokenised one by one and joined: token boundaries fall where the model's authors put them.

    When the whole is too long, the parts at `yields` give way in this order, each from its end; `tail`, with which
    such a part ends, stays. `specials`: the tokenizer's own special tokens go around the whole.
    """

    parts: tuple[str, ...]
    yields: tuple[int, ...]
    tail: str = ""
    specials: bool = False
