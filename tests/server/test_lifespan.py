"""A server's life from the first socket to the last answer, with real signals."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import ClientError, ClientSession, UnixConnector
from structlog.testing import capture_logs

from carpool.engine.errors import ConfigError
from carpool.server import doors, http, lifespan, tls
from carpool.server.config import ServerConfig
from certificates import make_certificate, needs_openssl, trusting
from fakes import FakeEngine
from serving import EMBEDDINGS, Served, assert_error


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def local(**options: Any) -> ServerConfig:
    return ServerConfig(host="127.0.0.1", port=free_port(), **options)


@asynccontextmanager
async def alive(config: ServerConfig, engine: FakeEngine) -> AsyncIterator[tuple[Served, asyncio.Task[bool]]]:
    """`serve` running as it does in production; stopped by SIGTERM unless it has ended."""
    life = asyncio.create_task(lifespan.serve(config, engine))  # type: ignore[arg-type]
    async with ClientSession() as session:
        served = Served(engine, config.port, session)
        while not life.done():
            try:
                await served.get("/health/live")
                break
            except OSError:
                await asyncio.sleep(0.01)
        yield served, life
    if not life.done():
        os.kill(os.getpid(), signal.SIGTERM)
        await life


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_it_listens_before_it_has_loaded_and_says_so() -> None:
    engine = FakeEngine(state="starting")
    engine.loaded.clear()
    with capture_logs() as lines:
        async with alive(local(), engine) as (_, _):
            await until(lambda: "loading" in [line["event"] for line in lines])
            assert "ready" not in [line["event"] for line in lines]
            engine.loaded.set()
            await until(lambda: "ready" in [line["event"] for line in lines])


async def test_it_answers_that_it_is_not_ready_while_it_loads() -> None:
    engine = FakeEngine(state="starting")
    engine.loaded.clear()
    async with alive(local(), engine) as (served, _):
        assert (await served.get("/health/live")).status == 200
        assert (await served.get("/health/ready")).status == 503
        assert_error(await served.embed(input="a"), 503, "ServiceUnavailableError")
        engine.loaded.set()
        await until(lambda: engine.state == "ready")
        assert (await served.get("/health/ready")).status == 200
        assert (await served.embed(input="a")).status == 200


@pytest.fixture
def hangup() -> Iterator[Callable[[Any], object]]:
    """Says what this process does at its terminal's end: tests may themselves run under nohup."""
    before = signal.getsignal(signal.SIGHUP)
    yield partial(signal.signal, signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_accepted_work_is_finished_and_new_work_refused(
    which: signal.Signals, hangup: Callable[[Any], object]
) -> None:
    hangup(signal.SIG_DFL)
    engine = FakeEngine()
    async with alive(local(), engine) as (served, life):
        await until(lambda: engine.state == "ready")
        engine.gate.clear()
        accepted = [asyncio.create_task(served.embed(input=f"text {i}")) for i in range(5)]
        await until(lambda: engine.waiting_sequences == 5)
        os.kill(os.getpid(), which)
        await until(lambda: engine.state == "draining")
        assert (await served.get("/health/ready")).status == 503
        assert (await served.get("/health")).status == 200
        refused = await served.embed(input="late")
        assert_error(refused, 503, "ServiceUnavailableError")
        assert refused.headers["Connection"] == "close"
        assert int(refused.headers["Retry-After"]) >= 1
        assert not life.done()
        engine.gate.set()
        assert [(await one).status for one in accepted] == [200] * 5
        assert await life is True


async def test_the_end_of_the_terminal_is_not_minded_by_who_was_told_so(
    hangup: Callable[[Any], object],
) -> None:
    hangup(signal.SIG_IGN)
    engine = FakeEngine()
    async with alive(local(), engine) as (served, life):
        os.kill(os.getpid(), signal.SIGHUP)
        assert (await served.embed(input="a")).status == 200
        assert engine.state == "ready"
        assert not life.done()


async def test_work_that_takes_too_long_is_left_and_said_so() -> None:
    engine = FakeEngine()
    async with alive(local(shutdown_timeout=0.1), engine) as (served, life):
        engine.gate.clear()
        stuck = asyncio.create_task(served.embed(input="a"))
        await until(lambda: engine.waiting_sequences == 1)
        with capture_logs() as lines:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.3)
            engine.gate.set()
            assert await life is True
        assert "stopped with work unfinished" in [line["event"] for line in lines]
        await stuck


LARGE = json.dumps({"input": ["a"] * 50_000}).encode()  # its answer fills every buffer on the way


@asynccontextmanager
async def asking(
    served: Served, body: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """The head of a request with this body is sent, and nobody reads much of the answer ahead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 14)
    head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode())
    yield reader, writer
    writer.close()


async def loaded(served: Served) -> int:
    count: int = (await served.get("/load")).json["server_load"]
    return count


async def test_a_request_whose_body_is_on_its_way_is_answered() -> None:
    engine, body = FakeEngine(), b'{"input": "a"}'
    async with alive(local(), engine) as (served, life):
        await until(lambda: engine.state == "ready")
        async with asking(served, body) as (reader, writer):
            writer.write(body[:5])
            while await loaded(served) != 1:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: engine.state == "draining")
            await asyncio.sleep(3 * lifespan.LOOK_SECONDS)
            writer.write(body[5:])
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        assert await life is True


async def test_a_request_that_does_not_need_the_model_is_answered_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "FLUSH_SECONDS", 0.05)
    begun = asyncio.Event()
    engine = FakeEngine()
    tokenize = engine.tokenize

    async def slow(*args: Any) -> list[list[int]]:
        begun.set()
        await asyncio.sleep(0.4)
        return await tokenize(*args)

    monkeypatch.setattr(engine, "tokenize", slow)
    async with alive(local(), engine) as (served, life):
        await until(lambda: engine.state == "ready")
        asked = asyncio.create_task(served.post("/tokenize", {"prompt": "a"}))
        await begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await asked).status == 200
        assert await life is True


async def test_a_large_answer_is_sent_for_as_long_as_its_client_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "FLUSH_SECONDS", 0.05)
    engine = FakeEngine()
    async with alive(local(), engine) as (served, life):
        await until(lambda: engine.state == "ready")
        async with asking(served, LARGE) as (reader, writer):
            writer.write(LARGE)
            last = await reader.readline()
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: engine.state == "draining")
            await asyncio.sleep(0.3)
            assert not life.done()
            async with asyncio.timeout(20):
                while piece := await reader.read(1 << 16):
                    last = (last + piece)[-5:]
                    if last == b"0\r\n\r\n":
                        break
            assert last == b"0\r\n\r\n", "its end"
        assert await life is True


async def test_who_takes_nothing_of_an_answer_is_waited_for_no_longer_than_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "FLUSH_SECONDS", 0.05)
    engine = FakeEngine()
    async with alive(local(shutdown_timeout=0.2), engine) as (served, life):
        await until(lambda: engine.state == "ready")
        async with asking(served, LARGE) as (reader, writer):
            writer.write(LARGE)
            await reader.readline()
            with capture_logs() as lines:
                os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(5):
                    assert await life is True
        assert "stopped with work unfinished" in [line["event"] for line in lines]


async def test_the_death_of_the_engine_ends_the_server() -> None:
    engine = FakeEngine()
    async with alive(local(), engine) as (_, life):
        engine.dead.set()
        assert await life is False


async def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    engine = FakeEngine(state="starting")
    engine.error = ConfigError("There is no model at /nowhere.")
    with pytest.raises(ConfigError, match="no model"):
        await lifespan.serve(local(), engine)  # type: ignore[arg-type]


async def test_a_signal_while_loading_does_not_wait_for_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(Exception):
        pass

    def exit(status: int) -> None:
        assert status == 0
        raise Exited

    monkeypatch.setattr(os, "_exit", exit)
    engine = FakeEngine(state="starting")
    engine.loaded.clear()
    async with alive(local(), engine) as (_, life):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Exited):
            await life


async def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(host="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"^Cannot listen on 127.0.0.1 port {config.port}: .*in use"):
            await lifespan.serve(config, FakeEngine())  # type: ignore[arg-type]


async def test_a_certificate_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for content in (None, "not a certificate"):
        path = tmp_path / "cert.pem"
        if content:
            path.write_text(content)
        with pytest.raises(ConfigError, match=r"^Cannot use the certificate .*\.$"):
            await lifespan.serve(local(ssl_certfile=str(path)), FakeEngine())  # type: ignore[arg-type]


@needs_openssl
async def test_https_is_served_with_a_certificate(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    config = local(ssl_certfile=certificate, ssl_keyfile=key)
    engine = FakeEngine()
    life = asyncio.create_task(lifespan.serve(config, engine))  # type: ignore[arg-type]
    await until(lambda: engine.state == "ready")
    await asyncio.sleep(0.05)
    trusted = trusting(certificate)
    async with (
        ClientSession() as session,
        session.get(f"https://127.0.0.1:{config.port}/health", ssl=trusted) as response,
    ):
        assert response.status == 200
    os.kill(os.getpid(), signal.SIGTERM)
    assert await life is True


@needs_openssl
async def test_a_client_needs_a_certificate_if_it_is_said_so(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    config = local(ssl_certfile=certificate, ssl_keyfile=key, ssl_ca_certs=certificate, ssl_cert_reqs=2)
    engine = FakeEngine()
    life = asyncio.create_task(lifespan.serve(config, engine))  # type: ignore[arg-type]
    await until(lambda: engine.state == "ready")
    await asyncio.sleep(0.05)
    trusted = trusting(certificate)
    async with ClientSession() as session:
        with pytest.raises(ClientError):
            await session.get(f"https://127.0.0.1:{config.port}/health", ssl=trusted)
        trusted.load_cert_chain(certificate, key)
        async with session.get(f"https://127.0.0.1:{config.port}/health", ssl=trusted) as response:
            assert response.status == 200
    os.kill(os.getpid(), signal.SIGTERM)
    assert await life is True


@needs_openssl
async def test_a_certificate_that_is_renewed_is_shown_to_those_who_come_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "REFRESH_SECONDS", 0.01)
    certificate, key = make_certificate(tmp_path, "old")
    config = local(ssl_certfile=certificate, ssl_keyfile=key, enable_ssl_refresh=True)
    engine = FakeEngine()
    life = asyncio.create_task(lifespan.serve(config, engine))  # type: ignore[arg-type]
    await until(lambda: engine.state == "ready")
    await asyncio.sleep(0.05)

    async def shown() -> str:
        loop = asyncio.get_running_loop()
        address = ("127.0.0.1", config.port)
        return await loop.run_in_executor(None, ssl.get_server_certificate, address)

    old = await shown()
    with capture_logs() as logged:
        Path(key).write_text("half a key")
        await until(lambda: any(line["event"] == "certificate not loaded again" for line in logged))
        assert await shown() == old
        make_certificate(tmp_path, "new")
        await until(lambda: any(line["event"] == "certificate loaded again" for line in logged))
    assert await shown() == Path(certificate).read_text() != old
    os.kill(os.getpid(), signal.SIGTERM)
    assert await life is True


async def test_a_unix_socket_serves_too(tmp_path: Path) -> None:
    path = str(tmp_path / "carpool.sock")
    engine = FakeEngine()
    life = asyncio.create_task(lifespan.serve(ServerConfig(uds=path), engine))  # type: ignore[arg-type]
    await until(lambda: os.path.exists(path))
    async with (
        ClientSession(connector=UnixConnector(path)) as session,
        session.post(f"http://carpool{EMBEDDINGS}", json={"input": "a"}) as response,
    ):
        assert response.status == 200
        with pytest.raises(ConfigError, match=r"Cannot listen on .*: another server listens there\."):
            await doors.opened(ServerConfig(uds=path))
        async with session.get("http://carpool/health") as response:
            assert response.status == 200
    os.kill(os.getpid(), signal.SIGTERM)
    assert await life is True
    for own in await doors.opened(
        ServerConfig(uds=path)
    ):  # what is left of one that has ended is in nobody's way
        own.close()


async def test_what_is_no_socket_is_not_taken_for_another_server(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (tmp_path, file):
        with pytest.raises(ConfigError, match=rf"^Cannot listen on {path}: it exists, and is no socket\.$"):
            await doors.opened(ServerConfig(uds=str(path)))
    assert file.read_text() == "kept"


async def test_ready_is_one_line_with_the_facts() -> None:
    engine = FakeEngine()
    config = local()
    with capture_logs() as lines:
        async with alive(config, engine):
            await until(lambda: any(line["event"] == "ready" for line in lines))
    [ready] = [line for line in lines if line["event"] == "ready"]
    assert ready["url"] == f"http://127.0.0.1:{config.port}"
    assert ready["model"] == "all-MiniLM-L6-v2"
    assert (ready["dtype"], ready["workers"]) == ("float32", 1)
    assert ready["seconds"] >= 0


def test_many_who_connect_at_once_wait_for_few_turns_of_the_loop(tmp_path: Path) -> None:
    """On the loop that serves in production, which takes one connection a turn from each thing it listens on."""

    async def turns(config: ServerConfig, family: socket.AddressFamily, address: Any) -> int:
        engine: Any = FakeEngine()
        async with lifespan._front(config, engine):
            clients = [socket.socket(family) for _ in range(2 * doors.ACCEPTS)]
            for client in clients:
                client.connect(address)  # the kernel's part: they wait to be accepted
                client.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
                client.setblocking(False)
            waiting, count = set(clients), 0
            while waiting and count < 1000:
                count += 1
                await asyncio.sleep(0)
                answered, _, _ = select.select(waiting, [], [], 0)
                waiting -= set(answered)
            for client in clients:
                client.close()
            return count

    config = local()
    assert uvloop.run(turns(config, socket.AF_INET, ("127.0.0.1", config.port))) < doors.ACCEPTS
    path = str(tmp_path / "socket")
    assert uvloop.run(turns(ServerConfig(uds=path), socket.AF_UNIX, path)) < doors.ACCEPTS
