"""POST /v2/embed: embeddings as Cohere's clients ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import HOLE, json_around
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import bare_array, base64_list, list_array, sign_items
from carpool.server.errors import InvalidRequest
from carpool.server.protocol import (
    ApiVersion,
    CohereEmbedRequest,
    CohereEmbedResponse,
    EmbeddingsByType,
    EmbedMeta,
    EmbedUnits,
    decode_cohere_embed_request,
)
from carpool.server.protocol.cohere import conversation
from carpool.server.slices import Array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from carpool.engine.outputs import PoolingResult
    from carpool.server.encoding import Row
    from carpool.server.protocol import EmbeddingType

# Each type's field, in the order in which they are written.
FIELDS: dict[EmbeddingType, str] = {
    "float": "floats",
    "binary": "binary",
    "ubinary": "ubinary",
    "base64": "base64",
}


async def embed(request: web.Request) -> web.StreamResponse:
    asked = await read_request(request, decode_cohere_embed_request)
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.output_dimension, call.name, "output_dimension")
    _check_width(asked.output_dimension or call.model.default_width, asked.types)
    result = await _run(call, asked)
    body = CohereEmbedResponse(
        id=f"embd-{call.id}",
        embeddings=EmbeddingsByType(
            **{FIELDS[name]: HOLE if name in asked.types else UNSET for name in FIELDS}
        ),
        texts=HOLE if asked.texts else UNSET,
        meta=EmbedMeta(ApiVersion(), EmbedUnits(result.prompt_tokens)),
    )
    arrays = [_array(name, result.rows) for name in FIELDS if name in asked.types]
    if asked.texts:
        arrays.append(list_array(asked.texts))
    return call.finish(await json_around(body, *arrays))


async def _run(call: Call, asked: CohereEmbedRequest) -> PoolingResult:
    """Where the model has a chat template, `inputs` are messages, and an instruction is the system's before them.

    Else an instruction stands before the text. So it does where the model leaves prompts out of its pooling, for in a
    rendered chat nobody knows where it ends. Where the checkpoint has an adapter for the `input_type`, its instruction
    is part of that.
    """
    items = asked.items()
    field = "inputs" if asked.texts is None else "texts"
    task = asked.task(call.model.task_adapters)
    instruction = call.take_task(task, "input_type") if task else asked.instruction(call.model.prompts)
    can_chat = call.model.chat_template and not task and not call.model.leaves_out_prompts
    as_chat = can_chat and bool(instruction or asked.inputs)
    tokenization = asked.tokenization(call.model.longest_embedded, add_special_tokens=not as_chat)
    if as_chat:
        texts = await call.render([conversation(instruction, item) for item in items], {}, field)
    else:
        texts = [instruction + (item if isinstance(item, str) else "\n".join(item)) for item in items]
    if asked.truncate == "NONE" and asked.max_tokens not in (None, -1):
        _check_lengths(await call.tokenize(texts, tokenization), asked.max_tokens)
    return await call.pool(
        "embed", texts, asked.pooling(), tokenization, field, "" if as_chat else instruction
    )


def _check_lengths(token_ids: Sequence[Sequence[int]], most: int) -> None:
    longest = max(map(len, token_ids))
    if longest > most:
        raise InvalidRequest(
            f"Input of {longest} tokens exceeds max_tokens={most} with truncate=NONE. "
            "Set truncate to END or START to allow truncation.",
            "max_tokens",
        )


def _check_width(width: int, types: Sequence[EmbeddingType]) -> None:
    if width % 8 and {"binary", "ubinary"}.intersection(types):
        raise InvalidRequest(
            f"Embedding dimension must be a multiple of 8 for binary embedding types, but got {width}.",
            "embedding_types",
        )


def _array(name: EmbeddingType, rows: Sequence[Row]) -> Array:
    match name:
        case "float":
            return bare_array(rows)
        case "base64":
            return Array(base64_list, rows, ("float32", "little"))
    return Array(sign_items, rows, (name == "binary",))
