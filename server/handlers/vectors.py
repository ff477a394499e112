"""The answer of the endpoints that give vectors, in whichever form was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from carpool.server.answer import HOLE, json_around, sliced
from carpool.server.encoding import (
    ItemStyle,
    array_by_task,
    base64_array,
    float_array,
    num_bytes,
    places,
    raw_slices,
    raw_vectors,
    zeros,
)
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import BinaryMetadata, BinaryUsage, EmbeddingResponse, PoolingResponse
from carpool.server.slices import LARGE

if TYPE_CHECKING:
    from carpool.engine.outputs import PoolingResult
    from carpool.server.call import Call
    from carpool.server.encoding import Rows
    from carpool.server.protocol.formats import FormattedRequest

MAX_PLACES = 1000  # no header is long enough for so many
COUNTS = 40  # bytes for what a request's tokens are counted in, in the header
BINARY = "application/octet-stream"
MAX_METADATA = 65_000  # bytes; Python's http.client, and with it requests, stops at header lines of 65,536

Listing = Callable[..., EmbeddingResponse | PoolingResponse]


def refuse_long_metadata(call: Call, asked: FormattedRequest, count: int, shape: tuple[int, ...]) -> None:
    """Before the model runs: a header for so many results is too long, even if they are all of this least `shape`."""
    if asked.encoding_format != "bytes":
        return
    _header_text(
        _metadata(call, asked, zeros(min(count, MAX_PLACES), shape), 0, f"embd-{call.id}"),
        count,
        MAX_METADATA - COUNTS,
    )


async def answer_vectors(
    call: Call,
    asked: FormattedRequest,
    result: PoolingResult,
    prefix: str,
    listing: Listing,
    style: ItemStyle,
    tasks: Sequence[str] = (),
) -> web.StreamResponse:
    """`prefix` of the id, `listing` and `style` are the endpoint's own; `tasks` where there are several."""
    answer_id = f"{prefix}-{call.id}"
    if asked.encoding_format in ("bytes", "bytes_only"):
        return call.finish(await _binary(call, asked, result, answer_id))
    if tasks:
        array = array_by_task(result.rows, tasks, asked.layout if asked.encoding_format == "base64" else None)
    elif asked.encoding_format == "base64":
        array = base64_array(result.rows, *asked.layout, style)
    else:
        array = float_array(result.rows, style)
    body = listing(
        id=answer_id,
        created=int(time.time()),
        model=call.name,
        data=HOLE,
        usage=call.usage(result),
    )
    return call.finish(await json_around(body, array))


async def _binary(
    call: Call, asked: FormattedRequest, result: PoolingResult, answer_id: str
) -> web.StreamResponse:
    """The vectors end to end; the `metadata` header, left out for bytes_only, says where each lies."""
    headers = {}
    if asked.encoding_format == "bytes":
        metadata = _metadata(call, asked, result.rows, result.prompt_tokens, answer_id)
        headers["metadata"] = _header_text(metadata, len(result.rows), MAX_METADATA)
    size = num_bytes(result.rows, asked.layout[0])
    if size < 4 * LARGE:  # bytes
        body = raw_vectors(result.rows, *asked.layout)
        return web.Response(body=body, headers=headers, content_type=BINARY)
    return await sliced(raw_slices(result.rows, *asked.layout), BINARY, size, headers)


def _metadata(
    call: Call, asked: FormattedRequest, rows: Rows, prompt_tokens: int, answer_id: str
) -> BinaryMetadata:
    return BinaryMetadata(
        id=answer_id,
        created=int(time.time()),
        model=call.name,
        data=places(rows, *asked.layout),
        usage=BinaryUsage(prompt_tokens, prompt_tokens),
    )


def _header_text(metadata: BinaryMetadata, count: int, most: int) -> str:
    text = msgspec.json.encode(metadata).decode()
    if len(text) > most:
        raise InvalidRequest(
            f"The metadata header for {count} vectors would be longer than HTTP clients take; "
            "send fewer inputs or use encoding_format bytes_only.",
            "encoding_format",
        )
    return text
