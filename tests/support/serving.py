"""A real server around a FakeEngine, on a free port of this machine, for as long as a test needs it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse, ClientSession, web

from carpool.engine.config import EngineConfig
from carpool.server.app import make_app
from carpool.server.config import ServerConfig
from carpool.server.http import Runner
from fakes import FakeEngine

EMBEDDINGS = "/v1/embeddings"
# With all that an operator can open.
OPEN = ServerConfig(engine=EngineConfig(allow_runtime_lora_updating=True), allow_cache_reset=True)


@dataclass(slots=True)
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Served:
    """A running server, and the ways to talk to it."""

    engine: FakeEngine
    port: int
    session: ClientSession

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, f"http://127.0.0.1:{self.port}{path}", **options) as response:
            return await read(response)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """`body` as JSON, or as it is if it is bytes."""
        if not isinstance(body, bytes):
            return await self.ask("POST", path, json=body, **options)
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return await self.ask("POST", path, data=body, headers=headers, **options)

    async def embed(self, **fields: Any) -> Answer:
        return await self.post(EMBEDDINGS, fields)

    async def raw(self, *packets: bytes, wait: float = 0.02) -> Answer:
        """The answer to bytes that no HTTP client would send; reads until the server hangs up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for packet in packets:
                writer.write(packet)
                await writer.drain()
                await asyncio.sleep(wait)
            async with asyncio.timeout(5):
                return parse(await reader.read())
        finally:
            writer.close()


async def read(response: ClientResponse) -> Answer:
    return Answer(response.status, response.headers, await response.read())


def parse(text: bytes) -> Answer:
    """The first HTTP response in `text`."""
    head, _, rest = text.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.title(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(status.split()[1]), headers, rest[: int(headers["Content-Length"])])


@asynccontextmanager
async def serving(
    config: ServerConfig | None = None, engine: FakeEngine | None = None
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    app = make_app(config or ServerConfig(), engine)  # type: ignore[arg-type]  # the same face
    runner = Runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession() as session:
            yield Served(engine, runner.addresses[0][1], session)
    finally:
        await runner.cleanup()


def assert_error(answer: Answer, status: int, kind: str, param: str | None = None) -> str:
    """The answer is an error in the flat shape, complete; returns its message."""
    error = answer.json
    assert answer.status == status, error
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    assert set(error) == {"object", "message", "type", "param", "code"}
    assert (error["object"], error["type"], error["code"]) == ("error", kind, status)
    assert error["param"] == param
    message: str = error["message"]
    assert message
    return message
