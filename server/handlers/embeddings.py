"""POST /v1/embeddings: texts or token ids in, vectors out, in whichever form was asked for."""

from __future__ import annotations

import time
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from carpool.engine.errors import UnsupportedTask
from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.encoding import base64_items, float_items, in_good_time, places, raw_vectors
from carpool.server.errors import InvalidRequest
from carpool.server.handlers.models import served_name
from carpool.server.headers import label, timeout_seconds
from carpool.server.keys import CLIENT, CONFIG, ENGINE, METRICS, REQUEST_ID
from carpool.server.protocol import (
    BinaryMetadata,
    BinaryUsage,
    EmbeddingRequest,
    EmbeddingResponse,
    Usage,
    decode_embedding_request,
)

if TYPE_CHECKING:
    from carpool.engine.outputs import PoolingResult, Timings

MAX_METADATA = 65_000  # bytes; Python's http.client, and with it requests, stops at header lines of 65,536


async def create_embeddings(request: web.Request) -> web.Response:
    app = request.app
    asked = await read_request(request, decode_embedding_request)
    name = served_name(app, asked.model)
    engine = app[ENGINE]
    if "embed" not in engine.model.tasks:
        raise UnsupportedTask("The model does not support Embeddings API")
    engine.model.matryoshka.check(asked.dimensions, name)
    _adopt_label(request, asked)
    result = await engine.pool(
        asked.prompts(app[CONFIG].engine.token_id_input),
        asked.pooling(),
        asked.tokenization(),
        client=request[CLIENT],
        priority=asked.priority or 0,
        timeout=timeout_seconds(request),
    )
    began = perf_counter()
    response = await _answer(request, asked, name, result)
    _account(response, app, result, perf_counter() - began)
    return response


def _adopt_label(request: web.Request, asked: EmbeddingRequest) -> None:
    """A `request_id` in the body counts where no X-Request-Id came with it."""
    own = label(asked.request_id)
    if own and label(request.headers.get("X-Request-Id")) is None:
        request[REQUEST_ID] = own


async def _answer(
    request: web.Request, asked: EmbeddingRequest, name: str, result: PoolingResult
) -> web.Response:
    if asked.encoding_format in ("bytes", "bytes_only"):
        return await _binary_answer(request, asked, name, result)
    if asked.encoding_format == "base64":
        layout = (asked.embed_dtype or "float32", asked.endianness or "native")
        data = await in_good_time(base64_items, result.rows, *layout)
    else:
        data = await in_good_time(float_items, result.rows)
    return json_answer(
        EmbeddingResponse(
            id=f"embd-{request[REQUEST_ID]}",
            created=int(time.time()),
            model=name,
            data=msgspec.Raw(data),
            usage=Usage(result.prompt_tokens, result.prompt_tokens),
        )
    )


async def _binary_answer(
    request: web.Request, asked: EmbeddingRequest, name: str, result: PoolingResult
) -> web.Response:
    """The vectors end to end; the `metadata` header, left out for bytes_only, says where each lies."""
    layout = (asked.embed_dtype or "float32", asked.endianness or "native")
    headers = {}
    if asked.encoding_format == "bytes":
        metadata = BinaryMetadata(
            id=f"embd-{request[REQUEST_ID]}",
            created=int(time.time()),
            model=name,
            data=places(result.rows, *layout),
            usage=BinaryUsage(result.prompt_tokens, result.prompt_tokens),
        )
        headers["metadata"] = _header_text(metadata, len(result.rows))
    body = await in_good_time(raw_vectors, result.rows, *layout)
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


def _account(response: web.Response, app: web.Application, result: PoolingResult, encode: float) -> None:
    app[METRICS].answered(result.prompt_tokens, result.timings, encode)
    response.headers["Server-Timing"] = _server_timing(result.timings, encode)


def _server_timing(timings: Timings, encode: float) -> str:
    """Where the time went, in milliseconds; browsers' and curl's users can read it off the answer."""
    return (
        f"tokenize;dur={1000 * timings.tokenize:.3f}, queue;dur={1000 * timings.queue:.3f}, "
        f"forward;dur={1000 * timings.forward:.3f}, encode;dur={1000 * encode:.3f}"
    )
