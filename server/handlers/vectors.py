"""The answer of the endpoints that give vectors, in whichever form was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from carpool.server.answer import json_answer
from carpool.server.encoding import (
    ItemStyle,
    base64_items,
    float_items,
    in_good_time,
    items_by_task,
    places,
    raw_vectors,
)
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import BinaryMetadata, BinaryUsage, EmbeddingResponse, PoolingResponse

if TYPE_CHECKING:
    from carpool.engine.outputs import PoolingResult
    from carpool.server.call import Call
    from carpool.server.protocol.formats import FormattedRequest

MAX_METADATA = 65_000  # bytes; Python's http.client, and with it requests, stops at header lines of 65,536

Listing = Callable[..., EmbeddingResponse | PoolingResponse]


async def answer_vectors(
    call: Call,
    asked: FormattedRequest,
    result: PoolingResult,
    prefix: str,
    listing: Listing,
    style: ItemStyle,
    tasks: Sequence[str] = (),
) -> web.Response:
    """`prefix` of the id, `listing` and `style` are the endpoint's own; `tasks` where there are several."""
    answer_id = f"{prefix}-{call.id}"
    if asked.encoding_format in ("bytes", "bytes_only"):
        return call.finish(await _binary(call, asked, result, answer_id))
    if tasks:
        layout = asked.layout if asked.encoding_format == "base64" else None
        data = await in_good_time(items_by_task, result.rows, tasks, layout)
    elif asked.encoding_format == "base64":
        data = await in_good_time(base64_items, result.rows, *asked.layout, style)
    else:
        data = await in_good_time(float_items, result.rows, style)
    written: Any = msgspec.Raw(data)
    body = listing(
        id=answer_id,
        created=int(time.time()),
        model=call.name,
        data=written,
        usage=call.usage(result),
    )
    return call.finish(json_answer(body))


async def _binary(call: Call, asked: FormattedRequest, result: PoolingResult, answer_id: str) -> web.Response:
    """The vectors end to end; the `metadata` header, left out for bytes_only, says where each lies."""
    headers = {}
    if asked.encoding_format == "bytes":
        metadata = BinaryMetadata(
            id=answer_id,
            created=int(time.time()),
            model=call.name,
            data=places(result.rows, *asked.layout),
            usage=BinaryUsage(result.prompt_tokens, result.prompt_tokens),
        )
        headers["metadata"] = _header_text(metadata, len(result.rows))
    body = await in_good_time(raw_vectors, result.rows, *asked.layout)
    return web.Response(body=body, headers=headers, content_type="application/octet-stream")


def _header_text(metadata: BinaryMetadata, count: int) -> str:
    text = msgspec.json.encode(metadata).decode()
    if len(text) > MAX_METADATA:
        raise InvalidRequest(
            f"The metadata header for {count} vectors would be longer than HTTP clients take; "
            "send fewer inputs or use encoding_format bytes_only.",
            "encoding_format",
        )
    return text
