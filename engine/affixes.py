"""Affixes: the special tokens that a tokenizer puts around a text, or around and between a pair of texts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True, slots=True)
class Affixes:
    """Ids; `middle` stands between two texts."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    @classmethod
    def of_text(cls, backend: tokenizers.Tokenizer) -> Affixes:
        """What stands before and after a text's own ids: learned by looking at one."""
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return cls(tuple(full[:start]), tuple(full[start + len(bare) :]))
        return NONE

    @classmethod
    def of_pair(cls, backend: tokenizers.Tokenizer) -> tuple[Affixes, int | None]:
        """What stands around and between a pair, and where after the first text type 1 begins (None: nowhere)."""
        bare = backend.encode("a", add_special_tokens=False).ids
        full = backend.encode("a", "a", add_special_tokens=True)
        ids, n = full.ids, len(bare)
        starts = [i for i in range(len(ids) - n + 1) if ids[i : i + n] == bare]
        first, second = starts[0], next(i for i in starts if i >= starts[0] + n)
        affixes = cls(tuple(ids[:first]), tuple(ids[second + n :]), tuple(ids[first + n : second]))
        return affixes, full.type_ids.index(1) - (first + n) if 1 in full.type_ids else None


NONE = Affixes()
