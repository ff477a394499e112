"""Structured logs on stderr: JSON lines or a coloured console. User text is never among the fields."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson
import structlog

from carpool.server.config import LogFormat, LogLevel


class _Lossy:
    """A stream that loses what cannot be written: no client goes unanswered for a full disk or a pipe nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: closed
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def set_up(level: LogLevel, format: LogFormat) -> None:
    """One form for our own lines and for those of libraries, which log through the standard library."""
    stream: Any = _Lossy(sys.stderr)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    if format == "auto":
        format = "console" if sys.stderr.isatty() else "json"
    render: Callable[..., Any]
    logger = structlog.make_filtering_bound_logger(threshold)
    if format == "json":
        shared = [*_context(), structlog.processors.format_exc_info]
        render = structlog.processors.JSONRenderer(serializer=_json)
        logger = _straight(logger, render)
    else:
        shared = _context()
        # The renderer's own choice prints the variables of every frame: keys, and what users sent.
        render = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=logger,
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=render, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)


def _straight(logger: type[Any], render: Any) -> type[Any]:
    """Loggers that write a plain JSON line without the chain, which would make the same of it in twice the time.

    Every request has a line. While others' processors are in place (a test captures the lines), these get them.
    """

    class Straight(logger):  # type: ignore[misc]  # structlog makes its classes at run time
        def _proxy_to_logger(self, method_name: str, event: str | None = None, **fields: Any) -> Any:
            if "exc_info" in fields or self._context or render not in self._processors:
                return super()._proxy_to_logger(method_name, event, **fields)
            fields["event"] = event
            fields["level"] = method_name
            fields["timestamp"] = datetime.now(UTC)
            return self._logger.msg(_json(fields))

    return Straight


def _context() -> list[Any]:
    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]


def _json(entry: Any, **_: Any) -> str:
    return orjson.dumps(entry, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z).decode()
