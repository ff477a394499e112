"""Prefixes: what the prompts of one batch share, so that it is computed once.

In every layer all keys and values are written before any are read, so a prompt can use what another of its own batch
computes. The first to have a prefix computes it along with the rest of its own; those behind it compute only what is
theirs. That takes no row more than there are prompts and, where the shorter come before the longer, no block more than
once, but that each prompt computes its own last token. What is shared is full blocks, since those are what a table can
point to.
"""

from __future__ import annotations

from dataclasses import dataclass

from carpool.engine.cache.blocks import Prompt


@dataclass(frozen=True, slots=True)
class Ride:
    """The first `past` tokens of a prompt are computed by prompts before it.

    `behind` is the place of the one that has them all in its table, None if there are none.
    """

    past: int
    behind: int | None = None


class Prefixes:
    """The prefixes of the prompts that are aboard, told one after another; for pools of blocks of `block_size` tokens.

    Asking and telling take O(blocks of the prompt).
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._owner: dict[bytes, int] = {}  # of each block that the batch has: the first aboard that has it
        self._aboard = 0

    def find(self, prompt: Prompt) -> Ride:
        """Behind whom the prompt would ride if it came aboard now."""
        ride = Ride(0)
        for place, name in enumerate(prompt.hashes[: prompt.shareable(self._block_size)], 1):
            owner = self._owner.get(name)
            if owner is None:
                break
            ride = Ride(place * self._block_size, owner)
        return ride

    def add(self, prompt: Prompt, upto: int | None = None) -> int:
        """Take a prompt aboard, of which this batch computes the tokens up to `upto`, None for all; returns its place.

        What was computed of it in batches before counts too: its table has it.
        """
        place = self._aboard
        self._aboard += 1
        tokens = prompt.num_tokens if upto is None else upto
        for name in prompt.hashes[: tokens // self._block_size]:
            self._owner.setdefault(name, place)
        return place
