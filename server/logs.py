"""Structured logs on stderr: JSON lines or a coloured console. User text is never among the fields."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import orjson
import structlog

from carpool.server.config import LogFormat, LogLevel


def set_up(level: LogLevel, format: LogFormat) -> None:
    """One form for our own lines and for those of libraries, which log through the standard library."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    if format == "auto":
        format = "console" if sys.stderr.isatty() else "json"
    render: Callable[..., Any]
    if format == "json":
        shared = [*_context(), structlog.processors.format_exc_info]
        render = structlog.processors.JSONRenderer(serializer=_json)
    else:
        shared = _context()
        render = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=render, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)


def _context() -> list[Any]:
    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]


def _json(entry: Any, **_: Any) -> str:
    return orjson.dumps(entry, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
