"""Large answers leave in slices: the same bytes, made beside the loop, and no faster than the client takes them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from carpool.server import answer, encoding, slices
from carpool.server.answer import HOLE, json_around
from carpool.server.encoding import bare_array
from carpool.server.handlers import vectors
from carpool.server.slices import Array
from fakes import FAKE_CLASSIFIER, FAKE_CROSS_ENCODER, FAKE_M3, FakeEngine
from serving import EMBEDDINGS, Answer, Served, assert_error, serving

TEXTS = ["ab", "cde", "f" * 40, "", 'é\n\0"', "z"]
WIDE = replace(FAKE_M3, tasks=FAKE_M3.tasks | {"classify"}, labels=("a", None, "c"))
ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    (EMBEDDINGS, {"input": TEXTS}),
    (EMBEDDINGS, {"input": TEXTS, "encoding_format": "base64"}),
    (
        EMBEDDINGS,
        {"input": TEXTS, "encoding_format": "base64", "embed_dtype": "float16", "endianness": "big"},
    ),
    (EMBEDDINGS, {"input": TEXTS, "encoding_format": "bytes", "embed_dtype": "fp8_e4m3"}),
    ("/pooling", {"input": TEXTS, "task": "token_embed"}),
    ("/pooling", {"input": TEXTS, "task": "token_embed", "encoding_format": "base64"}),
    ("/pooling", {"input": TEXTS, "task": "token_embed", "encoding_format": "bytes_only"}),
    ("/pooling", {"input": TEXTS, "task": "embed&token_embed&sparse_embed"}),
    ("/pooling", {"input": TEXTS, "task": "embed&token_embed", "encoding_format": "base64"}),
    ("/classify", {"input": TEXTS}),
    ("/score", {"queries": "a", "documents": TEXTS}),
    ("/rerank", {"query": "a", "documents": TEXTS, "top_n": 4}),
    ("/rerank", {"query": "a", "documents": TEXTS, "return_documents": False}),
    ("/rerank", {"query": "a", "texts": TEXTS, "return_text": True}),
    ("/v2/embed", {"texts": TEXTS, "embedding_types": ["float", "ubinary", "binary", "base64"]}),
    ("/embed", {"inputs": TEXTS}),
    ("/embed_all", {"inputs": TEXTS}),
    ("/embed_sparse", {"inputs": TEXTS}),
    ("/predict", {"inputs": [[text] for text in TEXTS]}),
    ("/invocations", {"input": TEXTS}),
    ("/tokenize", {"prompt": 'é\n"' * 50, "return_token_strs": True}),
    ("/detokenize", {"tokens": [97, 98, 0, 34, 92, 233] * 50}),
]
IDENTITY = {"X-Request-Id": "the-same"}


def engine_for(path: str) -> FakeEngine:
    if path in ("/score", "/rerank"):
        return FakeEngine(FAKE_CROSS_ENCODER)
    return FakeEngine(FAKE_CLASSIFIER if path in ("/classify", "/predict") else WIDE)


def timeless(found: Answer) -> bytes:
    metadata = found.headers.get("metadata", "").encode()
    return re.sub(rb'"created":\d+', b"", metadata + found.body)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_every_endpoint_gives_the_same_in_slices_and_at_once(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(engine=engine_for(path)) as server:
        once = await server.post(path, body, headers=IDENTITY)
        assert once.status == 200
        assert "Transfer-Encoding" not in once.headers

        threads: set[int] = set()
        gathered = answer._gathered

        def watched(slices: Iterator[bytes]) -> Iterator[bytes]:
            for piece in gathered(slices):
                threads.add(threading.get_ident())
                yield piece

        monkeypatch.setattr(answer, "_gathered", watched)
        monkeypatch.setattr(answer, "PIECE", 64)
        monkeypatch.setattr(slices, "LARGE", 0)
        for module in (slices, encoding):
            monkeypatch.setattr(module, "SLICE", 9)  # numbers: less than two rows of a text
        monkeypatch.setattr(vectors, "LARGE", 0)
        sliced = await server.post(path, body, headers=IDENTITY)
        assert timeless(sliced) == timeless(once)
        assert threads
        assert threading.get_ident() not in threads
        assert (await server.get("/load")).json == {"server_load": 0}


async def test_the_bytes_of_a_large_binary_answer_are_counted_ahead(served: Served) -> None:
    found = await served.embed(input=["a"] * 40_000, encoding_format="bytes_only")
    assert int(found.headers["Content-Length"]) == len(found.body) == 40_000 * 8 * 4
    assert found.headers["Content-Type"] == "application/octet-stream"


def large() -> bytes:
    return json.dumps({"input": ["a"] * 50_000}).encode()


def head(body: bytes, version: bytes = b"1.1", more: bytes = b"") -> bytes:
    return (
        b"POST /v1/embeddings HTTP/%b\r\nHost: a\r\nX-Request-Id: large\r\n%bContent-Length: %d\r\n\r\n"
        % (version, more, len(body))
    ) + body


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all pieces that are made; pieces are small."""
    sizes: list[int] = []
    gathered = answer._gathered

    def counted(slices: Iterator[bytes]) -> Iterator[bytes]:
        for piece in gathered(slices):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(answer, "_gathered", counted)
    monkeypatch.setattr(answer, "PIECE", 1 << 16)
    return sizes


async def quiet(sizes: list[int]) -> None:
    """Until nothing more is made."""
    before = -1
    async with asyncio.timeout(10):
        while not sizes or before < len(sizes):
            before = len(sizes)
            await asyncio.sleep(0.2)


async def test_no_more_is_made_than_the_client_takes_and_load_tells_of_it(
    served: Served, made: list[int]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 14)
    writer.write(head(large()))
    await quiet(made)
    ahead = sum(made)
    assert (await served.get("/load")).json == {"server_load": 1}
    async with asyncio.timeout(20):
        status = await reader.readline()
        tail = b""
        while tail != b"\r\n0\r\n\r\n":
            tail = (tail + await reader.read(1 << 16))[-7:]
    assert status == b"HTTP/1.1 200 OK\r\n"
    assert ahead < sum(made) - (1 << 20)
    writer.close()
    async with asyncio.timeout(5):
        while (await served.get("/load")).json != {"server_load": 0}:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    text = (await served.get("/metrics")).body.decode()
    assert (
        'carpool_requests_total{endpoint="/v1/embeddings",model_name="all-MiniLM-L6-v2",status="200"} 1.0'
        in text
    )


async def test_a_client_that_leaves_in_the_middle_ends_the_making(served: Served, made: list[int]) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 14)
    writer.write(head(large()))
    await quiet(made)
    before = len(made)
    with capture_logs() as lines:
        writer.transport.abort()
        await asyncio.sleep(0.1)
    assert len(made) <= before + 1
    assert [line["status"] for line in lines if line["event"] == "request"] == [499]
    assert not [line for line in lines if line["log_level"] == "error"]
    assert (await served.get("/load")).json == {"server_load": 0}


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"])
async def test_an_old_client_gets_it_to_the_end_of_the_connection(served: Served, more: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(head(large(), b"1.0", more))
    async with asyncio.timeout(20):
        found = await reader.read()
    writer.close()
    headers, _, body = found.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in headers
    assert b"Connection" not in headers
    assert len(json.loads(body)["data"]) == 50_000


async def test_an_answer_that_cannot_be_finished_breaks_off_for_all_to_see(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rows: Any, style: Any, first: int = 0) -> bytes:
        if first > 20_000:
            raise ValueError("why")
        return encoding.float_items(rows, style, first)

    monkeypatch.setattr(vectors, "float_array", lambda rows, style: Array(broken, rows, (style,)))
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    with capture_logs() as lines:
        writer.write(head(large()))
        last = b""
        with suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                last = chunk
    writer.close()
    assert last
    assert not last.endswith(b"\r\n0\r\n\r\n")  # which would be its end
    [line] = [line for line in lines if line["log_level"] == "error"]
    assert (line["event"], line["request_id"]) == ("answer broke off", "large")
    assert (await served.embed(input="a")).status == 200


async def test_what_no_answer_can_hold_is_refused_before_its_first_byte(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.engine, "_vector", lambda ids, width: np.full(width, 1e6, np.float32))
    monkeypatch.setattr(slices, "LARGE", 0)
    monkeypatch.setattr(vectors, "LARGE", 0)
    for form in ("base64", "bytes_only"):
        found = await served.embed(input=["a"] * 100, encoding_format=form, embed_dtype="fp8_e4m3")
        assert_error(found, 400, "BadRequestError", "embed_dtype")


def asking(path: str, method: bytes = b"POST", version: bytes = b"1.1", more: bytes = b"") -> bytes:
    body = b'{"input": "ab", "encoding_format": "base64"}' if method == b"POST" else b""
    lines = b"%b %b HTTP/%b\r\nHost: a\r\nX-Request-Id: one\r\n%bContent-Length: %d\r\n\r\n"
    return lines % (method, path.encode(), version, more, len(body)) + body


def parted(packet: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Status line, headers by lower-case names, and body. A header that stands there twice is an error."""
    top, _, body = packet.partition(b"\r\n\r\n")
    status, *lines = top.split(b"\r\n")
    pairs = [tuple(line.decode().split(": ", 1)) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(pairs)
    return status, headers, body


@pytest.mark.parametrize(
    ("kind", "connection"),
    [
        ({}, None),
        ({"more": b"Connection: keep-alive\r\n"}, None),
        ({"more": b"Connection: close\r\n"}, "close"),
        ({"version": b"1.0"}, None),
        ({"version": b"1.0", "more": b"Connection: keep-alive\r\n"}, "keep-alive"),
    ],
)
async def test_an_answer_says_the_same_to_every_kind_of_client(
    kind: dict[str, bytes], connection: str | None, served: Served
) -> None:
    """By the short way, or by aiohttp's: the head is what web.Response would have said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(asking(EMBEDDINGS, **kind))
    async with asyncio.timeout(10):
        top = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(parted(top)[1]["content-length"]))
        stays = kind.get("version") != b"1.0" if connection is None else connection == "keep-alive"
        if stays:  # for the next one
            writer.write(asking(EMBEDDINGS, **kind))
            assert (await reader.readline()).endswith(b" 200 OK\r\n")
        else:
            assert await reader.read() == b""
    writer.close()
    status, headers, _ = parted(top)
    assert status == b"HTTP/%b 200 OK" % kind.get("version", b"1.1")
    assert json.loads(body)["data"][0]["index"] == 0
    sent = parsedate_to_datetime(headers.pop("date"))
    assert abs((datetime.now(UTC) - sent).total_seconds()) < 5
    assert headers.pop("connection", None) == connection
    assert headers.pop("server-timing").startswith("tokenize;dur=")
    assert headers == {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "server": "carpool",
        "x-request-id": "one",
    }


async def test_to_head_it_says_how_long_it_would_be_and_no_more(served: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(asking("/v1/models", b"HEAD") + asking("/v1/models", b"GET"))
    async with asyncio.timeout(10):
        told = parted(await reader.readuntil(b"\r\n\r\n"))[1]
        top = parted(await reader.readuntil(b"\r\n\r\n"))  # no body between the two
        body = await reader.readexactly(int(top[1]["content-length"]))
    writer.close()
    assert top[0] == b"HTTP/1.1 200 OK"
    assert told["content-length"] == str(len(body))
    assert json.loads(body)["data"]


async def test_one_long_row_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.arange(300_000, dtype=np.float32).reshape(-1, 100)
    array = bare_array([row[:1], row, row[:2]])
    whole, sizes = array.whole(), [len(part) for part in array.slices()]
    assert b"".join(array.slices()) == whole
    assert max(sizes) < len(whole) / 10
    monkeypatch.setattr(slices, "LARGE", 1 << 30)
    assert (await json_around(HOLE, array)).body == whole  # type: ignore[attr-defined]
