"""What may stand in the headers we read."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from typing import Any

import pytest
import uvloop

from carpool.server.headers import fresh_label, label
from serving import EMBEDDINGS, Served, assert_error


@pytest.mark.parametrize("value", ["a", "req-1", "x" * 128, "with space", '"quoted"'])
def test_a_printable_label_is_kept(value: str) -> None:
    assert label(value) == value


@pytest.mark.parametrize("value", [None, "", "x" * 129, "tab\t", "bell\x07", "line\nbreak", "é", "\ud800"])
def test_any_other_is_not(value: str | None) -> None:
    assert label(value) is None


def test_a_fresh_label_is_32_hex_and_new() -> None:
    assert len({fresh_label() for _ in range(100)}) == 100
    assert int(fresh_label(), 16) >= 0
    assert len(fresh_label()) == 32


@pytest.mark.parametrize("value", ["1", "0.5", "1e2", " 3 "])
async def test_a_timeout_is_passed_on(served: Served, value: str) -> None:
    assert (
        await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": value})
    ).status == 200
    left = served.engine.calls[0]["timeout"]
    assert isinstance(left, float)
    assert 0.8 * float(value) < left <= float(value)


def test_a_deadline_of_the_servers_loop_is_one_by_the_engines_clock() -> None:
    async def apart() -> float:
        return asyncio.get_running_loop().time() - time.monotonic()

    assert abs(uvloop.run(apart())) < 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1s"])
async def test_a_timeout_must_be_positive_and_finite(served: Served, value: str) -> None:
    answer = await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": value})
    assert_error(answer, 400, "BadRequestError", "X-Request-Timeout")
    assert served.engine.calls == []


async def test_the_deadline_runs_while_the_body_comes(served: Served) -> None:
    """From the headers on: the body that is half there, and what is left of the time for the engine."""
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nX-Request-Timeout: %b\r\n"
        b"Content-Length: 15\r\nConnection: close\r\n\r\n"
    )
    answer = await served.raw(head % b"0.05" + b'{"input"', wait=0.1)
    assert_error(answer, 504, "TimeoutError")
    assert served.engine.calls == []
    answer = await served.raw(head % b"60" + b'{"input"', b': "hi"}', wait=0.3)
    assert answer.status == 200
    left = served.engine.calls[0]["timeout"]
    assert isinstance(left, float)
    assert 50 < left < 59.8


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})]
)
async def test_the_deadline_holds_where_no_model_runs(
    served: Served, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(served.engine, path[1:], never)
    answer = await served.post(path, body, headers={"X-Request-Timeout": "0.05"})
    assert_error(answer, 504, "TimeoutError")


async def test_an_engine_that_does_not_look_at_the_time_is_left_all_the_same(served: Served) -> None:
    served.engine.gate.clear()
    answer = await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": "0.05"})
    assert_error(answer, 504, "TimeoutError")
    assert served.engine.cancelled == 1


async def test_a_timeout_of_the_engines_own_is_not_the_clients(served: Served) -> None:
    served.engine.error = TimeoutError("a socket's")
    answer = await served.post(EMBEDDINGS, {"input": "hi"}, headers={"X-Request-Timeout": "60"})
    assert_error(answer, 500, "InternalServerError")


def coded(coding: str) -> bytes:
    return (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Encoding: %b\r\nContent-Length: 15\r\n\r\n"
        b'{"input": "hi"}' % coding.encode()
    )


@pytest.mark.parametrize("coding", ["br", "zstd"])
async def test_a_coding_without_its_package_is_one_we_do_not_know(
    served: Served, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.http_parser.HAS_BROTLI", False)
    monkeypatch.setattr("aiohttp.http_parser.HAS_ZSTD", False)
    message = assert_error(await served.raw(coded(coding)), 400, "BadRequestError")
    assert message == assert_error(await served.raw(coded("rot13")), 400, "BadRequestError")


async def test_the_codings_that_are_named_are_those_that_pass(served: Served) -> None:
    answer = await served.raw(coded("rot13"))
    named = assert_error(answer, 400, "BadRequestError").partition("one of ")[2].rstrip(".").split(", ")
    assert {"identity", "gzip", "deflate"} <= set(named)
    compress: dict[str, Any] = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}
    for name in named:
        if name == "br":
            compress[name] = pytest.importorskip("brotli").compress
        if name == "zstd":
            compress[name] = pytest.importorskip("backports.zstd").compress
        headers = {"Content-Encoding": name}
        assert (
            await served.post(EMBEDDINGS, compress[name](b'{"input": "hi"}'), headers=headers)
        ).status == 200
