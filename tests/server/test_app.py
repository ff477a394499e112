"""The table of routes: every path in all its spellings, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from carpool.server.app import ROUTES, Route
from carpool.server.config import ServerConfig
from fakes import FakeEngine
from serving import EMBEDDINGS, OPEN, Served, assert_error, serving


def concrete(route: Route) -> str:
    return route.path.replace("{model}", "all-MiniLM-L6-v2").replace("{asset}", "docs.css")


def test_no_method_of_a_path_is_there_twice() -> None:
    served = [(method, route.path) for route in ROUTES for method in route.methods]
    assert len(set(served)) == len(served)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_every_path_has_its_spellings(route: Route) -> None:
    path = concrete(route).removesuffix("/")
    async with serving(replace(OPEN, root_path="/proxy/")) as server:
        for spelling in (path, path + "/", "/proxy" + path, "/proxy" + path + "/"):
            for method in route.methods:
                assert (await server.ask(method, spelling, json={})).status in (200, 400)


@pytest.mark.parametrize(
    ("spelling", "status"),
    [
        (b"/v1/embeddings?a=b", 200),
        (b"/v1/%65mbeddings", 200),
        (b"//v1/embeddings", 404),
        (b"/V1/embeddings", 404),
    ],
)
async def test_what_is_not_in_the_table_of_plain_paths_is_the_routers(
    served: Served, spelling: bytes, status: int
) -> None:
    packet = b'POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 15\r\n\r\n{"input": "hi"}'
    answers = [await served.raw(packet % path) for path in (EMBEDDINGS.encode(), spelling) * 2]
    assert [answer.status for answer in answers] == [200, status] * 2


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_is_described(route: Route) -> None:
    assert route.summary.endswith((".", "?"))
    assert (route.request is not None) >= route.runs_model


async def test_get_implies_head(served: Served) -> None:
    for route in ROUTES:
        if "GET" in route.methods:
            answer = await served.ask("HEAD", concrete(route))
            assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", EMBEDDINGS, "POST"),
        ("PUT", EMBEDDINGS, "POST"),
        ("DELETE", EMBEDDINGS + "/", "POST"),
        ("POST", "/health", "GET,HEAD"),
        ("POST", "/v1/models", "GET,HEAD"),
        ("PATCH", "/ping", "GET,HEAD,POST"),
    ],
)
async def test_other_methods_are_405(served: Served, method: str, path: str, allow: str) -> None:
    answer = await served.ask(method, path, json={})
    assert_error(answer, 405, "MethodNotAllowedError")
    assert answer.headers["Allow"] == allow


@pytest.mark.parametrize(
    "path", ["/nope", "//", "/v1/nope", "//v1/embeddings", "/v1", "/V1/models", "/%00", "/v1/%zz"]
)
async def test_other_paths_are_404(served: Served, path: str) -> None:
    answer = await served.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert_error(answer, 404, "NotFoundError")


async def test_asterisk_and_absolute_targets_have_an_answer(served: Served) -> None:
    answer = await served.raw(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert_error(answer, 404, "NotFoundError")
    answer = await served.raw(b"GET http://a/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.status == 200


async def test_a_prefix_may_be_what_paths_begin_with_anyway() -> None:
    async with serving(ServerConfig(root_path="/v1")) as server:
        for path in (EMBEDDINGS, "/embeddings", "/v1" + EMBEDDINGS):
            assert (await server.post(path, {"input": "a"})).status == 200
        for path in ("/v1", "/v1/", "/"):
            assert (await server.get(path)).status == 200
            assert (await server.post(path, {"inputs": "a"})).status == 200
        assert (await server.get("/v1/models")).json["object"] == "list"


async def test_a_prefix_does_not_hide_the_path_of_its_own_name() -> None:
    async with serving(ServerConfig(root_path="/health"), FakeEngine(state="starting")) as server:
        for path in ("/health", "/health/health", "/health/ready"):
            assert_error(await server.get(path), 503, "ServiceUnavailableError")
        assert (await server.get("/")).status == 200
