"""Workload: the texts of a benchmark, and how many real tokens they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from tokenizers import Tokenizer

from corpus import LONG, MIXED, SHORT, Spread, passages

LENGTHS = {"short": SHORT, "mixed": MIXED, "long": LONG}


@dataclass(frozen=True, slots=True)
class Workload:
    """`tokens[i]` counts text i as the model sees it: special tokens in, padding out."""

    texts: list[str]
    tokens: list[int]

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)

    def __str__(self) -> str:
        digest = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:8]
        return (
            f"{len(self.texts)} passages ({digest}), {self.total_tokens:,} tokens; a text has {min(self.tokens)} to "
            f"{max(self.tokens)}, mean {mean(self.tokens):.0f}, median {median(self.tokens):.0f}"
        )


def natural(lengths: str, count: int, model: Path, longest: int, seed: int = 0) -> Workload:
    """Passages whose lengths are those of queries (short), passages (mixed) or pages (long)."""
    return _workload(LENGTHS[lengths], count, model, longest, seed)


def equal(tokens: int, count: int, model: Path) -> Workload:
    """Passages of `tokens` tokens, or a few less where a word would have to be cut."""
    return _workload(Spread(tokens, 0.0, tokens, tokens), count, model, tokens, 0)


def _workload(spread: Spread, count: int, model: Path, longest: int, seed: int) -> Workload:
    """None over `longest` tokens, so that nobody has to truncate.

    Counted with the model's own tokenizer, the one measure for every contestant.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [_cut(tokenizer, text, longest) for text in passages(count, spread, seed)]
    return Workload(texts, [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)])


def _cut(tokenizer: Tokenizer, text: str, longest: int) -> str:
    """The text up to the last word that fits."""
    encoding = tokenizer.encode(text)
    special = sum(encoding.special_tokens_mask)
    if len(encoding.ids) <= longest:
        return text
    ends = [
        end for (_, end), mark in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not mark
    ]
    end = ends[longest - special - 1]
    return text[:end].rpartition(" ")[0] if text[end : end + 1].strip() else text[:end]
