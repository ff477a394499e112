"""Cutting: what is kept of a prompt that is longer than it may be. Pure, on lists of ids."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from carpool.engine.affixes import NONE, Affixes
from carpool.engine.errors import InvalidParameter
from carpool.engine.params import Side


def cut_length(truncate: int | None, longest: int | None) -> int | None:
    """The most ids that are kept of a prompt, where `longest` are allowed; None, nothing is cut.

    `truncate` is what its caller asks for: -1 is as many as are allowed. Raises InvalidParameter for more than those.
    """
    if truncate is None:
        return None
    if truncate == -1:
        return longest
    if truncate < -1:
        raise InvalidParameter(
            f"truncate_prompt_tokens must be -1 or more, got {truncate}.", "truncate_prompt_tokens"
        )
    if longest is not None and truncate > longest:
        raise InvalidParameter(
            "truncate_prompt_tokens value is greater than max_model_len. "
            "Please request a smaller truncation size.",  # the reference's words, which clients compare
            "truncate_prompt_tokens",
        )
    return truncate


def head(text: str, most: int) -> str:
    """At most `most` characters, ending where a word does, so that its tokens are the whole text's first."""
    if len(text) <= most:
        return text
    end = max(text.rfind(" ", 0, most), text.rfind("\n", 0, most))
    return text[:end] if end > most // 2 else text


def cut(ids: list[int], limit: int, side: Side, spared: Affixes = NONE) -> list[int]:
    """At most `limit` ids, less at this side. What is `spared` around them stays, unless it does not fit by itself."""
    if len(ids) <= limit:
        return ids
    prefix, suffix = spared.prefix, spared.suffix
    room = limit - len(prefix) - len(suffix)
    if room < 0 or not (prefix or suffix):
        return ids[:limit] if side == "right" else ids[len(ids) - limit :]
    return [*prefix, *cut(ids[len(prefix) : len(ids) - len(suffix)], room, side), *suffix]


def cut_pair(first: list[int], second: list[int], room: int, side: Side) -> tuple[list[int], list[int]]:
    """The longer side first, as the tokenizers library's longest_first does."""
    if len(first) + len(second) <= room:
        return first, second
    short, long = sorted((len(first), len(second)))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    keep_first, keep_second = (long, short) if len(first) > len(second) else (short, long)
    return cut(first, keep_first, side), cut(second, keep_second, side)


def halved_unevenly(first: list[int], second: list[int], room: int) -> bool:
    """Whether `cut_pair` leaves each side half of the room, and an odd token to the longer one, both being beyond it.

    How far beyond matters for nothing else.
    """
    return room % 2 == 1 and min(len(first), len(second)) > room


def cut_second(first: list[int], second: list[int], room: int, side: Side) -> tuple[list[int], list[int]]:
    """The second side only, as the tokenizers library's only_second does.

    Raises InvalidParameter if nothing would be left of it: all documents would score the same.
    """
    if len(first) + len(second) > room and len(first) >= room:
        raise InvalidParameter(
            f"truncate_prompt_tokens leaves room for {room} tokens of a query and a document, and where "
            f"max_tokens_per_doc is set only the document is cut: the query alone has at least {len(first)}. "
            "Please set max_tokens_per_query as well.",
            "truncate_prompt_tokens",
        )
    return first, cut(second, room - len(first), side)


def give_way(
    parts: list[list[int]], yields: Seq[int], tail: list[int], limit: int, specials: int
) -> list[list[int]]:
    """The parts with as much cut from the ends of those at `yields`, in this order, as `limit` has no room for.

    What is cut ends in `tail`; `specials` are the ids that come around the parts. Raises InvalidParameter if all that
    may yield is not enough.
    """
    parts = list(parts)
    excess = sum(map(len, parts)) + specials - limit
    for place in yields:
        if excess > 0:
            keep = max(0, len(parts[place]) - len(tail) - excess)
            excess -= len(parts[place]) - len(tail) - keep
            parts[place] = parts[place][:keep] + tail
    if excess > 0:
        raise InvalidParameter(
            f"truncate_prompt_tokens {limit} leaves no room for a query and a document: the model's prompt around them "
            f"alone has at least {limit + excess} tokens.",
            "truncate_prompt_tokens",
        )
    return parts
