"""The page that shows the API: it comes with all it needs, under any prefix, and asks nobody else for anything."""

from __future__ import annotations

import re
import sys

import pytest

from carpool.engine.errors import ConfigError
from carpool.server.config import ServerConfig
from carpool.server.handlers import docs
from serving import Served, assert_error, serving


@pytest.mark.parametrize("root_path", ["", "/proxy"])
async def test_the_page_and_all_it_loads_are_served(root_path: str) -> None:
    async with serving(ServerConfig(root_path=root_path, api_key=("secret",))) as server:
        page = await server.get(root_path + "/docs")
        assert page.status == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        html = page.body.decode()
        links = re.findall(r'(?:href|src)="([^"]+)"', html)
        assert len(links) == len(docs.TYPES)
        assert f'data-root="{root_path}"' in html
        for link in links:
            assert link.startswith(f"{root_path}/docs/")
            asset = await server.get(link)
            assert asset.status == 200
            assert asset.headers["Content-Type"].partition(";")[0] == docs.TYPES[link.rpartition("/")[2]]


async def test_without_docs_nothing_describes_the_server() -> None:
    async with serving(ServerConfig(docs=False)) as server:
        for path in ("/docs", "/docs/", "/docs/docs.css", "/openapi.json"):
            assert_error(await server.get(path), 404, "NotFoundError")
        home = (await server.get("/")).body.decode()
        assert "/info" in home
        assert "/docs" not in home
        assert "/openapi.json" not in home


async def test_the_page_may_load_nothing_from_elsewhere(served: Served) -> None:
    page = await served.get("/docs")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"https?:|//", page.body.decode())
    for own in docs.OWN.iterdir():
        assert not re.search(r"https?://", own.read_text())


@pytest.mark.parametrize("name", ["nope.js", "docs.html", "..%2fapp.py", "swagger-ui.js", "LICENSE"])
async def test_only_what_the_page_needs_is_served(served: Served, name: str) -> None:
    assert_error(await served.get(f"/docs/{name}"), 404, "NotFoundError")


def test_a_prefix_cannot_break_out_of_the_page() -> None:
    with pytest.raises(ConfigError, match="--root-path must be a path"):
        ServerConfig(root_path='/"><script>')


async def test_without_the_package_it_says_how_to_get_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs, "find_spec", lambda name: None)
    message = assert_error(await served.get("/docs"), 404, "NotFoundError")
    assert "pip install 'carpool[docs]'" in message
    assert_error(await served.get("/docs/swagger-ui.css"), 404, "NotFoundError")


async def test_the_package_is_not_imported(served: Served) -> None:
    await served.get("/docs/swagger-ui.css")
    assert "flask_swagger_ui" not in sys.modules
