"""Is it alive, is it ready, how is it doing."""

from __future__ import annotations

from aiohttp import web

from carpool.engine.errors import Draining, EngineDead, NotReady
from carpool.server.keys import ENGINE, METRICS


async def check_health(request: web.Request) -> web.Response:
    """200 while the engine can answer what it has accepted."""
    state = request.app[ENGINE].state
    if state == "starting":
        raise NotReady("The model is still loading.")
    if state not in ("ready", "draining"):
        raise EngineDead("The engine is not running.")
    return web.Response()


async def ping(request: web.Request) -> web.Response:
    return await check_health(request)


async def check_live(request: web.Request) -> web.Response:
    """503 only when a restart would help."""
    if request.app[ENGINE].state == "dead":
        raise EngineDead("The engine is dead.")
    return web.Response()


async def check_ready(request: web.Request) -> web.Response:
    """200 while new requests are welcome."""
    if request.app[ENGINE].state == "draining":
        raise Draining("The server is shutting down.")
    return await check_health(request)


async def show_metrics(request: web.Request) -> web.Response:
    metrics = request.app[METRICS]
    return web.Response(body=await metrics.render(), headers={"Content-Type": metrics.content_type})
