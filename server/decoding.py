"""Request bodies: bytes → struct. A strict typed decode for the well-formed; the lax rules for all else.

Whatever the strict decoder accepts, the lax rules read to an equal struct (a test holds them together). So the
usual request costs one pass, and the unusual one gets the reference's leniency and a helpful sentence.
"""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

import msgspec

from carpool.server.errors import InvalidRequest
from carpool.server.lax import read_struct

T = TypeVar("T", bound=msgspec.Struct)

ALL_DIGITS_ALIKE = bytes.maketrans(b"123456789", b"000000000")
MAX_DIGITS = 4300  # of one number: Python's own limit, which the reference inherits


class RequestDecoder(Generic[T]):
    """Decodes requests of one type; made once a type, at import."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._strict = msgspec.json.Decoder(kind)

    def __call__(self, body: bytes) -> T:
        if not _needs_a_second_look(body):
            try:
                return self._strict.decode(body)
            except (msgspec.DecodeError, UnicodeError, RecursionError):
                pass
        return read_struct(self._kind, parse(body))


def _needs_a_second_look(body: bytes) -> bool:
    """What the strict decoder skips unread in unknown fields: broken UTF-8, absurdly long numbers."""
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            return True
    return len(body) > MAX_DIGITS and b"0" * (MAX_DIGITS + 1) in body.translate(ALL_DIGITS_ALIKE)


def parse(body: bytes) -> Any:
    """JSON as Python reads it: NaN, Infinity, a byte order mark and UTF-16 pass."""
    if not body.strip():
        raise InvalidRequest("The body is empty; send a JSON object.")
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except UnicodeError:
        raise InvalidRequest("The body is not valid JSON: it is not UTF-8 text.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError:
        raise InvalidRequest(f"The body holds a number of more than {MAX_DIGITS} digits.") from None
