"""The front door of all routes: id, key, time, count, log line; and every error turned into its answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from time import perf_counter
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError
from aiohttp.typedefs import Handler

from carpool.engine.errors import DeadlineExceeded, Draining
from carpool.server import cors
from carpool.server.answer import Sliced
from carpool.server.errors import Failure, Unauthorized, UnreadableBody, failure_of, render
from carpool.server.headers import UNKNOWN_ENCODING, fresh_label, label, timeout_seconds
from carpool.server.keys import (
    CLIENT,
    CONFIG,
    DEADLINE,
    ENGINE,
    KEY_DIGESTS,
    METRICS,
    REQUEST_ID,
    ROUTE_TAKEN,
)

if TYPE_CHECKING:
    from carpool.server.app import Route

log = structlog.get_logger()

ELSEWHERE = "other"  # endpoint of all paths we do not serve: metrics and logs repeat no client's words
SERVER = "carpool"  # aiohttp would tell its version and Python's
CLIENT_GONE = 499  # nobody receives it; a status for the books


@web.middleware
async def front_door(request: web.Request, handler: Handler) -> web.StreamResponse:
    began = perf_counter()
    app = request.app
    route = app[ROUTE_TAKEN].get(request.match_info.route)
    request[REQUEST_ID] = label(request.headers.get("X-Request-Id")) or fresh_label()
    failure = None
    try:
        response = await _admit(app, request, handler, route)
    except asyncio.CancelledError:
        _record(request, route, CLIENT_GONE, perf_counter() - began)
        raise
    except Exception as error:
        failure = failure_of(error)
        response = _refuse(app, error, failure, request[REQUEST_ID])
    response.headers["X-Request-Id"] = request[REQUEST_ID]
    response.headers["Server"] = SERVER
    if app[CONFIG].allowed_origins:
        cors.mark(request, response, app[CONFIG])
    if isinstance(response, Sliced):
        await _send(request, response, route, began)
    # After the answer: it leaves in this turn of the loop.
    seconds = perf_counter() - began
    asyncio.get_running_loop().call_soon(_record, request, route, response.status, seconds, failure)
    return response


async def _send(request: web.Request, answer: Sliced, route: Route | None, began: float) -> None:
    """A large answer: it is under way, and its client may leave, as long as it is sent."""
    metrics = request.app[METRICS]
    metrics.running += 1
    try:
        await answer.send(request)
    except (asyncio.CancelledError, ConnectionError):
        _record(request, route, CLIENT_GONE, perf_counter() - began)
        raise
    except Exception as error:  # too late to say so: what has left is half an answer with status 200
        log.error("answer broke off", request_id=request[REQUEST_ID], exc_info=error)
        _record(request, route, 500, perf_counter() - began)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError from error
    finally:
        metrics.running -= 1


async def _admit(
    app: web.Application, request: web.Request, handler: Handler, route: Route | None
) -> web.StreamResponse:
    if cors.is_preflight(request):
        return cors.answer_preflight(request, app[CONFIG])
    request[CLIENT] = request.remote or ""
    if route is None or not route.open:
        if (digests := app[KEY_DIGESTS]) and request.method != "OPTIONS":
            request[CLIENT] = _key_holder(request, digests)
        if app[ENGINE].state == "draining":
            raise Draining("The server is shutting down; try another instance.")
        if (seconds := timeout_seconds(request)) is not None:
            handler = _within(seconds, request, handler)
    if route and route.runs_model:
        metrics = app[METRICS]
        metrics.running += 1
        try:
            return await handler(request)
        finally:
            metrics.running -= 1
    return await handler(request)


def _within(seconds: float, request: web.Request, handler: Handler) -> Handler:
    """The client's own deadline, over all there is to do: the body that is yet to come, the queue, the model."""
    request[DEADLINE] = asyncio.get_running_loop().time() + seconds

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            async with asyncio.timeout_at(request[DEADLINE]) as deadline:
                return await handler(request)
        except TimeoutError:
            if deadline.expired():
                raise DeadlineExceeded from None
            raise

    return handle


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_holder(request: web.Request, digests: tuple[bytes, ...]) -> str:
    """Which of the keys the request carries. All are compared, so that the time taken tells nothing."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    sent = digest(key.strip())
    matches = [hmac.compare_digest(sent, known) for known in digests]
    if scheme.lower() != "bearer" or True not in matches:
        raise Unauthorized("A valid API key is required: send it as Authorization: Bearer KEY.")
    return f"key {matches.index(True)}"


def refuse_malformed(app: web.Application, error: BaseException) -> web.Response:
    """The answer to what never became a request."""
    request_id = fresh_label()
    if isinstance(error, ContentEncodingError):  # a coding that aiohttp knows, and has no package for
        error = UnreadableBody(UNKNOWN_ENCODING)
    failure = failure_of(error)
    response = _refuse(app, error, failure, request_id)
    response.headers["X-Request-Id"] = request_id
    response.headers["Server"] = SERVER
    response.force_close()
    app[METRICS].request_done(ELSEWHERE, failure.status, 0.0)
    log.info("malformed request", status=failure.status, reason=type(error).__name__, request_id=request_id)
    return response


def _refuse(app: web.Application, error: BaseException, failure: Failure, request_id: str) -> web.Response:
    if failure.status == 500:
        log.error("request failed", request_id=request_id, exc_info=error)
    return render(failure, app[CONFIG].error_format)


def _record(
    request: web.Request, route: Route | None, status: int, seconds: float, failure: Failure | None = None
) -> None:
    endpoint = route.path if route else ELSEWHERE
    request.app[METRICS].request_done(endpoint, status, seconds)
    quiet = (route and route.open) or not request.app[CONFIG].access_log  # probes and scrapes come all day
    write = log.debug if quiet else log.info
    write(
        "request",
        method=request.method,
        endpoint=endpoint,
        status=status,
        milliseconds=round(1000 * seconds, 2),
        request_id=request[REQUEST_ID],
        **({"error": failure.type} if failure else {}),
    )
