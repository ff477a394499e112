"""The application: a value made from a configuration, an engine and the table of routes below."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from carpool.server import protocol
from carpool.server.body import expect_later
from carpool.server.config import ServerConfig
from carpool.server.handlers import (
    changes,
    classification,
    cohere,
    docs,
    embeddings,
    health,
    invocations,
    models,
    pooling,
    rerank,
    scoring,
    server_info,
    tei,
    tokenize,
)
from carpool.server.keys import CONFIG, ENGINE, KEY_DIGESTS, METRICS, OPENAPI, ROUTE_TAKEN, STARTED_AT
from carpool.server.metrics import Metrics
from carpool.server.middleware import digest, front_door
from carpool.server.openapi import describe

if TYPE_CHECKING:
    from carpool.engine.async_engine import AsyncEngine


class Route(NamedTuple):
    """One path: who answers it, and what `/openapi.json` says of it. Aliases share a handler."""

    methods: tuple[str, ...]
    path: str
    handler: Handler
    summary: str = ""
    request: Any = None  # the struct of the body, or a union of structs; None: no body
    response: Any = None  # of status 200: a type, or a media type where it is no JSON; None: no body
    open: bool = False  # served without an API key, and while the server drains
    runs_model: bool = False  # counted by /load while it is answered
    describes: bool = False  # left out with --no-docs
    needs: Callable[[ServerConfig], bool] | None = None  # left out unless the operator has said so


def _to_model(summary: str, handler: Handler, request: Any, response: Any, *paths: str) -> list[Route]:
    """The routes of an endpoint that runs the model."""
    return [Route(("POST",), path, handler, summary, request, response, runs_model=True) for path in paths]


def _adapters_change(config: ServerConfig) -> bool:
    return config.engine.allow_runtime_lora_updating


def _caches_are_reset(config: ServerConfig) -> bool:
    return config.allow_cache_reset


ROUTES = (
    *_to_model(
        "Embed texts, token ids or chats.",
        embeddings.create_embeddings,
        protocol.EmbeddingRequest,
        protocol.EmbeddingResponse,
        "/v1/embeddings",
        "/embeddings",
    ),
    *_to_model(
        "Embed texts; the request is Cohere's.",
        cohere.embed,
        protocol.CohereEmbedRequest,
        protocol.CohereEmbedResponse,
        "/v2/embed",
    ),
    *_to_model(
        "Give what the model's pooler gives, of texts or of their tokens.",
        pooling.create_pooling,
        protocol.PoolingRequest,
        protocol.PoolingResponse,
        "/pooling",
    ),
    *_to_model(
        "Tell how likely each class is for each text.",
        classification.create_classification,
        protocol.ClassificationRequest,
        protocol.ClassificationResponse | protocol.InfinityClassifyResponse,
        "/classify",
        "/v1/classify",
    ),
    *_to_model(
        "Score pairs of texts.",
        scoring.create_score,
        protocol.ScoreRequest,
        protocol.ScoreResponse,
        "/score",
        "/v1/score",
    ),
    *_to_model(
        "Sort documents by their relevance to a query; the request may be Cohere's, Jina's, Voyage's or TEI's.",
        rerank.create_ranking,
        protocol.RerankRequest | protocol.TeiRerankRequest,
        protocol.RerankResponse | protocol.InfinityRerankResponse | list[protocol.TeiRank],
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    ),
    *_to_model(
        "Embed texts; the request is TEI's.",
        tei.create_embeddings,
        protocol.TeiEmbedRequest,
        list[list[float]],
        "/embed",
    ),
    *_to_model(
        "Give a vector for each token; the request is TEI's.",
        tei.create_token_embeddings,
        protocol.TeiInputsRequest,
        list[list[list[float]]],
        "/embed_all",
    ),
    *_to_model(
        "Give texts' weights in the entries of the vocabulary; the request is TEI's.",
        tei.create_sparse_embeddings,
        protocol.TeiInputsRequest,
        list[list[protocol.TeiWeight]],
        "/embed_sparse",
    ),
    *_to_model(
        "Classify texts or pairs of texts; the request is TEI's.",
        tei.create_predictions,
        protocol.TeiPredictRequest,
        list[protocol.TeiPrediction | list[protocol.TeiPrediction]],
        "/predict",
    ),
    *_to_model(
        "Compare one text with others by their vectors; the request is TEI's.",
        tei.compare,
        protocol.TeiSimilarityRequest,
        list[float],
        "/similarity",
    ),
    *_to_model(
        "Do what the body looks like: embed, classify, rerank, score or pool.",
        invocations.invoke,
        protocol.EmbeddingRequest
        | protocol.ClassificationRequest
        | protocol.RerankRequest
        | protocol.TeiRerankRequest
        | protocol.ScoreRequest
        | protocol.PoolingRequest
        | protocol.TeiEmbedRequest
        | protocol.TeiPredictRequest
        | protocol.TeiSimilarityRequest,
        protocol.EmbeddingResponse
        | protocol.ClassificationResponse
        | protocol.InfinityClassifyResponse
        | protocol.RerankResponse
        | protocol.InfinityRerankResponse
        | list[protocol.TeiRank]
        | protocol.ScoreResponse
        | protocol.PoolingResponse
        | list[float]
        | list[list[float]]
        | list[list[list[float] | protocol.TeiWeight]]
        | list[protocol.TeiPrediction | list[protocol.TeiPrediction]],
        "/invocations",
        "/",
    ),
    Route(
        ("POST",),
        "/tokenize",
        tokenize.create_tokens,
        "Turn a text or a chat into token ids; the request may be TEI's.",
        protocol.TokenizeRequest | protocol.TeiTokenizeRequest,
        protocol.TokenizeResponse | list[list[protocol.TeiToken]],
    ),
    Route(
        ("POST",),
        "/decode",
        tokenize.decode,
        "Turn lists of token ids into texts; the request is TEI's.",
        protocol.TeiDecodeRequest,
        list[str],
    ),
    Route(
        ("POST",),
        "/detokenize",
        tokenize.detokenize,
        "Turn token ids into text.",
        protocol.DetokenizeRequest,
        protocol.DetokenizeResponse,
    ),
    Route(
        ("POST",),
        "/v1/load_lora_adapter",
        changes.load_adapter,
        "Load an adapter from a folder that the server can read, or from the hub.",
        protocol.LoadAdapterRequest,
        "text/plain",
        needs=_adapters_change,
    ),
    Route(
        ("POST",),
        "/v1/unload_lora_adapter",
        changes.unload_adapter,
        "Unload an adapter; requests that wait for it are still answered.",
        protocol.UnloadAdapterRequest,
        "text/plain",
        needs=_adapters_change,
    ),
    Route(
        ("POST",),
        "/reset_prefix_cache",
        changes.reset_caches,
        "Forget what was computed: keys and values of prompts' beginnings, and results.",
        needs=_caches_are_reset,
    ),
    *(
        Route(
            ("GET",), path, models.list_models, "List the served model's names.", response=protocol.ModelList
        )
        for path in ("/v1/models", "/models")
    ),
    *(
        Route(("GET",), path, models.show_model, "Show one of them.", response=protocol.ModelCard)
        for path in ("/v1/models/{model}", "/models/{model}")
    ),
    Route(
        ("GET",),
        "/info",
        server_info.show_info,
        "Tell what is known of the loaded model.",
        response=protocol.InfoResponse,
    ),
    Route(
        ("GET",),
        "/load",
        server_info.show_load,
        "Count the requests to the model under way.",
        response=protocol.LoadResponse,
    ),
    Route(("GET",), "/health", health.check_health, "Is the engine alive and loaded?", open=True),
    Route(("GET",), "/health/live", health.check_live, "Does the process answer?", open=True),
    Route(("GET",), "/health/ready", health.check_ready, "Is traffic welcome?", open=True),
    Route(("GET", "POST"), "/ping", health.ping, "As /health.", open=True),
    Route(
        ("GET",),
        "/version",
        server_info.show_version,
        "Tell carpool's version.",
        response=protocol.VersionResponse,
        open=True,
    ),
    Route(
        ("GET",),
        "/metrics",
        health.show_metrics,
        "Metrics, as Prometheus reads them.",
        response="text/plain",
        open=True,
    ),
    Route(
        ("GET",),
        "/openapi.json",
        docs.show_openapi,
        "Describe this API, as OpenAPI 3.1 has it.",
        response=dict[str, Any],
        describes=True,
    ),
    Route(
        ("GET",),
        "/docs",
        docs.show_docs,
        "The API, to read and to try.",
        response="text/html",
        open=True,
        describes=True,
    ),
    Route(
        ("GET",),
        "/docs/{asset}",
        docs.show_asset,
        "The files of that page.",
        response="*/*",
        open=True,
        describes=True,
    ),
    Route(
        ("GET",), "/", server_info.show_home, "A page that says where to go.", response="text/html", open=True
    ),
)


def make_app(
    config: ServerConfig, engine: AsyncEngine, ask: Callable[[str], Awaitable[bytes]] | None = None
) -> web.Application:
    """`ask` is for what only the engine's process knows, where this is another."""
    app = web.Application(middlewares=[front_door])
    app[CONFIG] = config
    app[ENGINE] = engine
    metrics = app[METRICS] = Metrics(config.model_names[0], engine, ask)
    engine.observer = metrics
    routes = tuple(route for route in ROUTES if route.needs is None or route.needs(config))
    app[OPENAPI] = describe(routes, bool(config.api_key), config.root_path, config.error_format)
    app[KEY_DIGESTS] = tuple(digest(key) for key in config.api_key)
    app[STARTED_AT] = int(time.time())
    served = [route for route in routes if config.docs or not route.describes]
    app[ROUTE_TAKEN] = {added: route for route in served for added in _add(app, route, config.root_path)}
    return app


def _add(app: web.Application, route: Route, root_path: str) -> Iterator[web.AbstractRoute]:
    """Each spelling of the path with each method is a route to aiohttp."""
    for path in _spellings(route.path, root_path):
        for method in (*route.methods, *(("HEAD",) if "GET" in route.methods else ())):
            yield app.router.add_route(method, path, route.handler, expect_handler=expect_later)


def _spellings(path: str, root_path: str) -> list[str]:
    """A path with and without the proxy's prefix, with and without a slash at the end."""
    path = path.replace("{model}", "{model:.+}").rstrip("/")  # names of models have slashes
    slashless = [path, root_path + path] if root_path else [path]
    return [spelling + slash for spelling in slashless for slash in ("", "/") if spelling + slash]
