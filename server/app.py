"""The application: a value made from a configuration, an engine and the table of routes below."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from carpool.server.body import expect_later
from carpool.server.config import ServerConfig
from carpool.server.handlers import embeddings, health, models, tokenize
from carpool.server.keys import CONFIG, ENGINE, KEY_DIGESTS, METRICS, ROUTE_OF_HANDLER, STARTED_AT
from carpool.server.metrics import Metrics
from carpool.server.middleware import digest, front_door

if TYPE_CHECKING:
    from carpool.engine.async_engine import AsyncEngine


class Route(NamedTuple):
    """Each path has a handler of its own: that is how the middleware knows which route a request took."""

    methods: tuple[str, ...]
    path: str
    handler: Handler
    open: bool = False  # served without an API key, and while the server drains


ROUTES = (
    Route(("POST",), "/v1/embeddings", embeddings.create_embeddings),
    Route(("POST",), "/tokenize", tokenize.tokenize),
    Route(("POST",), "/detokenize", tokenize.detokenize),
    Route(("GET",), "/v1/models", models.list_models),
    Route(("GET",), "/v1/models/{model}", models.show_model),
    Route(("GET",), "/health", health.check_health, open=True),
    Route(("GET",), "/health/live", health.check_live, open=True),
    Route(("GET",), "/health/ready", health.check_ready, open=True),
    Route(("GET", "POST"), "/ping", health.ping, open=True),
    Route(("GET",), "/version", health.show_version, open=True),
    Route(("GET",), "/metrics", health.show_metrics, open=True),
)


def make_app(config: ServerConfig, engine: AsyncEngine) -> web.Application:
    app = web.Application(middlewares=[front_door])
    app[CONFIG] = config
    app[ENGINE] = engine
    app[METRICS] = engine.observer = Metrics(config.model_names[0], engine)
    app[KEY_DIGESTS] = tuple(digest(key) for key in config.api_key)
    app[ROUTE_OF_HANDLER] = {route.handler: route for route in ROUTES}
    app[STARTED_AT] = int(time.time())
    for route in ROUTES:
        for path in _spellings(route.path, config.root_path):
            for method in (*route.methods, *(("HEAD",) if "GET" in route.methods else ())):
                app.router.add_route(method, path, route.handler, expect_handler=expect_later)
    return app


def _spellings(path: str, root_path: str) -> list[str]:
    """A path with and without the proxy's prefix, with and without a slash at the end."""
    path = path.replace("{model}", "{model:.+}")  # names of models have slashes
    slashless = [path, root_path + path] if root_path else [path]
    return [spelling + slash for spelling in slashless for slash in ("", "/")]
