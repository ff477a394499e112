"""What hangs on the application and on a request, by typed key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:  # importing the engine loads torch; `carpool --help` and most tests do without
    from carpool.engine.async_engine import AsyncEngine
    from carpool.server.app import Route
    from carpool.server.config import ServerConfig
    from carpool.server.metrics import Metrics

CONFIG: web.AppKey[ServerConfig] = web.AppKey("config")
ENGINE: web.AppKey[AsyncEngine] = web.AppKey("engine")
METRICS: web.AppKey[Metrics] = web.AppKey("metrics")
KEY_DIGESTS: web.AppKey[tuple[bytes, ...]] = web.AppKey("key_digests")
ROUTE_TAKEN: web.AppKey[Mapping[Any, Route]] = web.AppKey("route_taken")  # by aiohttp's own route
OPENAPI: web.AppKey[bytes] = web.AppKey("openapi")
STARTED_AT: web.AppKey[int] = web.AppKey("started_at")  # unix seconds, reported as a model's `created`

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
DEADLINE: web.RequestKey[float] = web.RequestKey(
    "deadline", float
)  # in the loop's time; where the client set one
CLIENT: web.RequestKey[str] = web.RequestKey("client", str)  # whose share of the queue the request counts to
