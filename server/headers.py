"""Request headers with a meaning here: what may be said in them, and what is made of it."""

from __future__ import annotations

import math
from random import getrandbits

from aiohttp import web
from aiohttp.compression_utils import HAS_BROTLI, HAS_ZSTD

from carpool.server.errors import InvalidRequest, UnreadableBody, UnsupportedMediaType

MAX_LABEL = 128
CONTENT_ENCODINGS = (
    "identity",
    "gzip",
    "deflate",
    *["br"] * HAS_BROTLI,
    *["zstd"] * HAS_ZSTD,
)  # what aiohttp undoes
UNKNOWN_ENCODING = f"Content-Encoding must be one of {', '.join(CONTENT_ENCODINGS)}."


def label(value: str | None) -> str | None:
    """A client's own request id, if it is one we are willing to echo and log."""
    if value and len(value) <= MAX_LABEL and value.isascii() and value.isprintable():
        return value
    return None


def fresh_label() -> str:
    """Not a secret, only unlike all others; the system's randomness would let go of Python's lock at every request."""
    return f"{getrandbits(128):032x}"


def timeout_seconds(request: web.Request) -> float | None:
    """The deadline a client sets itself with X-Request-Timeout."""
    value = request.headers.get("X-Request-Timeout")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise InvalidRequest("X-Request-Timeout must be a positive number of seconds.", "X-Request-Timeout")
    return seconds


def require_json(request: web.Request) -> None:
    """An absent Content-Type passes: curl users forget it, and the body says what it is."""
    value = request.headers.get("Content-Type")
    if value is None or value == "application/json":
        return
    if value.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("The body must be JSON: send it with Content-Type: application/json.")


def require_known_encoding(request: web.Request) -> None:
    """aiohttp would hand over a body whose coding it does not know as if it were plain."""
    value = request.headers.get("Content-Encoding")
    if value and value.strip().lower() not in CONTENT_ENCODINGS:
        raise UnreadableBody(UNKNOWN_ENCODING)
