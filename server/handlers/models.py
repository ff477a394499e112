"""Which model is served, and under which names."""

from __future__ import annotations

from aiohttp import web
from msgspec import UNSET

from carpool.server.answer import json_answer
from carpool.server.call import served_name
from carpool.server.headers import fresh_label
from carpool.server.keys import CONFIG, ENGINE, STARTED_AT
from carpool.server.protocol import ModelCard, ModelList, ModelPermission


async def list_models(request: web.Request) -> web.Response:
    names = (*request.app[CONFIG].model_names, *request.app[ENGINE].model.lora_modules)
    return json_answer(ModelList(data=[_card(request.app, name) for name in names]))


async def show_model(request: web.Request) -> web.Response:
    name = request.match_info["model"].removesuffix("/")
    served_name(request.app, name)
    return json_answer(_card(request.app, name))


def _card(app: web.Application, name: str) -> ModelCard:
    model = app[ENGINE].model
    created = app[STARTED_AT]
    adapter = model.lora_modules.get(name)
    return ModelCard(
        id=name,
        created=created,
        root=model.root if adapter is None else adapter,
        parent=None if adapter is None else app[CONFIG].model_names[0],
        max_model_len=model.max_model_len,
        adapter_tasks=sorted(model.task_adapters) if model.task_adapters and adapter is None else UNSET,
        permission=[ModelPermission(f"modelperm-{fresh_label()}", created)],
    )
