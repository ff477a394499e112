"""What is not HTTP is answered in the one shape, and the connection closed. Nothing hangs."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE
from structlog.testing import capture_logs

from carpool.server import http
from carpool.server.app import make_app
from carpool.server.config import ServerConfig
from carpool.server.http import Runner
from fakes import FakeEngine
from serving import EMBEDDINGS, Served, assert_error, serving

BODY = b'{"input": "hi"}'
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n",
        HEAD + b"Content-Length: many\r\n\r\n" + BODY,
        HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
        HEAD + b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_malformed_http_is_a_400_in_the_shape(served: Served, packet: bytes) -> None:
    answer = await served.raw(packet)  # returns once the server has hung up
    assert assert_error(answer, 400, "BadRequestError") == "The request is not valid HTTP."
    assert answer.headers["Server"] == "carpool"


@pytest.mark.parametrize(
    "packet",
    [
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    ],
)
async def test_oversize_lines_are_named(served: Served, packet: bytes) -> None:
    message = assert_error(await served.raw(packet), 400, "BadRequestError")
    assert message == "The request line or one of the headers is too long."


async def test_too_many_headers_are_refused(served: Served) -> None:
    headers = b"".join(b"X-%d: a\r\n" % i for i in range(500))
    assert_error(
        await served.raw(b"GET / HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n"), 400, "BadRequestError"
    )


async def test_malformed_http_obeys_the_error_format() -> None:
    async with serving(ServerConfig(error_format="openai")) as server:
        answer = await server.raw(b"garbage\r\n\r\n")
        assert answer.json["error"]["type"] == "BadRequestError"


async def test_malformed_http_is_counted(served: Served) -> None:
    await served.raw(b"garbage\r\n\r\n")
    series = (await served.get("/metrics")).body.decode()
    assert 'carpool_requests_total{endpoint="other",model_name="all-MiniLM-L6-v2",status="400"} 1.0' in series


@pytest.mark.parametrize(
    "packets",
    [
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\n{" + b'"inp', b"too long for five\r\n"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"],
        [HEAD + b"Content-Encoding: gzip\r\nContent-Length: 15\r\n\r\n", BODY],
        [HEAD + b"Content-Encoding: gzip\r\nContent-Length: 15\r\n\r\n" + BODY],
        [HEAD + b"Content-Encoding: deflate\r\nContent-Length: 15\r\n\r\n" + BODY],
        [
            HEAD
            + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\n"
            + gzip.compress(BODY)[:20]
        ],
        [HEAD + b"Content-Encoding: rot13\r\nContent-Length: 15\r\n\r\n" + BODY],
    ],
)
async def test_broken_bodies_are_a_400_and_a_hang_up(
    served: Served, packets: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    assert_error(await served.raw(*packets), 400, "BadRequestError")
    assert served.engine.calls == []
    assert not caplog.records  # no tracebacks of aiohttp's: it is the client's fault


async def test_requests_behind_a_malformed_one_are_not_served(served: Served) -> None:
    good = HEAD + b"Content-Length: 15\r\n\r\n" + BODY
    answer = await served.raw(b"garbage\r\n\r\n" + good)
    assert_error(answer, 400, "BadRequestError")
    assert served.engine.calls == []


async def test_a_request_before_a_malformed_one_is_served(served: Served) -> None:
    answer = await served.raw(HEAD + b"Content-Length: 15\r\n\r\n" + BODY, b"garbage\r\n\r\n")
    assert answer.status == 200


async def test_a_strange_expectation_is_ignored_on_a_route(served: Served) -> None:
    answer = await served.raw(HEAD + b"Expect: tea\r\nConnection: close\r\nContent-Length: 15\r\n\r\n" + BODY)
    assert answer.status == 200


async def test_a_strange_expectation_elsewhere_is_answered_in_the_shape(served: Served) -> None:
    answer = await served.raw(b"GET /nope HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nConnection: close\r\n\r\n")
    assert_error(answer, 400, "BadRequestError")


async def test_the_server_goes_on_after_all_of_it(served: Served) -> None:
    await served.raw(b"garbage\r\n\r\n")
    assert (await served.post(EMBEDDINGS, {"input": "hi"})).status == 200


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    """The second could be answered at once, and waits for the first."""
    served.engine.gate.clear()
    first = HEAD + b"X-Request-Id: first\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    second = b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-Request-Id: second\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(first + second)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    served.engine.gate.set()
    async with asyncio.timeout(5):
        answers = await reader.read()
    writer.close()
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert 0 < answers.index(b"X-Request-Id: first") < answers.index(b"X-Request-Id: second")


async def test_more_pipelined_requests_than_are_read_ahead_are_all_answered(served: Served) -> None:
    """Reading stops where so many wait, and goes on."""
    many = 3 * MAX_MSG_QUEUE_SIZE
    packets = [
        HEAD + b"X-Request-Id: no-%d\r\nContent-Length: %d\r\n\r\n" % (number, len(BODY)) + BODY
        for number in range(many)
    ]
    last = b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"".join(packets) + last)
    async with asyncio.timeout(20):
        answers = await reader.read()
    writer.close()
    assert answers.count(b"HTTP/1.1 200 OK") == many + 1
    assert re.findall(rb"X-Request-Id: no-(\d+)\r\n", answers) == [b"%d" % number for number in range(many)]


async def test_pipelined_requests_are_all_answered_behind_one_whose_body_came_apart(served: Served) -> None:
    """aiohttp's parser then takes one for read ahead that is not, and stops where it takes no notice of that."""
    many = 2 * MAX_MSG_QUEUE_SIZE
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    async with asyncio.timeout(20):
        writer.write(head)
        while (await served.get("/load")).json != {"server_load": 1}:
            await asyncio.sleep(0.01)
        writer.write(BODY)
        await reader.readuntil(b"}")
        writer.write((head + BODY) * many)
        found = b""
        while found.count(b"HTTP/1.1 200 OK") < many:
            found += await reader.read(1 << 16)
    writer.close()


async def test_what_is_left_of_answers_leaves_before_the_server_is_down() -> None:
    """A transport that is closed sends it later, and with the event loop's end nobody would."""
    left = [3, 2, 1, 0]
    transport: Any = SimpleNamespace(get_write_buffer_size=lambda: left.pop(0) if len(left) > 1 else 0)
    connection: Any = Mock(shutdown=AsyncMock())
    app = make_app(ServerConfig(), FakeEngine())  # type: ignore[arg-type]  # the same face
    server = http.Server(app)
    server._connections[connection] = transport
    await server.shutdown(0.1)
    assert left == [0]


# For an answer that fills every buffer on the way: a vector for each of 100,000 tokens, 9 MB.
MANY = b'{"task": "token_embed", "input": [%b"a"]}' % (b'"%b", ' % (b"a" * 250) * 400)
LARGE = b"POST /pooling HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(MANY) + MANY


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STALL_SECONDS", 0.4)


async def connected(server: Served) -> socket.socket:
    """A client's end with room for little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
    return client


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.05)


async def stalled(server: Served) -> float:
    text = (await server.get("/metrics")).body.decode()
    [count] = re.findall(r"^carpool_stalled_clients_total\{.*\} (\S+)$", text, re.MULTILINE)
    return float(count)


@pytest.mark.usefixtures("soon")
async def test_a_client_that_takes_nothing_is_dropped_counted_and_logged(served: Served) -> None:
    with await connected(served) as client, capture_logs() as lines:
        await asyncio.get_running_loop().sock_sendall(client, LARGE)
        await until(lambda: is_so(stalled(served), 1.0))
        assert (await served.get("/load")).json == {"server_load": 0}
        assert [line["event"] for line in lines if line["log_level"] == "warning"] == [
            "client took nothing of its answer"
        ]
        assert 499 in [line.get("status") for line in lines]


async def is_so(found: Awaitable[float], expected: float) -> bool:
    return await found == expected


@pytest.mark.usefixtures("soon")
async def test_a_client_that_takes_a_little_at_a_time_is_not(served: Served) -> None:
    loop = asyncio.get_running_loop()
    with await connected(served) as client:
        await loop.sock_sendall(client, LARGE)
        async with asyncio.timeout(20):
            for _ in range(12):  # longer than twice the time in which nothing at all is forgiven
                await asyncio.sleep(0.1)
                taken = 0
                while taken < 200_000:
                    taken += len(chunk := await loop.sock_recv(client, 1 << 16))
                    assert chunk, "dropped"
            while b'"usage"' not in chunk:
                chunk = await loop.sock_recv(client, 1 << 16)
                assert chunk, "dropped"
    assert await stalled(served) == 0


@pytest.mark.usefixtures("soon")
async def test_nor_is_one_that_lets_an_answered_connection_rest(served: Served) -> None:
    assert (await served.embed(input="a")).status == 200
    await asyncio.sleep(0.7)
    assert await stalled(served) == 0


class Stuck(asyncio.Transport):
    """A transport whose other end takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False
        self.dropped = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return 10

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """It waits for what is left."""

    def abort(self) -> None:
        self.aborted = True
        self.dropped.set()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("end", ["force_close", "close"])
async def test_what_is_left_of_an_answer_does_not_keep_a_closed_connection(end: str) -> None:
    """Too little to pause for; only who hangs up has to look after it."""
    app = make_app(ServerConfig(), FakeEngine())  # type: ignore[arg-type]
    runner = Runner(app)
    await runner.setup()
    assert runner.server is not None
    connection, transport = runner.server(), Stuck()
    connection.connection_made(transport)
    await asyncio.sleep(0)
    getattr(connection, end)()
    assert transport.aborted is False
    async with asyncio.timeout(5):
        await transport.dropped.wait()
    connection.connection_lost(None)
    await runner.cleanup()
