"""POST /pooling: whatever the model's pooler gives, of whole texts or of their tokens."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from aiohttp import web

from carpool.engine.errors import UnsupportedTask
from carpool.server.body import read_request
from carpool.server.call import Call
from carpool.server.encoding import POOLING
from carpool.server.errors import InvalidRequest
from carpool.server.handlers.vectors import answer_vectors
from carpool.server.protocol import PoolingRequest, PoolingResponse, decode_pooling_request

if TYPE_CHECKING:
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.params import Task

OF_TOKENS: tuple[Task, ...] = ("token_embed", "token_classify")


async def create_pooling(request: web.Request) -> web.Response:
    return await pool(request, await read_request(request, decode_pooling_request))


async def pool(request: web.Request, asked: PoolingRequest) -> web.Response:
    call = Call(request, asked)
    if asked.data is not None and asked.input is None and asked.messages is None:
        raise InvalidRequest("This server has no plugins to give data to; send texts as input.", "data")
    task = task_of(asked.task, call.model)
    if task in ("embed", "token_embed"):
        call.model.matryoshka.check(asked.dimensions, call.name)
    elif asked.dimensions is not None:
        raise InvalidRequest("dimensions is for embeddings; this task gives classes.", "dimensions")
    prompts = await call.prompts(asked)
    result = await call.pool(
        task, prompts, asked.pooling(asked.dimensions), asked.tokenization(), asked.field
    )
    return await answer_vectors(call, asked, result, "pool", PoolingResponse, POOLING)


def task_of(name: str | None, model: ModelInfo) -> Task:
    """The task a request names; `encode` is the older word for results of tokens, null leaves it to the model."""
    if name is None:
        return model.default_task
    candidates = OF_TOKENS if name == "encode" else (name,)
    for task in model.tasks:
        if task in candidates:
            return task
    raise UnsupportedTask(f"Unsupported task: '{name}'. Supported tasks: {_listed(model.tasks)}.", "task")


def _listed(tasks: Set[str]) -> str:
    return ", ".join(sorted(tasks))
