"""POST /score: how well each pair of texts goes together."""

from __future__ import annotations

import time
from collections.abc import Sequence

from aiohttp import web

from carpool.server.answer import HOLE, encode, json_around
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import score_array, shortest_scores
from carpool.server.protocol import Score, ScoreRequest, ScoreResponse, decode_score_request
from carpool.server.slices import ITEM, in_good_time


async def create_score(request: web.Request) -> web.StreamResponse:
    return await score(request, await read_request(request, decode_score_request))


async def score(request: web.Request, asked: ScoreRequest) -> web.StreamResponse:
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
        data=HOLE,
        usage=call.usage(result),
    )
    scores = await in_good_time(shortest_scores, ITEM * len(result.scores), result.scores)
    return call.finish(await json_around(body, score_array(_written, scores)))


def _written(scores: Sequence[float], first: int = 0) -> bytes:
    return encode([Score(index, "score", value) for index, value in enumerate(scores, first)])
