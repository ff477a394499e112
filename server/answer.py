"""Answers: a struct or a list of them as JSON at once, or, where it is large, as long as the client takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpVersion11

from carpool.server.slices import GAP

if TYPE_CHECKING:
    from carpool.server.slices import Array, Text

Body = msgspec.Struct | Sequence[msgspec.Struct] | Sequence[Sequence[msgspec.Struct]] | msgspec.Raw

HOLE: Any = msgspec.Raw(GAP)  # in a body, where an `Array` goes
PIECE = 1 << 20  # bytes that are made ahead of the client

encode = msgspec.json.Encoder().encode


class Whole(web.Response):
    """JSON that is there at once, with status 200.

    aiohttp asks of every answer whether it has cookies, is compressed, comes in chunks or from a file, ends its
    connection, and who wants to hear of it: a dozen functions between the model and the client. Here the answer to all
    is no, for a request of HTTP/1.1 on a connection that stays; any other takes aiohttp's way.
    """

    _writer: AbstractStreamWriter | None = None  # the request's, if it is of that kind

    def __init__(self, body: bytes) -> None:
        super().__init__(body=body, content_type="application/json")
        self._bytes = body

    @property
    def keep_alive(self) -> bool | None:
        return super().keep_alive if self._writer is None else True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        stays = request.keep_alive and super().keep_alive is None  # False once it was forced to close
        if not stays or request.version != HttpVersion11 or request.method == "HEAD":
            return await super().prepare(request)
        self._writer = request.writer
        self.headers["Content-Length"] = str(len(self._bytes))
        self.headers["Date"] = rfc822_formatted_time()
        await self._writer.write_headers("HTTP/1.1 200 OK", self.headers)
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        if self._writer is None:
            await super().write_eof(data)
        else:
            await self._writer.write_eof(self._bytes)


def json_answer(body: Body) -> web.Response:
    return Whole(encode(body))


async def json_around(body: Body, *arrays: Array | Text) -> web.StreamResponse:
    """`body`, with the arrays, in their order, in its HOLEs."""
    frame = encode(body).split(GAP)
    parts = [frame[0]]
    for array, part in zip(arrays, frame[1:], strict=True):
        if array.large:
            return await sliced(_slices(frame, arrays), "application/json")
        parts += array.whole(), part
    return Whole(b"".join(parts))


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
        if request.version < HttpVersion11 and self.content_length is None:
            self.force_close()  # nothing else says where it ends; aiohttp would keep the connection that was asked for
        await self.prepare(request)
        piece, self._first = self._first, b""
        while piece:
            await self.write(piece)
            piece = await loop.run_in_executor(None, next, self._rest, b"")
        await self.write_eof()
