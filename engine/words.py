"""Words: what a BERT tokenizer makes of each word, kept, so that English costs a look-up a word and not the library.

Such a tokenizer cuts a text at blanks and punctuation, and what becomes of a word depends on that word alone. Beyond
ASCII it is asked about each letter and sign of European print; texts with anything else, where cleaning and cutting
have more rules, are left to the library, and so is what is rare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain, islice

import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

_LONGEST_TEXT = 16_384  # characters; the library makes tokens of longer ones without keeping Python to itself
_LONGEST_WORD = 32  # characters
_MOST_WORDS = 65_536  # some 10 MB
_NEW_WORDS = 8  # of one text that are learnt: each costs a call of the library
_BLANKS = " \t\n\r"
_ASCII = "".join(filter(str.isprintable, map(chr, range(128)))).replace(" ", "")
# Latin letters with their accents and signs; dashes, quotation marks and what else is printed between words.
_PRINT = "".join(map(chr, chain(range(0xA0, 0x180), range(0x2010, 0x2028), range(0x2030, 0x205F))))


class Words:
    """May be used from any thread at once: of two that learn a word both are right."""

    def __init__(self, backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> None:
        """`backend` is one that `fits`; `vocabulary` is its own, with added tokens."""
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
        normal = backend.normalizer.normalize_str
        added = backend.get_added_tokens_decoder().values()
        # A token that is looked for in cleaned text may come to be by the cleaning, which takes accents away.
        print_too = not any(token.normalized for token in added)
        inside, alone, between = _kinds(backend, _ASCII + (_PRINT if print_too else ""))
        self._parts = re.compile(f"[{re.escape(inside)}]+|[{re.escape(alone)}]")
        self._unusual = re.compile(f"[^{re.escape(inside + alone + between)}]")
        forms = {form for token in added for form in (token.content, normal(token.content))}
        self._added = _any_of({form.lower() for form in forms if form})

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
        lower = text.lower()
        # Added tokens are cut out before all else, whatever stands around them.
        if self._added.search(lower):
            return None
        words = self._parts.findall(lower if self._lowercase else text)
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


def _kinds(backend: tokenizers.Tokenizer, characters: str) -> tuple[str, str, str]:
    """Those of the characters that stand inside words, those that are a word each, and blanks, as the tokenizer has it.

    Left out are those that it treats in any other way, or not as it does their lower case.
    """
    inside, alone, between = "", "", _BLANKS
    normal = backend.normalizer.normalize_str
    for character in characters:
        own = normal(character)
        if backend.normalizer.lowercase:
            lower = character.lower()
            if lower not in characters or normal(lower) != own:
                continue
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(f"a{own}b")]
        if pieces == [f"a{own}b"]:
            inside += character
        elif pieces == ["a", own, "b"]:
            alone += character
        elif pieces == ["a", "b"]:
            between += character
    return inside, alone, between


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the contents; a blank in one of them is any blank."""
    forms = (r"\s".join(map(re.escape, re.split(r"\s", content))) for content in sorted(contents))
    return re.compile("|".join(forms) or "(?!)")
