"""Every error has its row, and both shapes can be read by those who expect them."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from carpool.engine.errors import EngineError, InferenceFailed, InvalidInput, Unavailable
from carpool.server.config import ErrorFormat, ServerConfig
from carpool.server.errors import STATUS, Failure, Refusal, failure_of, render
from fakes import engine_errors
from serving import assert_error, serving


def make(cls: type[EngineError]) -> EngineError:
    if issubclass(cls, InvalidInput):
        return cls("A sentence.", "input")
    return cls("A sentence.", 2.5) if issubclass(cls, Unavailable) else cls("A sentence.")


@pytest.mark.parametrize("cls", [InferenceFailed, *engine_errors()])
def test_every_leaf_of_the_engines_family_has_a_row(cls: type[EngineError]) -> None:
    assert cls in STATUS
    failure = failure_of(make(cls))
    assert (failure.status, failure.type) == STATUS[cls]
    if failure.status == 400:
        assert (failure.message, failure.param) == ("A sentence.", "input")
    if failure.status == 503:
        assert failure.headers == (("Retry-After", "3"),)
    if not issubclass(cls, InferenceFailed):
        assert failure.message == "A sentence."


@pytest.mark.parametrize("cls", Refusal.__subclasses__())
def test_every_refusal_of_the_server_has_a_row(cls: type[Refusal]) -> None:
    assert cls in STATUS
    assert failure_of(cls("Why.", "field")).param == "field"


def test_an_error_nobody_foresaw_is_a_500_without_details() -> None:
    failure = failure_of(ZeroDivisionError("/home/secret"))
    assert (failure.status, failure.type) == (500, "InternalServerError")
    assert "secret" not in failure.message


def test_aiohttps_other_client_errors_are_400() -> None:
    assert failure_of(web.HTTPExpectationFailed()).status == 400


def test_retry_after_is_at_least_a_second() -> None:
    for error in engine_errors():
        if issubclass(error, Unavailable):
            assert failure_of(error("Later.", 0.0)).headers == (("Retry-After", "1"),)


def test_the_flat_shape_is_the_documented_one() -> None:
    body = render(Failure(400, "BadRequestError", "Why."), "flat").body
    assert body == b'{"object":"error","message":"Why.","type":"BadRequestError","param":null,"code":400}'


def test_the_openai_shape_is_nested() -> None:
    body = json.loads(bytes(render(Failure(404, "NotFoundError", "Why.", "model"), "openai").body))  # type: ignore[arg-type]
    assert body == {"error": {"message": "Why.", "type": "NotFoundError", "param": "model", "code": 404}}


def test_a_message_without_an_encoding_is_rendered_all_the_same() -> None:
    assert b"?" in bytes(render(Failure(404, "NotFoundError", "\ud800"), "flat").body)  # type: ignore[arg-type]


async def test_the_format_holds_on_every_route() -> None:
    async with serving(ServerConfig(error_format="openai")) as server:
        for path in ("/nope", "/v1/embeddings", "/v1/models/nope"):
            assert set((await server.get(path)).json) == {"error"}
    async with serving() as server:
        assert_error(await server.get("/nope"), 404, "NotFoundError")


@pytest.mark.parametrize("error_format", ["flat", "openai"])
async def test_the_openai_client_reads_both_shapes(error_format: ErrorFormat) -> None:
    async with (
        serving(ServerConfig(error_format=error_format)) as server,
        AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(BadRequestError) as caught:
            await client.embeddings.create(model="all-MiniLM-L6-v2", input="a", dimensions=4, user="u")
        assert "does not support matryoshka" in str(caught.value)
        with pytest.raises(BadRequestError) as caught:
            await client.embeddings.create(model="all-MiniLM-L6-v2", input=[])
        error = caught.value
        assert (error.type, error.param, int(error.code or 0)) == ("BadRequestError", "input", 400)
        with pytest.raises(NotFoundError):
            await client.embeddings.create(model="nope", input="a")


@pytest.mark.parametrize("message", ["Why.", "one\r\nSet-Cookie: a=b\ttwo\x00", "é 文 \ud800", "x" * 5000])
def test_the_message_is_in_a_header_too_where_it_is_one_line(message: str) -> None:
    told = render(Failure(400, "BadRequestError", message), "flat").headers["X-Error-Message"]
    assert told.isascii()
    assert told.isprintable()
    assert len(told) == min(len(message), 1000)
    assert [a for a, b in zip(told, message, strict=False) if a != b] == [
        "?" if not b.isascii() else " " for b in message if not (b.isascii() and b.isprintable())
    ]
