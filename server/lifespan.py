"""A server's life: listen at once, load behind it, serve, and on SIGTERM finish what was accepted."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from carpool.engine.errors import ConfigError
from carpool.server.app import make_app
from carpool.server.config import ServerConfig
from carpool.server.http import Runner

if TYPE_CHECKING:
    from carpool.engine.async_engine import AsyncEngine

log = structlog.get_logger()

BACKLOG = 1024
ACCEPTS = 32  # new connections that a turn of the event loop takes from each socket


async def serve(config: ServerConfig, engine: AsyncEngine) -> bool:
    """Serve until a signal or the engine's death; True if the end was asked for. Raises ConfigError."""
    began = perf_counter()
    stop = _stop_signal()
    async with _listening(config, engine) as url:
        loading = asyncio.ensure_future(engine.start())
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("stopped while loading")
            os._exit(0)  # the loading thread cannot be interrupted, and asyncio would wait for it
        loading.result()
        _announce(config, engine, url, perf_counter() - began)
        death = asyncio.ensure_future(engine.died())
        await asyncio.wait((death, stop), return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            log.critical("engine died")
            return False
        death.cancel()
        log.info("draining", signal=stop.result().name, waiting_sequences=engine.waiting_sequences)
        if not await engine.stop(config.shutdown_timeout):
            log.warning("stopped with work unfinished", shutdown_timeout=config.shutdown_timeout)
        return True


def _stop_signal() -> asyncio.Future[signal.Signals]:
    """Done at the first SIGTERM or SIGINT; the second one has its usual, immediate effect."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(which: signal.Signals) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(known)
        received.set_result(which)

    for known in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(known, on_signal, known)
    return received


@asynccontextmanager
async def _listening(config: ServerConfig, engine: AsyncEngine) -> AsyncIterator[str]:
    """The socket is open while inside; on the way out the last answers are sent."""
    runner = Runner(make_app(config, engine))
    await runner.setup()
    doors: list[asyncio.AbstractServer] = []
    try:
        site = await _open_site(config, runner)
        doors = await _more_doors(config, runner, site)
        yield str(site.name)
    finally:
        for door in doors:
            door.close()
        await runner.cleanup()


async def _open_site(config: ServerConfig, runner: Runner) -> Any:
    """Start to listen."""
    tls = _tls(config)
    site: Any
    if config.uds:
        site = web.UnixSite(runner, config.uds, ssl_context=tls, backlog=BACKLOG)
    else:
        site = web.TCPSite(runner, config.host, config.port, ssl_context=tls, backlog=BACKLOG)
    try:
        await site.start()
    except OSError as error:
        place = config.uds or f"{config.host} port {config.port}"
        number = error.errno or 0  # name resolution has numbers below 0, of its own
        reason = os.strerror(number) if number > 0 else str(error)
        raise ConfigError(f"Cannot listen on {place}: {reason.lower()}.") from error
    return site


async def _more_doors(config: ServerConfig, runner: Runner, site: Any) -> list[asyncio.AbstractServer]:
    """Listen on the site's sockets `ACCEPTS` times over.

    uvloop takes one new connection a turn from what it listens on, and when the server is busy a turn is long: those
    who connect would wait for seconds to be refused, and those who connect for each request be answered last.
    """
    loop = asyncio.get_running_loop()
    listen: Any = loop.create_unix_server if config.uds else loop.create_server
    tls = _tls(config)
    doors = []
    for listening in site._server.sockets:
        for _ in range(ACCEPTS - 1):
            again = socket.socket(fileno=os.dup(listening.fileno()))
            doors.append(await listen(runner.server, sock=again, ssl=tls, backlog=BACKLOG))
    return doors


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"Cannot use the certificate {config.ssl_certfile}: {error}.") from error
    return context


def _announce(config: ServerConfig, engine: AsyncEngine, url: str, seconds: float) -> None:
    gc.collect()
    gc.freeze()  # the model's hundreds of thousands of objects are here to stay: later collections skip them
    model = engine.model
    for notice in model.notices:
        log.warning(notice)
    log.info(
        "ready",
        url=url,
        model=config.model_names[0],
        dtype=model.dtype,
        device=model.device,
        workers=model.workers,
        batch_tokens=model.batch_tokens or model.max_num_batched_tokens,
        seconds=round(seconds, 2),
    )
