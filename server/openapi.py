"""The OpenAPI 3.1 document: made from the table of routes and the structs on the wire, once an application."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from carpool import __version__
from carpool.server import errors, protocol, schemas
from carpool.server.config import ErrorFormat
from carpool.server.fields import Schema

if TYPE_CHECKING:
    from carpool.server.app import Route

JSON = "application/json"
BYTES = "application/octet-stream"
DESCRIPTION = """\
Texts in; vectors, scores or classes out.

* A field that is `null` counts as absent, and unknown fields are ignored.
* Numbers and booleans may also come as texts (`"32"`, `"true"`), integers as `32.0`; texts never as numbers.
* `GET` implies `HEAD`, and a slash at the end of a path changes nothing.
* Every failure, of whatever kind, has one shape, and its status in `code`.
"""

REQUEST_ID = {"type": "string", "description": "The client's own id of the request, or a fresh one."}
PARAMETERS: dict[str, Schema] = {
    "RequestId": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "A label of at most 128 printable ASCII characters, which comes back with the answer.",
        "schema": {"type": "string"},
    },
    "RequestTimeout": {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds after which the answer is of no more use: 504 then, and no work wasted.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
}
HEADERS: dict[str, Schema] = {
    "RequestId": {"required": True, "schema": REQUEST_ID},
    "ServerTiming": {
        "required": True,
        "description": "Milliseconds spent in each stage: tokenize, queue, forward, encode.",
        "schema": {"type": "string"},
    },
    "RetryAfter": {
        "required": True,
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Authenticate": {"required": True, "schema": {"const": "Bearer"}},
    "ErrorMessage": {
        "required": True,
        "description": "The message once more, on one line of ASCII.",
        "schema": {"type": "string"},
    },
    "Metadata": {
        "description": "With `encoding_format` bytes: where in the body each vector lies.",
        "content": {JSON: {"schema": schemas.reference(protocol.BinaryMetadata)}},
    },
}
EXTRA_HEADERS = {
    errors.UNAUTHORIZED: {"WWW-Authenticate": "Authenticate"},
    errors.UNAVAILABLE: {"Retry-After": "RetryAfter"},
}


@cache
def describe(routes: tuple[Route, ...], guarded: bool, root_path: str, error_format: ErrorFormat) -> bytes:
    """The document as it is served; `guarded` by a key or not."""
    kinds = sorted(set(errors.STATUS.values()))
    components: Schema = {
        "schemas": _schemas(routes, error_format),
        "parameters": PARAMETERS,
        "headers": HEADERS,
        "responses": {kind: _failure(status, kind, error_format) for status, kind in kinds},
    }
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "carpool",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": quote(root_path) or "/"}],
        "paths": _paths(routes, guarded),
        "components": components,
    }
    return msgspec.json.encode(document)


def _paths(routes: tuple[Route, ...], guarded: bool) -> dict[str, Schema]:
    """What each path does; the methods of one may be of several routes."""
    paths: dict[str, Schema] = {}
    for route in routes:
        paths.setdefault(route.path, {}).update(_operations(route, guarded))
    return paths


def _schemas(routes: tuple[Route, ...], shape: ErrorFormat) -> dict[str, Schema]:
    requests = [route.request for route in routes if route.request]
    responses = [route.response for route in routes if route.response and not _is_media_type(route.response)]
    return schemas.components(requests, [*responses, protocol.BinaryMetadata]) | {"Error": _error(shape)}


def _is_media_type(response: Any) -> bool:
    return isinstance(response, str)


def _operations(route: Route, guarded: bool) -> Iterator[tuple[str, Schema]]:
    """What each method of a path does. A body goes with POST only."""
    for method in route.methods:
        operation: Schema = {
            "operationId": _identifier(method, route.path),
            "summary": route.summary,
            "tags": [route.handler.__module__.rpartition(".")[2]],
            "parameters": list(_parameters(route)),
            "responses": dict(_responses(route, guarded)),
        }
        if route.request and method == "POST":
            body = {"schema": schemas.reference(route.request)}
            operation["requestBody"] = {"required": True, "content": {JSON: body}}
        if guarded and not route.open:
            operation["security"] = [{"key": []}]
        yield method.lower(), operation


def _identifier(method: str, path: str) -> str:
    """A name for generated clients: post_v1_embeddings."""
    words = "".join(c if c.isalnum() else " " for c in path).split()
    return "_".join((method.lower(), *words))


def _parameters(route: Route) -> Iterator[Schema]:
    for name in (part[1:-1] for part in route.path.split("/") if part.startswith("{")):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    yield {"$ref": "#/components/parameters/RequestId"}
    if route.runs_model:
        yield {"$ref": "#/components/parameters/RequestTimeout"}


def _responses(route: Route, guarded: bool) -> Iterator[tuple[str, Schema]]:
    headers = {"X-Request-Id": "RequestId"}
    if route.runs_model:
        headers["Server-Timing"] = "ServerTiming"
    if _may_be_binary(route):
        headers["metadata"] = "Metadata"
    yield "200", {"description": "As asked.", "headers": _headers(headers), "content": _content(route)}
    for status, kind in sorted(_failures(route, guarded)):
        yield str(status), {"$ref": f"#/components/responses/{kind}"}


def _content(route: Route) -> Schema:
    if route.response is None:
        return {}
    if _is_media_type(route.response):
        return {route.response: {"schema": {"type": "string"}}}
    content: Schema = {JSON: {"schema": schemas.reference(route.response)}}
    if _may_be_binary(route):
        content[BYTES] = {"schema": {"type": "string", "contentMediaType": BYTES}}
    return content


def _may_be_binary(route: Route) -> bool:
    """Requests that choose an encoding_format can choose bytes."""
    return any(issubclass(kind, protocol.FormattedRequest) for kind in schemas.structs(route.request))


def _failures(route: Route, guarded: bool) -> Iterator[tuple[int, str]]:
    """Which refusals a route knows; any route meets malformed HTTP and our own mistakes."""
    yield errors.BAD_REQUEST
    yield errors.INTERNAL
    if not route.open:
        yield errors.UNAVAILABLE  # the server drains
    elif route.response is None:
        yield errors.UNAVAILABLE  # to a probe that is an answer
    if guarded and not route.open:
        yield errors.UNAUTHORIZED
    if route.request or "{" in route.path or route.path == "/docs":
        yield errors.NOT_FOUND  # a model or a file that is not here; the page, where its package is not
    if route.request:
        yield errors.TOO_LARGE
        yield errors.UNSUPPORTED_MEDIA
    if route.runs_model:
        yield errors.TIMED_OUT


def _failure(status: int, kind: str, shape: ErrorFormat) -> Schema:
    """One refusal, its status and type spelled out."""
    facts: Schema = {"properties": {"type": {"const": kind}, "code": {"const": status}}}
    if shape == "openai":
        facts = {"properties": {"error": facts}}
    headers = {"X-Request-Id": "RequestId", "X-Error-Message": "ErrorMessage"}
    headers |= EXTRA_HEADERS.get((status, kind), {})
    return {
        "description": kind,
        "headers": _headers(headers),
        "content": {JSON: {"schema": {"allOf": [{"$ref": "#/components/schemas/Error"}, facts]}}},
    }


def _error(shape: ErrorFormat) -> Schema:
    """The body of every failure, as `errors.render` writes it."""
    facts: Schema = {
        "message": {"type": "string", "description": "One sentence that a person can act on."},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"], "description": "The field to blame, if one is."},
        "code": {"type": "integer", "description": "The HTTP status."},
    }
    if shape == "openai":
        return _object({"error": _object(facts)})
    return _object({"object": {"const": "error"}, **facts})


def _object(fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(fields)}


def _headers(names: dict[str, str]) -> Schema:
    return {header: {"$ref": f"#/components/headers/{name}"} for header, name in names.items()}
