"""The request body: whole, decompressed, within the limit and decoded, or a refusal. No wait is endless."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from aiohttp import web
from msgspec import Struct

from carpool.server.decoding import RequestDecoder
from carpool.server.errors import BodyTooLarge, UnreadableBody
from carpool.server.headers import require_json, require_known_encoding
from carpool.server.keys import CONFIG

T = TypeVar("T", bound=Struct)
D = TypeVar("D")

IDLE_SECONDS = 60.0  # a sender that is silent for so long has gone
LEAST_RATE = 8192  # bytes a second, which a sender has to keep up after the first minute
LARGE = 1 << 20  # bytes; decoding more on the event loop would hold up everybody


async def expect_later(request: web.Request) -> None:
    """`Expect: 100-continue` is answered when the body is read: after the key and the length were checked."""


async def read_request(request: web.Request, decode: RequestDecoder[T]) -> T:
    return await decoded(await read_json_body(request), decode)


async def decoded(body: bytes, decode: Callable[[bytes], D]) -> D:
    if len(body) < LARGE:
        return decode(body)
    return await asyncio.get_running_loop().run_in_executor(None, decode, body)


async def read_json_body(request: web.Request) -> bytes:
    require_json(request)
    require_known_encoding(request)
    limit = request.app[CONFIG].max_body_size
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        body = await _read(request, limit)
    except TimeoutError:
        raise UnreadableBody(
            f"The body did not come in time: a sender may be silent for {IDLE_SECONDS:.0f} seconds at most, and takes "
            f"no longer than {IDLE_SECONDS:.0f} seconds and one more for each {LEAST_RATE} bytes."
        ) from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise UnreadableBody("The body cannot be read: its coding or its framing is broken.") from error
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def _read(request: web.Request, limit: int) -> bytes:
    """May return up to a chunk more than `limit`, so that the caller sees it was passed."""
    content = request.content
    if content.is_eof():  # the usual case: a small body came in the packet of its headers
        return content.read_nowait()
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp takes written bytes for the start of the answer
    body = bytearray()
    now = asyncio.get_running_loop().time
    latest = now() + IDLE_SECONDS
    while len(body) <= limit:
        async with asyncio.timeout_at(min(now() + IDLE_SECONDS, latest + len(body) / LEAST_RATE)):
            chunk = await content.readany()
        if not chunk:
            break
        body += chunk
        await asyncio.sleep(0)  # what is compressed needs no wait for more, and others want their turn
    return bytes(body)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than this server's limit of {limit} bytes.")
