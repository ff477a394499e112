"""POST /v2/embed: embeddings as Cohere's clients ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import base64_texts, in_good_time, shortest, sign_bits
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
from carpool.server.protocol.cohere import instructed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from carpool.engine.outputs import PoolingResult
    from carpool.server.encoding import Row
    from carpool.server.protocol import EmbeddingType


async def embed(request: web.Request) -> web.Response:
    asked = await read_request(request, decode_cohere_embed_request)
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    call.model.matryoshka.check(asked.output_dimension, call.name, "output_dimension")
    result = await _run(call, asked)
    if asked.truncate == "NONE" and asked.max_tokens:
        _check_lengths(result, asked.max_tokens)
    body = CohereEmbedResponse(
        id=f"embd-{call.id}",
        embeddings=await in_good_time(_of_types, result.rows, asked.types),
        texts=asked.texts or UNSET,
        meta=EmbedMeta(ApiVersion(), EmbedUnits(result.prompt_tokens)),
    )
    return call.finish(json_answer(body))


async def _run(call: Call, asked: CohereEmbedRequest) -> PoolingResult:
    """The instruction is a system message where the model has a chat template, and else stands before the text.

    So it does where the model leaves prompts out of its pooling, for in a rendered chat nobody knows where it ends.
    Where the checkpoint has an adapter for the `input_type`, its instruction is part of that.
    """
    texts = asked.plain_texts()
    task = asked.task(call.model.task_adapters)
    instruction = call.take_task(task, "input_type") if task else asked.instruction(call.model.prompts)
    as_chat = (
        bool(instruction) and call.model.chat_template and not task and not call.model.leaves_out_prompts
    )
    if as_chat:
        texts = await call.render([instructed(instruction, text) for text in texts], {})
    else:
        texts = [instruction + text for text in texts]
    tokenization = asked.tokenization(call.model.max_model_len, add_special_tokens=not as_chat)
    field = "inputs" if asked.texts is None else "texts"
    return await call.pool(
        "embed", texts, asked.pooling(), tokenization, field, "" if as_chat else instruction
    )


def _check_lengths(result: PoolingResult, most: int) -> None:
    longest = max(map(len, result.prompt_token_ids))
    if longest > most:
        raise InvalidRequest(
            f"Input of {longest} tokens exceeds max_tokens={most} with truncate=NONE. "
            "Set truncate to END or START to allow truncation.",
            "max_tokens",
        )


def _of_types(rows: Sequence[Row], types: Sequence[EmbeddingType]) -> EmbeddingsByType:
    return EmbeddingsByType(
        floats=[shortest(row) for row in rows] if "float" in types else UNSET,
        binary=sign_bits(rows, signed=True) if "binary" in types else UNSET,
        ubinary=sign_bits(rows, signed=False) if "ubinary" in types else UNSET,
        base64=base64_texts(rows, "float32", "little") if "base64" in types else UNSET,
    )
