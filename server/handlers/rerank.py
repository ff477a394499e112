"""POST /rerank: documents by relevance, best first. A body with `texts` in place of `documents` is TEI's."""

from __future__ import annotations

import time
from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import HOLE, encode, json_around
from carpool.server.body import decoded, read_json_body
from carpool.server.call import Call
from carpool.server.encoding import best_first, ranked_array
from carpool.server.handlers import tei
from carpool.server.protocol import (
    Document,
    InfinityRanked,
    InfinityRerankResponse,
    Ranked,
    RerankRequest,
    RerankResponse,
    decode_rerank_request,
    decode_tei_rerank_request,
)
from carpool.server.slices import ITEM, in_good_time


async def create_ranking(request: web.Request) -> web.StreamResponse:
    body = await read_json_body(request)
    asked = await decoded(body, decode_rerank_request)
    if asked.is_teis:
        return await tei.rerank(request, await decoded(body, decode_tei_rerank_request))
    return await rerank(request, asked)


async def rerank(request: web.Request, asked: RerankRequest) -> web.StreamResponse:
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
    answer_id, usage = f"rerank-{call.id}", call.usage(result)
    best = await in_good_time(best_first, ITEM * len(documents), result.scores)
    bare = ranked_array(_written_bare, best[: asked.most], documents if asked.return_documents else None)
    if asked.is_infinitys:
        created = int(time.time())
        theirs = InfinityRerankResponse(
            id=answer_id, created=created, model=call.name, results=HOLE, usage=usage
        )
        return call.finish(await json_around(theirs, bare))
    shown = documents if asked.return_documents is not False else None
    arrays = [ranked_array(_written, best[: asked.most], shown)]
    body = RerankResponse(id=answer_id, model=call.name, usage=usage, results=HOLE)
    if asked.is_voyages:
        body.data = HOLE
        arrays.append(bare)
    return call.finish(await json_around(body, *arrays))


def _written(best: Sequence[tuple[int, float]], documents: Sequence[str] | None, first: int = 0) -> bytes:
    return encode(
        [Ranked(index, Document(documents[index]) if documents else UNSET, score) for index, score in best]
    )


def _written_bare(
    best: Sequence[tuple[int, float]], documents: Sequence[str] | None, first: int = 0
) -> bytes:
    """Infinity's, and Voyage's."""
    return encode(
        [InfinityRanked(index, score, documents[index] if documents else UNSET) for index, score in best]
    )
