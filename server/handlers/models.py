"""Which model is served, and under which names."""

from __future__ import annotations

from aiohttp import web

from carpool.server.answer import json_answer
from carpool.server.call import served_name
from carpool.server.headers import fresh_label
from carpool.server.keys import CONFIG, ENGINE, STARTED_AT
from carpool.server.protocol import ModelCard, ModelList, ModelPermission


async def list_models(request: web.Request) -> web.Response:
    return json_answer(ModelList(data=[_card(request.app, name) for name in request.app[CONFIG].model_names]))


async def show_model(request: web.Request) -> web.Response:
    name = request.match_info["model"].removesuffix("/")
    served_name(request.app, name)
    return json_answer(_card(request.app, name))


def _card(app: web.Application, name: str) -> ModelCard:
    model = app[ENGINE].model
    created = app[STARTED_AT]
    return ModelCard(
        id=name,
        created=created,
        root=model.root,
        max_model_len=model.max_model_len,
        permission=[ModelPermission(f"modelperm-{fresh_label()}", created)],
    )
