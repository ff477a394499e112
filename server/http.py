"""aiohttp's connection, bent in a few places: every failure leaves in our one shape, and nobody is waited for for ever.

aiohttp answers malformed HTTP in plain text before any application code runs, waits for clients that take nothing of
their answers, and has no public hook for either. What is bent here is private to it: pyproject.toml says to whom.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from array import array
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from carpool.server.keys import METRICS, ROUTE_TAKEN
from carpool.server.middleware import front_door, refuse_malformed

log = structlog.get_logger()

STALL_SECONDS = 60.0  # a client that takes nothing of its answer for so long has gone
IDLE_SECONDS = 75.0  # longer than common proxies keep a connection: they must be the first to hang up
LINGER_SECONDS = 2.0  # for a sender to read why the rest of its body is not wanted
FLUSH_SECONDS = 5.0  # for the last answers to reach their clients when the server stops


def _untaken(transport: asyncio.WriteTransport) -> int:
    """Bytes that have not arrived. The kernel may hold megabytes, and takes more only once a good part has gone."""
    held = array("i", [0])
    with suppress(OSError, AttributeError):  # no such count on this platform, or no socket
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, held)
    return transport.get_write_buffer_size() + held[0]


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_app", "_watch")

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._app = server.app
        self._watch: asyncio.TimerHandle | None = None

    # ── clients that do not read ─────────────────────────────────────────────────────────────────────────
    # While writing is paused, and once the connection is to be closed, what is unsent can only become less.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._task_handler is not None
        self._task_handler.add_done_callback(lambda _: self._watch_over(transport))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_over(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport is not None and not self.transport.is_closing():
            self._look_away()

    def force_close(self) -> None:
        transport = self.transport
        super().force_close()
        self._watch_over(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._look_away()

    def _watch_over(self, transport: Any) -> None:
        if self._watch is None and transport is not None and transport.get_write_buffer_size():
            self._look_later(transport, _untaken(transport), self._loop.time())

    def _look_later(self, transport: Any, left: int, since: float) -> None:
        self._watch = self._loop.call_later(STALL_SECONDS / 4, self._look, transport, left, since)

    def _look_away(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self, transport: Any, before: int, since: float) -> None:
        """Hang up if all is there still that was there at that time."""
        self._watch = None
        if not transport.get_write_buffer_size():
            return
        now, left = self._loop.time(), _untaken(transport)
        if left < before:
            self._look_later(transport, left, now)
        elif now - since < STALL_SECONDS:
            self._look_later(transport, before, since)
        else:
            self._app[METRICS].client_stalled()
            log.warning("client took nothing of its answer", seconds=round(now - since), bytes_left=left)
            transport.abort()

    # ── malformed HTTP ───────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Wake the handler whose body just turned out broken.

        On a framing error aiohttp queues a refusal behind the current request, which would go on waiting for
        the rest of its body.
        """
        super().data_received(data)
        if self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
            waiting = [payload for _, payload in self._messages]
            if self._current_request is not None:
                waiting.append(self._current_request.content)
            for payload in waiting:
                if not payload.is_eof():
                    payload.set_exception(web.RequestPayloadError("broken framing"))

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp says so after every read, and feeds its parser nothing: `finish_response` does where it matters."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError(
                "The answer has begun, or nobody waits for it: all that is left is to hang up."
            )
        return refuse_malformed(self._app, exc or RuntimeError(message))

    def log_exception(self, *args: Any, **options: Any) -> None:
        """A broken body was answered already; aiohttp trips over it again as it reads the rest away."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """aiohttp sends an HTTPException from outside the middleware (a strange `Expect:`) as plain text.

        What nobody has read of a body it reads away, for a sender that is to see its answer. Of a compressed one that
        would be unpacked, for seconds without a pause: kilobytes can stand for gigabytes. It is dropped as it comes.
        """
        if self._messages and not self._reading_paused:
            # More was sent at once, and the parser may hold some of it back: it miscounts those that it is ahead once
            # a body has come after its request was taken.
            self.data_received(b"")
        if isinstance(resp, web.HTTPException):
            resp = refuse_malformed(self._app, resp)
        if not request.content.is_eof():
            encoding = request.headers.get("Content-Encoding", "identity")
            if encoding.strip().lower() != "identity":
                resp.force_close()
                self.close()  # from here on nothing is parsed
        return super().finish_response(request, resp, start_time)


class Server(web.Server):
    """The factory of connections; their requests go through the application's front door.

    To a path without variables by a table: aiohttp's router makes its findings and their middlewares anew for each.
    """

    def __init__(self, app: web.Application, **options: Any) -> None:
        handle: Any = self._take
        super().__init__(handle, request_factory=app._make_request, **options)
        self.app = app
        self._metrics = app[METRICS]
        self._found: dict[tuple[str, str], web.UrlMappingMatchInfo] = {}
        for route in app[ROUTE_TAKEN]:
            if isinstance(route.resource, web.PlainResource):
                # The first wins, as with the router: under a --root-path of /embed two have the path /embed.
                self._found.setdefault((route.method, route.resource.canonical), _found(app, route))

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        self._metrics.inside += 1
        try:
            found = self._found.get((request.method, request.raw_path))
            if found is None or "Expect" in request.headers:
                return await self.app._handle(request)
            request._match_info = found
            return await front_door(request, found.handler)
        finally:
            self._metrics.inside -= 1

    async def shutdown(self, timeout: float | None = None) -> None:
        """Closing a transport begins to send what is left in it. That, too, is to reach its client."""
        transports = list(self._connections.values())
        await super().shutdown(timeout)
        loop = asyncio.get_running_loop()
        end = loop.time() + FLUSH_SECONDS
        while any(left.get_write_buffer_size() for left in transports) and loop.time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _found(app: web.Application, route: web.AbstractRoute) -> web.UrlMappingMatchInfo:
    """What the router would find of a request for this route; nothing in it is the request's own."""
    match = web.UrlMappingMatchInfo({}, route)
    match.add_app(app)
    match.freeze()
    return match


class Runner(web.AppRunner):
    """aiohttp's runner with our connections. A client that leaves cancels its handler, and so its work."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            access_log=None,  # the middleware writes it
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGER_SECONDS,
            shutdown_timeout=FLUSH_SECONDS,
        )

    async def _make_server(self) -> Server:
        made = await super()._make_server()
        return Server(
            self.app, handler_cancellation=made.handler_cancellation, loop=made._loop, **made._kwargs
        )
