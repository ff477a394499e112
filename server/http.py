"""aiohttp's connection, bent in a few places so that every failure leaves in our one shape.

aiohttp answers malformed HTTP in plain text before any application code runs, and has no public hook for it.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from carpool.server.middleware import refuse_malformed

IDLE_SECONDS = 75.0  # longer than common proxies keep a connection: they must be the first to hang up
LINGER_SECONDS = 2.0  # for a sender to read why the rest of its body is not wanted
FLUSH_SECONDS = 5.0  # for the last answers to reach their clients when the server stops


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_app",)

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._app = server.app

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
        """aiohttp says so after every read, and feeds its parser nothing; only what was paused has anything left."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("The answer has begun; all that is left is to hang up.")
        return refuse_malformed(self._app, exc or RuntimeError(message))

    def log_exception(self, *args: Any, **options: Any) -> None:
        """A broken body was answered already; aiohttp trips over it again as it reads the rest away."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """aiohttp sends an HTTPException from outside the middleware (a strange `Expect:`) as plain text."""
        if isinstance(resp, web.HTTPException):
            resp = refuse_malformed(self._app, resp)
        return super().finish_response(request, resp, start_time)


class Server(web.Server):
    """The factory of connections."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        handle: Any = app._handle
        super().__init__(handle, request_factory=app._make_request, **options)
        self.app = app

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


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
