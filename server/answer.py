"""A struct as the JSON response it is."""

from __future__ import annotations

import msgspec
from aiohttp import web

_encode = msgspec.json.Encoder().encode


def json_answer(body: msgspec.Struct) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")
