"""Ids, keys, counting and log lines, on every route alike."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from aiohttp.web_protocol import RequestHandler
from structlog.testing import capture_logs

from carpool.engine.errors import InferenceFailed
from carpool.server import middleware
from carpool.server.app import ROUTES
from carpool.server.config import ServerConfig
from carpool.server.http import Connection
from fakes import FakeEngine
from serving import EMBEDDINGS, Served, assert_error, serving

KEYED = ServerConfig(api_key=("first key", "second"))
GUARDED = [(method, route.path) for route in ROUTES if not route.open for method in route.methods]
OPEN = [
    (method, route.path.replace("{asset}", "docs.css"))
    for route in ROUTES
    if route.open
    for method in route.methods
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), [*GUARDED, ("GET", "/nope"), ("PUT", EMBEDDINGS), ("GET", "//")])
async def test_guarded_and_unknown_paths_want_a_key(method: str, path: str) -> None:
    async with serving(KEYED) as server:
        for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": "Basic second"}, bearer("Second")):
            answer = await server.ask(method, path, headers=headers)
            assert_error(answer, 401, "AuthenticationError")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for headers in (bearer("first key"), bearer("second"), {"Authorization": "bearer second"}):
            assert (await server.ask(method, path, headers=headers)).status != 401


@pytest.mark.parametrize(("method", "path"), OPEN)
async def test_open_routes_want_none(method: str, path: str) -> None:
    async with serving(KEYED) as server:
        assert (await server.ask(method, path)).status == 200
        assert (await server.ask(method, path, headers=bearer("wrong"))).status == 200


async def test_options_wants_no_key() -> None:
    async with serving(KEYED) as server:
        assert (await server.ask("OPTIONS", EMBEDDINGS)).status == 405


async def test_without_keys_any_key_passes(served: Served) -> None:
    answer = await served.post(EMBEDDINGS, {"input": "hi"}, headers=bearer("whatever"))
    assert answer.status == 200


async def test_no_spelling_of_a_path_goes_around_the_key() -> None:
    paths = ("/%69nfo", "//info", "/./info", "/health/../info", "/health/%2e%2e/info", "/health%2f..%2finfo")
    more = (
        "/docs/..%2finfo",
        "/info;x",
        "/INFO",
        "/info/",
        "http://a/info",
        "/info#/health",
        "/health;/../info",
    )
    async with serving(ServerConfig(api_key=("key",))) as server:
        for path in (*paths, *more):
            for method in ("GET", "HEAD", "POST"):
                answer = await server.raw(
                    f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode(), wait=0
                )
                assert answer.status in (401, 404), (method, path)


async def test_a_key_that_is_not_ascii_works() -> None:
    async with serving(ServerConfig(api_key=("schlüssel",))) as server:
        assert (await server.get("/v1/models", headers=bearer("schlüssel"))).status == 200
        assert (await server.get("/v1/models", headers=bearer("schlussel"))).status == 401


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nope"])
async def test_the_request_id_comes_back_on_every_answer(served: Served, path: str) -> None:
    answer = await served.get(path, headers={"X-Request-Id": "mine-1"})
    assert (answer.headers["X-Request-Id"], answer.headers["Server"]) == ("mine-1", "carpool")
    for bad in ("", "x" * 129, "ünicode"):
        fresh = (await served.get(path, headers={"X-Request-Id": bad})).headers["X-Request-Id"]
        assert re.fullmatch("[0-9a-f]{32}", fresh)


async def test_two_live_requests_may_share_an_id(served: Served) -> None:
    served.engine.gate.clear()
    headers = {"X-Request-Id": "same"}
    both = [asyncio.create_task(served.post(EMBEDDINGS, {"input": "a"}, headers=headers)) for _ in range(2)]
    await asyncio.sleep(0.05)
    served.engine.gate.set()
    assert [(await one).json["id"] for one in both] == ["embd-same"] * 2


async def test_the_share_of_the_queue_is_the_keys_or_else_the_address() -> None:
    engine = FakeEngine()
    async with serving(KEYED, engine) as server:
        for key in KEYED.api_key:
            await server.post(EMBEDDINGS, {"input": "hi"}, headers=bearer(key))
    async with serving(engine=engine) as server:
        await server.embed(input="hi")
    assert [call["client"] for call in engine.calls] == ["key 0", "key 1", "127.0.0.1"]


async def test_a_client_that_leaves_cancels_its_work_and_nobody_elses(served: Served) -> None:
    served.engine.gate.clear()
    stays = asyncio.create_task(served.embed(input="mine"))
    leaves = asyncio.create_task(served.embed(input=["text"] * 200))
    while served.engine.waiting_sequences < 201:
        await asyncio.sleep(0.01)
    leaves.cancel()
    while served.engine.waiting_sequences > 1:
        await asyncio.sleep(0.01)
    assert served.engine.cancelled == 200
    served.engine.gate.set()
    assert (await stays).status == 200
    series = (await served.get("/metrics")).body.decode()
    assert 'carpool_queue_sequences{model_name="all-MiniLM-L6-v2"} 0.0' in series
    assert 'carpool_cancelled_total{model_name="all-MiniLM-L6-v2"} 200.0' in series
    assert 'endpoint="/v1/embeddings",model_name="all-MiniLM-L6-v2",status="499"} 1.0' in series


async def test_while_draining_all_but_open_routes_are_turned_away(served: Served) -> None:
    served.engine.drain()
    for method, path in GUARDED:
        answer = await served.ask(method, path)
        assert_error(answer, 503, "ServiceUnavailableError")
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.headers["Connection"] == "close"
    assert (await served.get("/metrics")).status == 200


async def test_the_log_line_names_the_route_and_none_of_the_clients_words(served: Served) -> None:
    with capture_logs() as lines:
        await served.post(EMBEDDINGS, {"input": "secret", "user": "secret"})
        await served.post("/secret", {"input": "secret"})
        await served.embed(input=[5, "secret"])
    assert [(line["endpoint"], line["status"]) for line in lines] == [
        (EMBEDDINGS, 200),
        ("other", 404),
        (EMBEDDINGS, 400),
    ]
    assert "secret" not in str(lines)


async def test_the_answer_leaves_before_its_line_is_written(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    async def finish(connection: Connection, *args: Any) -> Any:
        result = await RequestHandler.finish_response(connection, *args)
        events.append("sent")
        return result

    monkeypatch.setattr(Connection, "finish_response", finish)
    monkeypatch.setattr(middleware, "_record", lambda *args: events.append("recorded"))
    await served.embed(input="hi")
    assert events == ["sent", "recorded"]


async def test_without_an_access_log_only_failures_of_ours_are_logged() -> None:
    async with serving(ServerConfig(access_log=False)) as server:
        with capture_logs() as lines:
            await server.embed(input="hi")
            await server.embed(input=5)
        assert {line["log_level"] for line in lines} == {"debug"}
        server.engine.error = RuntimeError("ours")
        with capture_logs() as lines:
            await server.embed(input="hi")
        assert [line["log_level"] for line in lines] == ["error", "debug"]


async def test_probes_are_logged_at_debug(served: Served) -> None:
    with capture_logs() as lines:
        await served.get("/health")
    assert [line["log_level"] for line in lines] == ["debug"]


@pytest.mark.parametrize(
    "error", [RuntimeError("/secret/path"), InferenceFailed("secret"), KeyError("secret")]
)
async def test_a_failure_of_ours_is_a_500_that_tells_the_log_and_not_the_client(
    served: Served, error: Exception
) -> None:
    served.engine.error = error
    with capture_logs() as lines:
        answer = await served.embed(input="hi")
    message = assert_error(answer, 500, "InternalServerError")
    assert "secret" not in message
    [failure] = [line for line in lines if line["log_level"] == "error"]
    assert failure["exc_info"] is error
    assert failure["request_id"] == answer.headers["X-Request-Id"]
