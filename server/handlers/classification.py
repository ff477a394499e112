"""POST /classify: how likely each class is for each text."""

from __future__ import annotations

import time

from aiohttp import web

from carpool.server.answer import HOLE, json_around
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import class_array
from carpool.server.handlers.tei import predictions_array
from carpool.server.protocol import (
    ClassificationRequest,
    ClassificationResponse,
    InfinityClassifyResponse,
    decode_classification_request,
)


async def create_classification(request: web.Request) -> web.StreamResponse:
    return await classify(request, await read_request(request, decode_classification_request))


async def classify(request: web.Request, asked: ClassificationRequest) -> web.StreamResponse:
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    prompts = await call.prompts(asked)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), asked.field)
    rows, labels = result.rows, call.model.labels
    listing: type[ClassificationResponse | InfinityClassifyResponse]
    if asked.raw_scores is None:
        listing, array = ClassificationResponse, class_array(rows, labels)
    else:
        listing, array = InfinityClassifyResponse, predictions_array(rows, labels)
    body = listing(
        id=f"classify-{call.id}",
        created=int(time.time()),
        model=call.name,
        data=HOLE,
        usage=call.usage(result),
    )
    return call.finish(await json_around(body, array))
