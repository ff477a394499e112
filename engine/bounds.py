"""Bounds: of what a prompt may consist, and how long it may be. What is beyond them is refused by its place. Pure."""

from __future__ import annotations

from carpool.engine.errors import EmptyInput, InputTooLong, InvalidInput, TokenOutOfVocabulary


def check_text(texts: list[str]) -> None:
    """A lone surrogate is a Python str but not text: no UTF-8 stands for it."""
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInput("input holds a lone surrogate, which is not text.", _name(i, texts)) from None


def check_vocabulary(batch: list[list[int]], vocab_size: int) -> None:
    for i, ids in enumerate(batch):
        if ids and (max(ids) >= vocab_size or min(ids) < 0):
            bad = next(token for token in ids if not 0 <= token < vocab_size)
            raise TokenOutOfVocabulary(
                f"Token id {bad} is out of vocabulary: this model knows ids 0 to {vocab_size - 1}; "
                "a client that tokenises for another model should send text instead.",
                _name(i, batch),
            )


def check_lengths(batch: list[list[int]], longest: int | None) -> None:
    """At least one prompt, each with at least one id and, unless it is None, at most `longest`."""
    if not batch:
        raise EmptyInput("You must pass at least one prompt", "input")
    for i, ids in enumerate(batch):
        if not ids:
            raise EmptyInput(
                "The prompt has no tokens: send a text or ids that are not empty.", _name(i, batch)
            )
        if longest is not None and len(ids) > longest:
            raise InputTooLong(
                f"This model's maximum context length is {longest} tokens. However, your input has at least "
                f"{len(ids)} tokens. Please reduce the length of the input prompt, or have it cut by setting "
                f"{InputTooLong.REMEDY}.",
                _name(i, batch),
            )


def _name(index: int, batch: list[str] | list[list[int]]) -> str:
    """What callers know a prompt by."""
    return "input" if len(batch) == 1 else f"input[{index}]"
