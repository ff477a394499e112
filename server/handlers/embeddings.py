"""POST /v1/embeddings: texts, token ids or chats in, vectors out, in whichever form was asked for."""

from __future__ import annotations

from aiohttp import web

from carpool.server.body import read_request
from carpool.server.call import Call, prefixed
from carpool.server.encoding import EMBEDDING
from carpool.server.handlers.vectors import answer_vectors, refuse_long_metadata
from carpool.server.protocol import EmbeddingRequest, EmbeddingResponse, decode_embedding_request


async def create_embeddings(request: web.Request) -> web.StreamResponse:
    return await embed(request, await read_request(request, decode_embedding_request))


async def embed(request: web.Request, asked: EmbeddingRequest) -> web.StreamResponse:
    call = Call(request, asked)
    call.require("embed" in call.model.tasks, "Embeddings")
    width = asked.width
    call.model.matryoshka.check(width, call.name, asked.width_field)
    prompt = call.take_task(asked.task, "task")
    prompts = prefixed(prompt, await call.prompts(asked), "task")
    refuse_long_metadata(call, asked, len(prompts), (width or call.model.default_width,))
    params, tokenization = asked.pooling(width), asked.tokenization()
    result = await call.pool("embed", prompts, params, tokenization, asked.field, prompt)
    return await answer_vectors(call, asked, result, "embd", EmbeddingResponse, EMBEDDING)
