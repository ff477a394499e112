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
