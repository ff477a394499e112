"""Front: a process that does HTTP for an engine in another. Started by `fronts`, and by nobody else."""

from __future__ import annotations

import asyncio
import gc
import pickle
import socket
import sys

import uvloop

from carpool.engine.async_engine import AsyncEngine
from carpool.engine.errors import EngineDead
from carpool.engine.remote import RemoteCore
from carpool.server import garbage, logs
from carpool.server.app import make_app
from carpool.server.config import ServerConfig
from carpool.server.doors import serving
from carpool.server.keys import METRICS, STARTED_AT


def main() -> None:
    """The arguments are descriptors: of the line to the engine's process, and of the sockets that listen."""
    config: ServerConfig
    config, started_at, late = pickle.load(sys.stdin.buffer)
    logs.set_up(config.log_level, config.log_format)
    line, *listening = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    uvloop.run(live(config, line, listening, started_at, late))


async def live(
    config: ServerConfig, line: socket.socket, listening: list[socket.socket], started_at: int, late: bool
) -> None:
    """Until the engine's process says to end, or is gone.

    One that comes `late`, to a server that is ready, takes no clients before it is ready too: they are better off with
    another front, or in the sockets' queues, than refused.
    """

    async def reply(question: str) -> bytes:
        match question:
            case "counts":
                return app[METRICS].counts().encode()
            case "ready":
                await asyncio.wait([loading])
                loading.result()
                return b""
        raise ValueError(f"nobody answers {question!r} here")

    core = RemoteCore(line, reply, trust_remote_code=config.engine.trust_remote_code)
    engine = AsyncEngine(config.engine, core=core)
    app = make_app(config, engine, core.ask)
    app[STARTED_AT] = started_at  # the server's, whichever front answers
    loading = asyncio.ensure_future(_load(engine))
    over = asyncio.ensure_future(core.over())
    if late:
        await asyncio.wait((loading, over), return_when=asyncio.FIRST_COMPLETED)
    async with serving(config, app, listening, config.api_workers):
        await asyncio.wait((loading, over), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        await over
    await engine.stop(0.0)


async def _load(engine: AsyncEngine) -> None:
    try:
        await engine.start()
    except EngineDead:  # before it had loaded, and that is over too
        return
    gc.collect()
    garbage.settle()
