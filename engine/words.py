"""Words: what a BERT tokenizer makes of each word, kept, so that English costs a look-up a word and not the library.

Such a tokenizer cuts a text at blanks and punctuation, and what becomes of a word depends on that word alone. Texts
with anything but plain ASCII, where cleaning and cutting have more rules, are left to the library; so is what is rare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain, islice

import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

_LONGEST_TEXT = 16_384  # characters; the library makes tokens of longer ones without keeping Python to itself
_LONGEST_WORD = 32  # characters
_MOST_WORDS = 65_536  # some 10 MB
_NEW_WORDS = 8  # of one text that are learnt: each costs a call of the library
_PARTS = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")


class Words:
    """May be used from any thread at once: of two that learn a word both are right."""

    def __init__(self, backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> None:
        """`backend` is one that `fits`; `vocabulary` is its."""
        self._backend = backend
        self._lowercase = backend.normalizer.lowercase
        # A word that is an entry of the vocabulary is its own longest piece.
        longest = min(_LONGEST_WORD, backend.model.max_input_chars_per_word)
        self._entries: Mapping[str, tuple[int, ...]] = {
            word: (token,)
            for word, token in vocabulary.items()
            if word.isascii() and word.isalnum() and len(word) <= longest
        }
        self._known: dict[str, tuple[int, ...]] = dict(self._entries)
        # Added tokens are cut out before all else; a text that may hold the beginning of one is the library's.
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        begins = {form[0] for content in added for form in (content.lower(), content.upper()) if form}
        plain = "".join(
            c for c in map(chr, range(128)) if (c.isprintable() or c in "\t\n\r") and c not in begins
        )
        self._unusual = re.compile(f"[^{re.escape(plain)}]")

    @staticmethod
    def fits(backend: tokenizers.Tokenizer) -> bool:
        """Whether the tokenizer is of the kind that this file knows."""
        parts = (
            (backend.normalizer, BertNormalizer),
            (backend.pre_tokenizer, BertPreTokenizer),
            (backend.model, WordPiece),
        )
        return all(isinstance(part, kind) for part, kind in parts)

    def encode(self, text: str) -> list[int] | None:
        """Ids of the text without special tokens; None where the library is to be asked."""
        if len(text) > _LONGEST_TEXT or self._unusual.search(text):
            return None
        words = _PARTS.findall(text.lower() if self._lowercase else text)
        try:
            return _joined(self._known, words)
        except KeyError:
            return self._learnt(words)

    def _learnt(self, words: list[str]) -> list[int] | None:
        """The same where some words are new. Of many only a few are learnt: the next such text finds fewer."""
        if len(self._known) > _MOST_WORDS:
            self._known = dict(self._entries)
        known = self._known
        new = [word for word in dict.fromkeys(words) if word not in known and len(word) <= _LONGEST_WORD]
        for word in islice(new, _NEW_WORDS):
            known[word] = tuple(self._backend.encode(word, add_special_tokens=False).ids)
        try:
            return _joined(known, words)
        except KeyError:
            return None


def _joined(known: dict[str, tuple[int, ...]], words: list[str]) -> list[int]:
    return list(chain.from_iterable(map(known.__getitem__, words)))
