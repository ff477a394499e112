"""Doors: the sockets that clients come in by. One process opens them; it, or several others, accept from them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carpool.engine.errors import ConfigError
from carpool.server import tls
from carpool.server.http import Runner

if TYPE_CHECKING:
    from aiohttp import web

    from carpool.server.config import ServerConfig

BACKLOG = 1024
ACCEPTS = 32  # new connections that a turn of the event loop takes from each socket


async def opened(config: ServerConfig) -> list[socket.socket]:
    """Sockets that listen where the configuration says. Raises ConfigError."""
    tls.load(config)  # what is wrong with it is said before anyone comes
    loop = asyncio.get_running_loop()
    try:
        if config.uds:
            _refuse_to_supplant(config.uds)
            bound = await loop.create_unix_server(asyncio.Protocol, config.uds, start_serving=False)
        else:
            bound = await loop.create_server(asyncio.Protocol, config.host, config.port, start_serving=False)
        sockets = [socket.socket(fileno=os.dup(own.fileno())) for own in bound.sockets]
        bound.close()
        for own in sockets:
            own.listen(BACKLOG)
    except OSError as error:
        place = config.uds or f"{config.host} port {config.port}"
        number = error.errno or 0  # name resolution has numbers below 0, of its own
        reason = os.strerror(number) if number > 0 else str(error)
        raise ConfigError(f"Cannot listen on {place}: {reason.lower()}.") from error
    return sockets


def _refuse_to_supplant(path: str) -> None:
    """A socket's file is replaced, since a server leaves its own behind; not while another server listens there."""
    if Path(path).exists() and not Path(path).is_socket():
        raise ConfigError(f"Cannot listen on {path}: it exists, and is no socket.")
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.settimeout(1.0)
        try:
            visitor.connect(path)
        except TimeoutError:  # its queue is full: it is busy, or hangs
            pass
        except OSError:  # nobody is there, or nothing that can be asked
            return
    raise ConfigError(f"Cannot listen on {path}: another server listens there.")


def url(config: ServerConfig, sockets: Sequence[socket.socket]) -> str:
    """Where clients find them, for people to read."""
    scheme = "https" if config.ssl_certfile else "http"
    if config.uds:
        return f"{scheme}://unix:{config.uds}:"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{sockets[0].getsockname()[1]}"


@asynccontextmanager
async def serving(
    config: ServerConfig, app: web.Application, sockets: Sequence[socket.socket], sharers: int = 1
) -> AsyncIterator[None]:
    """Clients are served while inside; on the way out the last answers are sent.

    Each socket is listened on `ACCEPTS` times. uvloop takes one new connection a turn from what it listens on, and when
    the server is busy a turn is long: those who connect would wait for seconds to be refused, and those who connect for
    each request be answered last. Of several processes, `sharers`, each takes one a turn: else the first to wake takes
    all those who come at once, and keeps them.
    """
    runner = Runner(app)
    await runner.setup()
    loop = asyncio.get_running_loop()
    listen: Any = loop.create_unix_server if config.uds else loop.create_server
    context = tls.load(config)
    refreshing = None
    if context and config.enable_ssl_refresh:
        refreshing = asyncio.ensure_future(tls.keep_fresh(context, config))
    doors: list[asyncio.AbstractServer] = []
    try:
        for listening in sockets:
            for _ in range(ACCEPTS if sharers == 1 else 1):
                door = socket.socket(fileno=os.dup(listening.fileno()))
                doors.append(await listen(runner.server, sock=door, ssl=context, backlog=BACKLOG))
        yield
    finally:
        if refreshing is not None:
            refreshing.cancel()
        for open_door in doors:
            open_door.close()
        await runner.cleanup()
