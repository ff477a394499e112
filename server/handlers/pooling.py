"""POST /pooling: whatever the model's pooler gives, of whole texts or of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from aiohttp import web

from carpool.engine.errors import UnsupportedTask
from carpool.engine.params import check_dimensions
from carpool.server.body import read_request
from carpool.server.call import Call, prefixed
from carpool.server.encoding import POOLING
from carpool.server.errors import InvalidRequest
from carpool.server.handlers.vectors import answer_vectors, refuse_long_metadata
from carpool.server.protocol import PoolingRequest, PoolingResponse, decode_pooling_request

if TYPE_CHECKING:
    from carpool.engine.model_info import ModelInfo
    from carpool.engine.params import Task

OF_TOKENS: tuple[Task, ...] = ("token_embed", "token_classify")
NO_PLUGINS = "No IOProcessor plugin installed. carpool has none: send texts or token ids as input."


async def create_pooling(request: web.Request) -> web.StreamResponse:
    return await pool(request, await read_request(request, decode_pooling_request))


async def pool(request: web.Request, asked: PoolingRequest) -> web.StreamResponse:
    call = Call(request, asked)
    if asked.data is not None and asked.input is None and asked.messages is None:
        raise InvalidRequest(NO_PLUGINS, "data")
    tasked = asked.task in call.model.task_adapters
    prompt = call.take_task(asked.task, "task") if tasked else ""
    tasks = (call.model.default_task,) if tasked else tasks_of(asked.task, call.model)
    check_dimensions(asked.dimensions, tasks, call.model.matryoshka, call.name)
    several = tasks if len(tasks) > 1 else ()
    if several and asked.encoding_format in ("bytes", "bytes_only"):
        raise InvalidRequest("Results of several tasks come as float or base64.", "encoding_format")
    prompts = prefixed(prompt, await call.prompts(asked), "task")
    whole = tasks[0] == "embed"
    least = (asked.dimensions or call.model.default_width,) if whole else (1,)
    refuse_long_metadata(call, asked, len(prompts), least)
    result = await call.pool(
        several or tasks[0],
        prompts,
        asked.pooling(asked.dimensions),
        asked.tokenization(),
        asked.field,
        prompt,
    )
    return await answer_vectors(call, asked, result, "pool", PoolingResponse, POOLING, several)


def tasks_of(name: str | None, model: ModelInfo) -> tuple[Task, ...]:
    """The tasks a request names, joined by `&`, each once; null leaves it to the model."""
    if name is None:
        return (model.default_task,)
    if name == "plugin":
        raise UnsupportedTask(NO_PLUGINS, "task")
    tasks = [_task_of(part, model) for part in name.split("&")]
    if None not in tasks:
        return tuple(dict.fromkeys(task for task in tasks if task is not None))
    raise UnsupportedTask(f"Unsupported task: '{name}'. Supported tasks: {_listed(model.tasks)}.", "task")


def _task_of(name: str, model: ModelInfo) -> Task | None:
    """None if the model lacks it; `encode` is the older word for results of tokens."""
    candidates: Iterable[Task] = OF_TOKENS if name == "encode" else model.tasks
    return next((task for task in candidates if task in model.tasks and name in (task, "encode")), None)


def _listed(tasks: Set[str]) -> str:
    return ", ".join(sorted(tasks))
