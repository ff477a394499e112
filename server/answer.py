"""A struct, or a list of them, as the JSON response it is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

Body = msgspec.Struct | Sequence[msgspec.Struct] | Sequence[Sequence[msgspec.Struct]] | msgspec.Raw

_encode = msgspec.json.Encoder().encode


def json_answer(body: Body) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")
