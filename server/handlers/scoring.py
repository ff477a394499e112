"""POST /score: how well each pair of texts goes together."""

from __future__ import annotations

import time

from aiohttp import web

from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import shortest_scores
from carpool.server.protocol import Score, ScoreRequest, ScoreResponse, decode_score_request


async def create_score(request: web.Request) -> web.Response:
    return await score(request, await read_request(request, decode_score_request))


async def score(request: web.Request, asked: ScoreRequest) -> web.Response:
    call = Call(request, asked)
    call.require(call.model.score_type is not None, "Score")
    queries, documents = asked.pairs()
    result = await call.score(
        queries, documents, asked.pooling(), asked.tokenization(), asked.template_kwargs(), asked.names
    )
    body = ScoreResponse(
        id=f"score-{call.id}",
        created=int(time.time()),
        model=call.name,
        data=[Score(index, "score", value) for index, value in enumerate(shortest_scores(result.scores))],
        usage=call.usage(result),
    )
    return call.finish(json_answer(body))
