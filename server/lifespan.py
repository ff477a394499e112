"""A server's life: listen at once, load behind it, serve, and on SIGTERM finish what was accepted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import structlog

from carpool.server import garbage
from carpool.server.app import make_app
from carpool.server.config import ServerConfig
from carpool.server.doors import opened, serving, url
from carpool.server.fronts import Fronts, fronts
from carpool.server.keys import METRICS

if TYPE_CHECKING:
    from carpool.engine.async_engine import AsyncEngine
    from carpool.server.metrics import Metrics

log = structlog.get_logger()

LOOK_SECONDS = 0.05  # between two looks at whether all are answered


async def serve(config: ServerConfig, engine: AsyncEngine) -> bool:
    """Serve until a signal or the engine's death; True if the end was asked for. Raises ConfigError."""
    began = perf_counter()
    stop = _stop_signal()
    async with _front(config, engine) as front:
        log.info("loading", url=front.url, model=config.model_names[0])  # minutes, where it has to be fetched
        loading = asyncio.ensure_future(engine.start())
        await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("stopped while loading")
            os._exit(0)  # the loading thread cannot be interrupted, and asyncio would wait for it
        loading.result()
        death = asyncio.ensure_future(engine.died())
        ready = asyncio.ensure_future(front.ready())
        await asyncio.wait((ready, death, stop), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            _announce(config, engine, front.url, perf_counter() - began)
            await asyncio.wait((death, stop), return_when=asyncio.FIRST_COMPLETED)
        else:
            ready.cancel()
        if death.done():
            log.critical("engine died")
            return False
        death.cancel()
        log.info("draining", signal=stop.result().name, waiting_sequences=engine.waiting_sequences)
        if not await _finished(front, engine, config.shutdown_timeout):
            log.warning("stopped with work unfinished", shutdown_timeout=config.shutdown_timeout)
        return True


async def _finished(front: _Single | Fronts, engine: AsyncEngine, timeout: float) -> bool:
    """Let nobody in any more, and wait for all who are, from a body on its way to an answer that is still taken.

    True if that took no longer than `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    engine.drain()
    while (inside := await front.inside()) and (left := end - loop.time()) > 0:  # noqa: ASYNC110  # other processes count, too
        await asyncio.sleep(min(LOOK_SECONDS, left))
    return await engine.stop(max(0.0, end - loop.time())) and not inside


def _stop_signal() -> asyncio.Future[signal.Signals]:
    """Done at the first of the signals that end; the second one has its usual, immediate effect.

    The terminal's end is one of them, but for who was told not to mind it (nohup).
    """
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()
    ends = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.append(signal.SIGHUP)

    def on_signal(which: signal.Signals) -> None:
        for known in ends:
            loop.remove_signal_handler(known)
        if not received.done():  # two of them may come at once
            received.set_result(which)

    for known in ends:
        loop.add_signal_handler(known, on_signal, known)
    return received


class _Single:
    """This process is its own front."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        self.url = url
        self._metrics = metrics

    async def ready(self) -> None:
        """It is, once the engine has loaded."""

    async def inside(self) -> int:
        """Requests that are under way."""
        return self._metrics.inside


@asynccontextmanager
async def _front(config: ServerConfig, engine: AsyncEngine) -> AsyncIterator[_Single | Fronts]:
    """Clients are served while inside; on the way out the last answers are sent."""
    sockets = await opened(config)
    try:
        if config.api_workers == 1:
            app = make_app(config, engine)
            async with serving(config, app, sockets):
                yield _Single(url(config, sockets), app[METRICS])
        else:
            async with fronts(config, engine, sockets) as several:
                yield several
    finally:
        for own in sockets:
            own.close()


def _announce(config: ServerConfig, engine: AsyncEngine, url: str, seconds: float) -> None:
    garbage.settle()  # without a collection first: it would look at all for as long as a request takes, to free 2 MB
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
