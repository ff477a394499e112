"""POST /classify: how likely each class is for each text."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aiohttp import web

from carpool.server.answer import json_answer
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import shortest
from carpool.server.protocol import (
    Classification,
    ClassificationRequest,
    ClassificationResponse,
    decode_classification_request,
)

if TYPE_CHECKING:
    from carpool.server.encoding import Row


async def create_classification(request: web.Request) -> web.Response:
    return await classify(request, await read_request(request, decode_classification_request))


async def classify(request: web.Request, asked: ClassificationRequest) -> web.Response:
    call = Call(request, asked)
    call.require("classify" in call.model.tasks, "Classification")
    prompts = await call.prompts(asked)
    result = await call.pool("classify", prompts, asked.pooling(), asked.tokenization(), asked.field)
    body = ClassificationResponse(
        id=f"classify-{call.id}",
        created=int(time.time()),
        model=call.name,
        data=[_of(index, row, call.model.labels) for index, row in enumerate(result.rows)],
        usage=call.usage(result),
    )
    return call.finish(json_answer(body))


def _of(index: int, row: Row, labels: tuple[str | None, ...]) -> Classification:
    best = int(row.argmax())
    label = labels[best] if best < len(labels) else None
    return Classification(index, label, shortest(row), row.size)
