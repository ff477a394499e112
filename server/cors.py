"""Cross-origin requests: which web pages may call, by --allowed-origins; nobody unless it is set."""

from __future__ import annotations

from aiohttp import web

from carpool.server.errors import InvalidRequest

METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
EXPOSED = "X-Request-Id, Server-Timing, Retry-After, metadata"
CACHE_SECONDS = "600"


def is_preflight(request: web.Request) -> bool:
    """A browser's question ahead of a call; any other OPTIONS request is answered 405."""
    headers = request.headers
    return request.method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers


def answer_preflight(request: web.Request, allowed: tuple[str, ...]) -> web.Response:
    if not _admits(allowed, request.headers["Origin"]):
        raise InvalidRequest("Requests from this web origin are not allowed (--allowed-origins).")
    return web.Response(
        headers={
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
            "Access-Control-Max-Age": CACHE_SECONDS,
        }
    )


def mark(request: web.Request, response: web.StreamResponse, allowed: tuple[str, ...]) -> None:
    """Tell the browser that the page which asked may read the answer."""
    response.headers["Vary"] = "Origin"
    origin = request.headers.get("Origin")
    if origin is not None and _admits(allowed, origin):
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED


def _admits(allowed: tuple[str, ...], origin: str) -> bool:
    return "*" in allowed or origin in allowed
