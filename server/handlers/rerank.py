"""POST /rerank: documents by relevance, best first. A body with `texts` in place of `documents` is TEI's."""

from __future__ import annotations

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import json_answer
from carpool.server.body import decoded, read_json_body
from carpool.server.call import Call
from carpool.server.encoding import best_first
from carpool.server.handlers import tei
from carpool.server.protocol import (
    Document,
    Ranked,
    RerankRequest,
    RerankResponse,
    decode_rerank_request,
    decode_tei_rerank_request,
)


async def create_ranking(request: web.Request) -> web.Response:
    body = await read_json_body(request)
    asked = await decoded(body, decode_rerank_request)
    if asked.is_teis:
        return await tei.rerank(request, await decoded(body, decode_tei_rerank_request))
    return await rerank(request, asked)


async def rerank(request: web.Request, asked: RerankRequest) -> web.Response:
    call = Call(request, asked)
    call.require(call.model.score_type is not None, "Rerank")
    query, documents = asked.query_text(), asked.document_texts()
    result = await call.score(
        [query],
        documents,
        asked.pooling(),
        asked.tokenization(),
        asked.template_kwargs(),
        ("query", "documents"),
    )
    shown = asked.return_documents is not False
    body = RerankResponse(
        id=f"rerank-{call.id}",
        model=call.name,
        usage=call.usage(result),
        results=[
            Ranked(index, Document(documents[index]) if shown else UNSET, score)
            for index, score in best_first(result.scores)[: asked.most]
        ],
    )
    return call.finish(json_answer(body))
