"""Answers: a struct or a list of them as JSON at once, or, where it is large, as long as the client takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from carpool.server.slices import GAP

if TYPE_CHECKING:
    from carpool.server.slices import Array, Text

Body = msgspec.Struct | Sequence[msgspec.Struct] | Sequence[Sequence[msgspec.Struct]] | msgspec.Raw

HOLE: Any = msgspec.Raw(GAP)  # in a body, where an `Array` goes
PIECE = 1 << 20  # bytes that are made ahead of the client

encode = msgspec.json.Encoder().encode


def json_answer(body: Body) -> web.Response:
    return web.Response(body=encode(body), content_type="application/json")


async def json_around(body: Body, *arrays: Array | Text) -> web.StreamResponse:
    """`body`, with the arrays, in their order, in its HOLEs."""
    frame = encode(body).split(GAP)
    parts = [frame[0]]
    for array, part in zip(arrays, frame[1:], strict=True):
        if array.large:
            return await sliced(_slices(frame, arrays), "application/json")
        parts += array.whole(), part
    return web.Response(body=b"".join(parts), content_type="application/json")


def _slices(frame: Sequence[bytes], arrays: Sequence[Array | Text]) -> Iterator[bytes]:
    for array in arrays:
        if array.check is not None:
            array.check()
    yield frame[0]
    for array, part in zip(arrays, frame[1:], strict=True):
        yield from array.slices()
        yield part


async def sliced(
    slices: Iterator[bytes],
    content_type: str,
    length: int | None = None,
    headers: dict[str, str] | None = None,
) -> Sliced:
    """Raises what is found wrong before the first byte."""
    pieces = _gathered(slices)
    first = await asyncio.get_running_loop().run_in_executor(None, next, pieces)
    answer = Sliced(first, pieces, headers)
    answer.content_type = content_type
    answer.content_length = length
    return answer


def _gathered(slices: Iterator[bytes]) -> Iterator[bytes]:
    """Slices together in pieces that are worth a change of threads."""
    parts: list[bytes] = []
    size = 0
    for part in slices:
        parts.append(part)
        size += len(part)
        if size >= PIECE:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


class Sliced(web.StreamResponse):
    """An answer that is made while it is sent, each piece beside the event loop and once the one before has left."""

    def __init__(self, first: bytes, rest: Iterator[bytes], headers: dict[str, str] | None = None) -> None:
        super().__init__(headers=headers)
        self._first = first
        self._rest = rest

    async def send(self, request: web.Request) -> None:
        loop = asyncio.get_running_loop()
        await self.prepare(request)
        piece, self._first = self._first, b""
        while piece:
            await self.write(piece)
            piece = await loop.run_in_executor(None, next, self._rest, b"")
        await self.write_eof()
