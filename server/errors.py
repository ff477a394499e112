"""What went wrong, as HTTP: one table from error class to status and type, and the body in one shape.

The server's own refusals are the small family below; the rest come from `engine/errors.py` and from aiohttp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from carpool.engine import errors as engine
from carpool.server.config import ErrorFormat


class Refusal(Exception):
    """The server says no before the engine is asked. `param` names the field to blame, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(Refusal):
    """Well-formed HTTP with a body or header that cannot be served."""


class UnreadableBody(Refusal):
    """The body broke off or cannot be decoded; what follows it on the connection is noise."""


class Unauthorized(Refusal):
    """No key, or not one of ours."""


class UnknownModel(Refusal):
    """The request names a model that is not served here."""


class NotInstalled(Refusal):
    """The page is there in installations that have the package it is made of."""


class BodyTooLarge(Refusal):
    """More bytes than --max-body-size; the rest is not read."""


class UnsupportedMediaType(Refusal):
    """A Content-Type that says the body is not JSON."""


MOST_IN_HEADER = 1000  # characters of a message

BAD_REQUEST = (400, "BadRequestError")
UNAUTHORIZED = (401, "AuthenticationError")
NOT_FOUND = (404, "NotFoundError")
METHOD_NOT_ALLOWED = (405, "MethodNotAllowedError")
TOO_LARGE = (413, "PayloadTooLargeError")
UNSUPPORTED_MEDIA = (415, "UnsupportedMediaTypeError")
INTERNAL = (500, "InternalServerError")
UNAVAILABLE = (503, "ServiceUnavailableError")
TIMED_OUT = (504, "TimeoutError")

STATUS: dict[type[BaseException], tuple[int, str]] = {
    engine.InvalidInput: BAD_REQUEST,
    engine.EmptyInput: BAD_REQUEST,
    engine.InputTooLong: BAD_REQUEST,
    engine.TokenOutOfVocabulary: BAD_REQUEST,
    engine.InvalidParameter: BAD_REQUEST,
    engine.UnknownAdapter: NOT_FOUND,
    engine.UnsupportedTask: BAD_REQUEST,
    engine.NotReady: UNAVAILABLE,
    engine.Draining: UNAVAILABLE,
    engine.Overloaded: UNAVAILABLE,
    engine.EngineDead: UNAVAILABLE,
    engine.DeadlineExceeded: TIMED_OUT,
    engine.InferenceFailed: INTERNAL,
    engine.Undone: INTERNAL,
    InvalidRequest: BAD_REQUEST,
    UnreadableBody: BAD_REQUEST,
    Unauthorized: UNAUTHORIZED,
    UnknownModel: NOT_FOUND,
    NotInstalled: NOT_FOUND,
    BodyTooLarge: TOO_LARGE,
    UnsupportedMediaType: UNSUPPORTED_MEDIA,
    HttpProcessingError: BAD_REQUEST,
    web.HTTPNotFound: NOT_FOUND,
    web.HTTPMethodNotAllowed: METHOD_NOT_ALLOWED,
    web.HTTPClientError: BAD_REQUEST,
}
# After these the connection is of no more use, to the client or to us.
CLOSING = (engine.Draining, engine.EngineDead, UnreadableBody, BodyTooLarge, HttpProcessingError)


@dataclass(frozen=True, slots=True)
class Failure:
    """One answer other than success, in whichever shape it will be rendered."""

    status: int
    type: str
    message: str
    param: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    close: bool = False


def failure_of(error: BaseException) -> Failure:
    """The answer that `error` deserves. One without a row is ours to fix: 500, and not a word about it."""
    status, kind = next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), INTERNAL)
    return Failure(
        status=status,
        type=kind,
        message=_message(error, status),
        param=getattr(error, "param", None),
        headers=_headers(error),
        close=isinstance(error, CLOSING),
    )


def _message(error: BaseException, status: int) -> str:
    match error:
        case engine.InferenceFailed():
            return "The model failed on this input; the server's log has the details under this request's id."
        case _ if status >= 500 and not isinstance(error, engine.EngineError):
            return "The server failed on this request; its log has the details under this request's id."
        case web.HTTPNotFound():
            return "Nothing is served at this path."
        case web.HTTPMethodNotAllowed():
            return f"This path answers {error.headers['Allow'].replace(',', ', ')} only, not {error.method}."
        case LineTooLong():
            return "The request line or one of the headers is too long."
        case HttpProcessingError():
            return "The request is not valid HTTP."
        case web.HTTPException():
            return f"{error.reason}."
        case engine.DeadlineExceeded():
            return str(error) or "The request's own deadline passed before its answer was ready."
        case _:
            return str(error)


def _headers(error: BaseException) -> tuple[tuple[str, str], ...]:
    match error:
        case engine.Unavailable():
            return (("Retry-After", str(max(1, math.ceil(error.retry_after)))),)
        case web.HTTPMethodNotAllowed():
            return (("Allow", error.headers["Allow"]),)
        case Unauthorized():
            return (("WWW-Authenticate", "Bearer"),)
        case _:
            return ()


def _one_line(message: str) -> str:
    """For a header, where some clients (huggingface_hub) look for the message and nowhere else."""
    text = message.encode("ascii", "replace").decode()[:MOST_IN_HEADER]
    return "".join(c if c.isprintable() else " " for c in text)


def render(failure: Failure, shape: ErrorFormat) -> web.Response:
    """The response for `failure`, as the reference's documentation prints it or as the OpenAI API has it."""
    facts = {
        "message": failure.message.encode("utf-8", "replace").decode(),  # a lone surrogate has no bytes
        "type": failure.type,
        "param": failure.param,
        "code": failure.status,
    }
    body = msgspec.json.encode({"error": facts} if shape == "openai" else {"object": "error", **facts})
    response = web.Response(body=body, status=failure.status, content_type="application/json")
    response.headers.extend(failure.headers)
    response.headers["X-Error-Message"] = _one_line(failure.message)
    if failure.close:
        response.force_close()
    return response
