"""Tokenizer: text to ids and back. One object for all threads; it is never changed after load.

Setting truncation on a shared `tokenizers.Tokenizer` for one request would race with the others, so text is
tokenised whole and the ids are cut here, sparing the special tokens as the library itself would.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from carpool.engine.errors import (
    ConfigError,
    EmptyInput,
    InputTooLong,
    InvalidInput,
    InvalidParameter,
    TokenOutOfVocabulary,
)
from carpool.engine.params import Side, TokenizationParams


@dataclass(frozen=True, slots=True)
class Affixes:
    """The special tokens that the tokenizer puts around every single text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


class Tokenizer:
    """Wraps a fast tokenizer. All methods may be called from any thread at once."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        lowercase: bool = False,
        truncation_side: Side = "right",
        pad_id: int = 0,
    ) -> None:
        """`vocab_size` is the model's: ids at or above it have no embedding."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._lowercase = lowercase
        self._side: Side = truncation_side
        self._pad_id = pad_id
        self._affixes = _find_affixes(backend)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        # No token stands for more characters than the longest entry does.
        self._longest_token = max(map(len, vocabulary), default=1)
        # Tokens may have been added after the model was made: text can then name rows that it does not have.
        self._exceeds_model = max(vocabulary.values(), default=0) >= vocab_size

    @classmethod
    def load(cls, path: str | Path, *, trust_remote_code: bool, **limits: Any) -> Tokenizer:
        """From a model folder, by transformers, which knows each family's own rules for special tokens."""
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises whatever went wrong inside
            raise ConfigError(f"The tokenizer in {path} cannot be loaded: {_first_line(error)}") from error
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"The tokenizer in {path} has no fast version; save one with tokenizer.json.")
        return cls(
            tokenizers.Tokenizer.from_str(backend.to_str()),
            truncation_side="left" if fast.truncation_side == "left" else "right",
            pad_id=fast.pad_token_id or 0,
            **limits,
        )

    # ── text to ids ──────────────────────────────────────────────────────────────────────────────────────

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, in full."""
        if self._lowercase:
            texts = [text.lower() for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            _check_text(texts)
            raise
        return [encoding.ids for encoding in encodings]

    def prepare(self, prompts: list[str] | list[list[int]], params: TokenizationParams) -> list[list[int]]:
        """Ids that are fit to run: cut, padded and checked as `params` and the model ask.

        Raises the InvalidInput family; `param` is `input`, or `input[i]` when there are several prompts.
        """
        limit = self._limit(params.truncate_prompt_tokens)
        if prompts and isinstance(prompts[0], str):
            batch = self._encode_for(prompts, params, limit)
            if limit is not None:
                batch = [self._truncate_text(ids, limit, params) for ids in batch]
            if self._exceeds_model:
                self._check_vocabulary(batch)
        else:
            batch = prompts  # type: ignore[assignment]
            if limit is not None:
                batch = [_cut(ids, limit, params.truncation_side or "right") for ids in batch]
            self._check_vocabulary(batch)
        self._check_lengths(batch)
        if params.padding == "max_length":
            batch = [ids + [self._pad_id] * (self._max_model_len - len(ids)) for ids in batch]
        return batch

    def _limit(self, truncate: int | None) -> int | None:
        if truncate is None:
            return None
        if truncate > self._max_model_len:
            raise InvalidParameter(
                f"truncate_prompt_tokens value is greater than max_model_len ({truncate} > {self._max_model_len}). "
                "Please request a smaller truncation size.",
                "truncate_prompt_tokens",
            )
        return self._max_model_len if truncate == -1 else truncate

    def _encode_for(self, texts: list[str], params: TokenizationParams, limit: int | None) -> list[list[int]]:
        """Ids of each text; of a hopelessly long one only as many as decide what happens to it.

        A text far beyond what the model takes would cost seconds. Its beginning decides: more tokens there than
        the limit are too many, or, cut on the right, all that is kept. Only when the beginning holds few tokens
        (blanks, long words that become one unknown token) is the rest looked at.
        """
        enough = (limit or self._max_model_len) + 1
        keeps_end = limit is not None and (params.truncation_side or self._side) == "left"
        most = (enough + 64) * self._longest_token
        if keeps_end or all(len(text) <= most for text in texts):
            return self.encode(texts, params.add_special_tokens)
        _check_text(texts)  # in full: what is not text is refused, also where nobody would have looked
        heads = [_head(text, most) for text in texts]
        batch = self.encode(heads, params.add_special_tokens)
        short = [i for i, ids in enumerate(batch) if len(ids) < enough and len(heads[i]) < len(texts[i])]
        if short:
            for i, ids in zip(
                short, self.encode([texts[i] for i in short], params.add_special_tokens), strict=True
            ):
                batch[i] = ids
        return batch

    def _truncate_text(self, ids: list[int], limit: int, params: TokenizationParams) -> list[int]:
        """To `limit` ids: sparing the special tokens by default, blindly when the caller chose a side."""
        if len(ids) <= limit:
            return ids
        if params.truncation_side is not None or not params.add_special_tokens:
            return _cut(ids, limit, params.truncation_side or self._side)
        prefix, suffix = self._affixes.prefix, self._affixes.suffix
        keep = limit - len(prefix) - len(suffix)
        if keep < 0:  # not even the special tokens fit
            return _cut(ids, limit, self._side)
        content = ids[len(prefix) : len(ids) - len(suffix)]
        return [*prefix, *_cut(content, keep, self._side), *suffix]

    # ── checks ───────────────────────────────────────────────────────────────────────────────────────────

    def _check_vocabulary(self, batch: list[list[int]]) -> None:
        for i, ids in enumerate(batch):
            if ids and (max(ids) >= self._vocab_size or min(ids) < 0):
                bad = next(token for token in ids if not 0 <= token < self._vocab_size)
                raise TokenOutOfVocabulary(
                    f"Token id {bad} is out of vocabulary: this model knows ids 0 to {self._vocab_size - 1}; "
                    "a client that tokenises for another model should send text instead.",
                    _name(i, batch),
                )

    def _check_lengths(self, batch: list[list[int]]) -> None:
        if not batch:
            raise EmptyInput("You must pass at least one prompt", "input")
        for i, ids in enumerate(batch):
            if not ids:
                raise EmptyInput(
                    "The prompt has no tokens: send a text or ids that are not empty.", _name(i, batch)
                )
            if len(ids) > self._max_model_len:
                raise InputTooLong(
                    f"This model's maximum context length is {self._max_model_len} tokens. However, your input has "
                    f"at least {len(ids)} tokens. Please reduce its length or set truncate_prompt_tokens to -1.",
                    _name(i, batch),
                )

    # ── ids to text ──────────────────────────────────────────────────────────────────────────────────────

    def decode(self, token_ids: list[int]) -> str:
        """Text of the ids, special tokens kept; ids that no entry has are skipped."""
        known = [token for token in token_ids if self._is_known(token)]
        return self._backend.decode(known, skip_special_tokens=False)

    def tokens(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's entry for each id; empty where there is none."""
        return [
            (self._backend.id_to_token(token) or "") if self._is_known(token) else "" for token in token_ids
        ]

    def _is_known(self, token: int) -> bool:
        """Whether the library can be asked about it: it raises for numbers that are not 32-bit."""
        return 0 <= token < self._backend.get_vocab_size(with_added_tokens=True)


def _find_affixes(backend: tokenizers.Tokenizer) -> Affixes:
    """Which ids stand before and after a text's own: learned by looking at one."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return Affixes(tuple(full[:start]), tuple(full[start + len(bare) :]))
    return Affixes((), ())


def _cut(ids: list[int], limit: int, side: Side) -> list[int]:
    if len(ids) <= limit:
        return ids
    return ids[:limit] if side == "right" else ids[len(ids) - limit :]


def _head(text: str, most: int) -> str:
    """At most `most` characters, ending where a word does, so that its tokens are the whole text's first."""
    if len(text) <= most:
        return text
    end = max(text.rfind(" ", 0, most), text.rfind("\n", 0, most))
    return text[:end] if end > most // 2 else text


def _check_text(texts: list[str]) -> None:
    """A lone surrogate is a Python str but not text: no UTF-8 stands for it."""
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInput("input holds a lone surrogate, which is not text.", _name(i, texts)) from None


def _name(index: int, batch: list[str] | list[list[int]]) -> str:
    return "input" if len(batch) == 1 else f"input[{index}]"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
