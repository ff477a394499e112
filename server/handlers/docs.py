"""The API described: /openapi.json to programs, and /docs, which shows it, to people.

The page is Swagger UI as the package flask-swagger-ui carries it, so that no browser has to ask the internet for
anything. Only its files are wanted: importing the package would load Flask.
"""

from __future__ import annotations

from html import escape
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

from carpool.server.errors import NotInstalled
from carpool.server.keys import CONFIG, OPENAPI

OWN = Path(__file__).resolve().parent.parent / "pages"
TYPES = {
    "docs.css": "text/css",
    "docs.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
}
# What the page may load: this server's own files. Swagger UI sets styles and draws icons from inside its script.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
)


async def show_openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


async def show_docs(request: web.Request) -> web.Response:
    if _bundle() is None:
        raise NotInstalled("This page needs a package that is not installed: pip install 'carpool[docs]'.")
    page = (OWN / "docs.html").read_text(encoding="utf-8")
    page = page.replace("{root}", escape(quote(request.app[CONFIG].root_path)))
    headers = {"Content-Security-Policy": POLICY}
    return web.Response(text=page, content_type="text/html", headers=headers)


async def show_asset(request: web.Request) -> web.Response:
    """A file that the page loads, its own or Swagger UI's."""
    name = request.match_info["asset"]
    for folder in (OWN, _bundle()):
        if name in TYPES and folder is not None and (folder / name).is_file():
            headers = {"Cache-Control": "max-age=3600"}
            return web.Response(body=(folder / name).read_bytes(), content_type=TYPES[name], headers=headers)
    raise web.HTTPNotFound


def _bundle() -> Path | None:
    """The folder with Swagger UI's files, where they are installed."""
    spec = find_spec("flask_swagger_ui")
    return Path(spec.origin).parent / "dist" if spec and spec.origin else None
