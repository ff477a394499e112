"""Browsers: who may call, and how they are told."""

from __future__ import annotations

import pytest

from carpool.server.config import ServerConfig
from serving import EMBEDDINGS, Served, assert_error, serving

PAGE = "http://example.test"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize("allowed", [(PAGE,), ("*",), ("http://other.test", PAGE)])
async def test_an_allowed_page_may_call_and_read(allowed: tuple[str, ...]) -> None:
    async with serving(ServerConfig(allowed_origins=allowed, api_key=("k",))) as server:
        asked = await server.ask("OPTIONS", EMBEDDINGS, headers=PREFLIGHT)
        assert asked.status == 200
        assert asked.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        called = await server.get("/v1/models", headers={"Origin": PAGE})
        for answer in (asked, called):
            assert answer.headers["Access-Control-Allow-Origin"] in (PAGE, "*")
            assert answer.headers["Vary"] == "Origin"
        assert called.status == 401  # which the page may read too
        exposed = called.headers["Access-Control-Expose-Headers"].split(", ")
        assert all(name in exposed and name in called.headers for name in ("X-Request-Id", "X-Error-Message"))


async def test_it_may_do_what_is_allowed_and_no_more() -> None:
    config = ServerConfig(
        allowed_origins=(PAGE,), allowed_methods=("GET", "POST"), allowed_headers=("Content-Type",)
    )
    async with serving(config) as server:
        for changes, status in (
            ({"Access-Control-Request-Headers": "content-type"}, 200),
            ({"Access-Control-Request-Headers": ""}, 200),
            ({}, 400),  # authorization is not among them
            ({"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": ""}, 400),
        ):
            answer = await server.ask("OPTIONS", EMBEDDINGS, headers=PREFLIGHT | changes)
            assert answer.status == status
            if status == 200:
                assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
                assert answer.headers["Access-Control-Allow-Headers"].lower() == "content-type"


async def test_json_may_be_sent_whatever_headers_are_allowed() -> None:
    config = ServerConfig(allowed_origins=(PAGE,), allowed_headers=("Authorization",))
    async with serving(config) as server:
        wanted = {"Access-Control-Request-Headers": "authorization, content-type"}
        answer = await server.ask("OPTIONS", EMBEDDINGS, headers=PREFLIGHT | wanted)
        assert answer.status == 200
        assert answer.headers["Access-Control-Allow-Headers"] == "authorization, content-type"


@pytest.mark.parametrize("allowed", [(PAGE,), ("*",)])
async def test_with_credentials_the_page_is_named(allowed: tuple[str, ...]) -> None:
    async with serving(ServerConfig(allowed_origins=allowed, allow_credentials=True)) as server:
        for answer in (
            await server.ask("OPTIONS", EMBEDDINGS, headers=PREFLIGHT),
            await server.get("/v1/models", headers={"Origin": PAGE}),
        ):
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"


async def test_nobody_else_may(served: Served) -> None:
    answer = await served.ask("OPTIONS", EMBEDDINGS, headers=PREFLIGHT)
    assert_error(answer, 400, "BadRequestError")
    answer = await served.get("/v1/models", headers={"Origin": PAGE})
    assert answer.status == 200
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_other_options_requests_are_405(served: Served) -> None:
    answer = await served.ask("OPTIONS", EMBEDDINGS)
    assert_error(answer, 405, "MethodNotAllowedError")
    assert answer.headers["Allow"] == "POST"
