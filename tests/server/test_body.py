"""The body: decompressed, within the limit, and never waited for without an end."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from aiohttp import web
from aiohttp.compression_utils import ZLibDecompressor

from carpool.server import body
from carpool.server.config import ServerConfig
from serving import EMBEDDINGS, Served, assert_error, serving

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n"
JSON = b'{"input": "hi"}'


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=latin-1",
    ],
)
async def test_json_media_types_pass(served: Served, content_type: str) -> None:
    assert (await served.post(EMBEDDINGS, JSON, headers={"Content-Type": content_type})).status == 200


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "text/json", "application/vnd.api+json", "application/x-www-form-urlencoded", ""],
)
async def test_other_media_types_are_415(served: Served, content_type: str) -> None:
    answer = await served.post(EMBEDDINGS, JSON, headers={"Content-Type": content_type})
    assert_error(answer, 415, "UnsupportedMediaTypeError")


async def test_an_absent_media_type_passes(served: Served) -> None:
    answer = await served.raw(HEAD + b"Connection: close\r\nContent-Length: 15\r\n\r\n" + JSON)
    assert answer.status == 200


@pytest.mark.parametrize(("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies_are_read(served: Served, coding: str, compress: object) -> None:
    data = compress(JSON)  # type: ignore[operator]
    assert (await served.post(EMBEDDINGS, data, headers={"Content-Encoding": coding})).status == 200


async def test_a_declared_length_over_the_limit_is_refused_unread() -> None:
    async with serving(ServerConfig(max_body_size=100)) as server:
        answer = await server.raw(HEAD + b"Content-Length: 101\r\nExpect: 100-continue\r\n\r\n")
        message = assert_error(answer, 413, "PayloadTooLargeError")
        assert "100 bytes" in message
        assert answer.headers["Connection"] == "close"


async def test_a_chunked_body_over_the_limit_is_refused() -> None:
    async def chunks() -> object:
        for _ in range(100):
            yield b" " * 1000

    async with serving(ServerConfig(max_body_size=5000)) as server:
        answer = await server.ask(
            "POST", EMBEDDINGS, data=chunks(), headers={"Content-Type": "application/json"}
        )
        assert_error(answer, 413, "PayloadTooLargeError")


async def test_a_compressed_body_counts_at_its_full_size() -> None:
    async with serving(ServerConfig(max_body_size=1 << 20)) as server:
        bomb = gzip.compress(b" " * (64 << 20))
        answer = await server.post(EMBEDDINGS, bomb, headers={"Content-Encoding": "gzip"})
        assert_error(answer, 413, "PayloadTooLargeError")


@pytest.mark.parametrize(
    ("config", "status"), [(ServerConfig(max_body_size=100), 413), (ServerConfig(api_key=("key",)), 401)]
)
async def test_what_is_refused_is_not_unpacked_any_further(
    config: ServerConfig, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = 0

    class Counting(ZLibDecompressor):
        def decompress_sync(self, data: Any, max_length: int = 0) -> bytes:
            nonlocal unpacked
            piece = super().decompress_sync(data, max_length)
            unpacked += len(piece)
            return piece

    monkeypatch.setattr("aiohttp.http_parser.ZLibDecompressor", Counting)
    async with serving(config) as server:
        bomb = gzip.compress(b" " * (16 << 20))
        answer = await server.post(EMBEDDINGS, bomb, headers={"Content-Encoding": "gzip"})
        assert (answer.status, answer.headers["Connection"]) == (status, "close")
        await asyncio.sleep(0.1)  # what comes after the answer
    assert 0 < unpacked < 4 << 20


async def test_others_have_their_turn_while_a_body_is_unpacked(served: Served) -> None:
    bomb = gzip.compress(b" " * (32 << 20) + JSON)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    read = body._read

    async def watched(request: web.Request, limit: int) -> bytes:
        other = asyncio.ensure_future(others())
        try:
            return await read(request, limit)
        finally:
            other.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body, "_read", watched)
        assert (await served.post(EMBEDDINGS, bomb, headers={"Content-Encoding": "gzip"})).status == 200
    assert turns >= 32


async def test_a_body_at_the_limit_passes() -> None:
    async with serving(ServerConfig(max_body_size=len(JSON))) as server:
        assert (await server.post(EMBEDDINGS, JSON)).status == 200
        assert (await server.post(EMBEDDINGS, JSON + b" ")).status == 413


async def test_a_large_body_is_decoded_beside_the_loop(served: Served) -> None:
    texts = ["x" * 100] * 12_000
    assert len(json.dumps(texts)) > body.LARGE
    answer = await served.embed(input=texts)
    assert len(answer.json["data"]) == len(texts)


async def test_expect_continue_is_answered_once_the_body_is_wanted(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n")
    assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
    writer.write(JSON)
    await reader.readline()
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()


async def test_a_body_that_stops_coming_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "IDLE_SECONDS", 0.05)
    answer = await served.raw(HEAD + b"Content-Length: 15\r\n\r\n{", wait=0.2)
    assert "did not come" in assert_error(answer, 400, "BadRequestError")


async def test_a_body_that_trickles_in_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never silent for long, and still too slow."""
    monkeypatch.setattr(body, "IDLE_SECONDS", 0.1)
    packets = [b" "] * 14
    answer = await served.raw(HEAD + b"Content-Length: 15\r\n\r\n", *packets, wait=0.02)
    assert "did not come in time" in assert_error(answer, 400, "BadRequestError")


async def test_a_large_body_may_take_its_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a silence may last, at more than the least rate."""
    monkeypatch.setattr(body, "IDLE_SECONDS", 0.1)
    packets = [b" " * 4096] * 14
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (14 * 4096 + len(JSON))
    assert (await served.raw(head, *packets, JSON, wait=0.02)).status == 200


async def test_a_client_that_leaves_midway_leaves_nothing_behind(served: Served) -> None:
    tasks = len(asyncio.all_tasks())
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(HEAD + b"Content-Length: 15\r\n\r\n{")
    await asyncio.sleep(0.05)
    writer.close()
    await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == tasks
    assert served.engine.calls == []
