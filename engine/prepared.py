"""Prepared: prompts as token ids, fit to run. Pure."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from carpool.engine.cache.blocks import Prompt


@dataclass(slots=True)
class Prepared:
    """`prompts[i]` is what the cache of keys and values is told of prompt i; None if nothing.

    `type_starts[i]` is where tokens of type 1 begin in prompt i (the second text of a pair); None if nowhere.

    `unseen[i]` is from where on tokens of prompt i look and are not looked at (an expanded query's); None if nowhere.
    """

    token_ids: list[list[int]]
    type_starts: list[int | None] | None = None
    unseen: list[int | None] | None = None
    skip: int = 0  # tokens at the beginning of each that are not pooled
    prompts: Seq[Prompt | None] | None = None
    keys: Seq[bytes] = ()  # of the rows asked for, task by task of each prompt in turn; () to share none
