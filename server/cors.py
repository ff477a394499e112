"""Cross-origin requests: which web pages may call, by --allowed-origins; nobody unless it is set."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from carpool.server.config import ServerConfig
from carpool.server.errors import InvalidRequest

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# What pages may send anyway, for all that a browser asks before it sends JSON.
SAFE_HEADERS = ("Accept", "Accept-Language", "Content-Language", "Content-Type")
EXPOSED = "X-Request-Id, X-Error-Message, Server-Timing, Retry-After, metadata"
CACHE_SECONDS = "600"


def is_preflight(request: web.Request) -> bool:
    """A browser's question ahead of a call; any other OPTIONS request is answered 405."""
    headers = request.headers
    return request.method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers


def answer_preflight(request: web.Request, config: ServerConfig) -> web.Response:
    if not _admits(config.allowed_origins, request.headers["Origin"]):
        raise InvalidRequest("Requests from this web origin are not allowed (--allowed-origins).")
    method = request.headers["Access-Control-Request-Method"]
    if not _admits(config.allowed_methods, method):
        raise InvalidRequest("Requests with this method are not allowed (--allowed-methods).")
    wanted = request.headers.get("Access-Control-Request-Headers", "")
    known = [name.lower() for name in (*SAFE_HEADERS, *config.allowed_headers)]
    if not all(_admits(known, name.strip().lower()) for name in wanted.split(",") if name.strip()):
        raise InvalidRequest("Requests with these headers are not allowed (--allowed-headers).")
    methods = METHODS if "*" in config.allowed_methods else config.allowed_methods
    headers = "*" if "*" in known else ", ".join(config.allowed_headers)
    return web.Response(
        headers={
            "Access-Control-Allow-Methods": ", ".join(methods),
            "Access-Control-Allow-Headers": wanted or headers,
            "Access-Control-Max-Age": CACHE_SECONDS,
        }
    )


def mark(request: web.Request, response: web.StreamResponse, config: ServerConfig) -> None:
    """Tell the browser that the page which asked may read the answer."""
    allowed = config.allowed_origins
    response.headers["Vary"] = "Origin"
    origin = request.headers.get("Origin")
    if origin is not None and _admits(allowed, origin):
        anyone = "*" in allowed and not config.allow_credentials  # a browser wants to be named, with those
        response.headers["Access-Control-Allow-Origin"] = "*" if anyone else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED
        if config.allow_credentials:
            response.headers["Access-Control-Allow-Credentials"] = "true"


def _admits(allowed: Sequence[str], asked: str) -> bool:
    return "*" in allowed or asked in allowed
