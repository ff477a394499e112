"""Slices: JSON arrays and strings, written at once where they are small and piece by piece where they are large.

Large ones are written as the client takes them: each slice in another thread, so that nobody waits for 2,048 vectors to
be written, and none before it is wanted, so that an answer of any size takes the memory of a slice. Within a slice
orjson keeps Python to itself, between slices others run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import orjson

T = TypeVar("T")

LARGE = 1 << 16  # numbers in an answer; fewer are written in a millisecond or two
SLICE = 1 << 14  # numbers written in one go
ITEM = 4  # an object with a number or two is as much text as so many numbers
CHARACTERS = 8  # and a number as so many characters
GAP = b"\0"  # stands in a text for what is put there later: no JSON holds this byte
LATER: Any = orjson.Fragment(GAP)


@dataclass(slots=True)
class Array:
    """A JSON array to be: `write(items, *how, first=i)` makes text of any run of its items, which begins with no. i.

    `weigh` says how many numbers' worth of text an item is. `width` items in a row make one of the array. A row that is
    more than a slice by itself is written by `cut`, where there is one, and `write` is given LATER in its place.
    `check` raises what can be wrong with the items, before the first byte leaves.
    """

    write: Callable[..., bytes]
    items: Sequence[Any]
    how: tuple[Any, ...] = ()
    weigh: Callable[[Any], int] = attrgetter("size")
    width: int = 1
    cut: Callable[[Any], Iterator[bytes]] | None = None
    check: Callable[[], None] | None = None

    @property
    def large(self) -> bool:
        return len(self.items) >= LARGE or sum(map(self.weigh, self.items)) >= LARGE

    def whole(self) -> bytes:
        return self.write(self.items, *self.how)

    def slices(self) -> Iterator[bytes]:
        """Texts that make the whole, end to end."""
        yield b"["
        for first, end in self.runs():
            items = list(self.items[first:end])
            long = []
            if self.cut is not None:
                long = [item for item in items if item.size > SLICE]
                items = [LATER if item.size > SLICE else item for item in items]
            text = self.write(items, *self.how, first=first // self.width)[1:-1]
            before, *rest = text.split(GAP) if long else [text]
            yield b"," + before if first else before
            for row, after in zip(long, rest, strict=True):
                assert self.cut is not None
                yield from self.cut(row)
                yield after
        yield b"]"

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where to cut the items, so that each run is a slice or little more."""
        first = weight = 0
        for end in range(self.width, len(self.items) + 1, self.width):
            weight += sum(map(self.weigh, self.items[end - self.width : end]))
            if weight >= SLICE:
                yield first, end
                first, weight = end, 0
        if first < len(self.items):
            yield first, len(self.items)


@dataclass(slots=True)
class Text:
    """A JSON string to be."""

    text: str
    check: None = None

    @property
    def large(self) -> bool:
        return len(self.text) >= CHARACTERS * LARGE

    def whole(self) -> bytes:
        return orjson.dumps(self.text)

    def slices(self) -> Iterator[bytes]:
        """Texts that make the whole, end to end."""
        yield b'"'
        step = CHARACTERS * SLICE
        for first in range(0, len(self.text), step):
            yield orjson.dumps(self.text[first : first + step])[1:-1]
        yield b'"'


async def in_good_time(work: Callable[..., T], size: int, *how: Any) -> T:
    """`work(*how)`, on the event loop if it is quick and beside it if not. `size` is in numbers of an answer."""
    if size < LARGE:
        return work(*how)
    return await asyncio.get_running_loop().run_in_executor(None, work, *how)
