"""Log lines: one form for ours and for the libraries'."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog
import structlog.testing

from carpool.server import logs
from carpool.server.config import LogFormat


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    structlog.get_logger().info("ready", port=1, path=json)
    structlog.get_logger().debug("unheard")
    logging.getLogger("library").warning("from a %s", "library")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["level"], ours["port"]) == ("ready", "info", 1)
    assert (theirs["event"], theirs["level"]) == ("from a library", "warning")
    assert ours["timestamp"].endswith("Z")


def test_a_line_written_straight_is_the_chains(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"status": 200, "path": json, "request_id": "a\n"}
    logs.set_up("info", "json")
    structlog.get_logger().info("request", **fields)
    structlog.get_logger().bind(status=200).info("request", path=json, request_id="a\n")  # by the chain
    straight, chain = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    for line in (straight, chain):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line.pop("timestamp"))
    assert straight == chain
    assert list(straight) == list(chain)


def test_lines_can_be_captured_where_they_would_be_written_straight(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.set_up("info", "json")
    log = structlog.get_logger()
    log.info("before")
    with structlog.testing.capture_logs() as lines:
        log.info("request", status=200)
    log.info("after")
    assert lines == [{"event": "request", "status": 200, "log_level": "info"}]
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["before", "after"]


def test_a_traceback_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    try:
        raise ValueError("why")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
        logging.getLogger("library").exception("failed too")
    for line in capsys.readouterr().err.splitlines():
        assert "ValueError: why" in json.loads(line)["exception"]


def test_a_traceback_on_the_console_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    def embed(text: str) -> None:
        api_key = text.upper()
        raise ValueError(f"why {len(api_key)}")

    logs.set_up("info", "console")
    try:
        embed("private words")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
        logging.getLogger("library").exception("failed too")
    text = capsys.readouterr().err
    assert text.count("ValueError: why 13") == 2
    assert "private words" not in text.lower().replace(
        'embed("private words")', ""
    )  # but for the line of code itself


def test_console_lines_when_asked_or_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "console")
    structlog.get_logger().info("ready", port=1)
    assert "ready" in (text := capsys.readouterr().err)
    assert "port=1" in text
    logs.set_up("info", "auto")
    structlog.get_logger().info("ready")
    json.loads(capsys.readouterr().err)


def test_the_level_silences_libraries_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("error", "json")
    structlog.get_logger().warning("unheard")
    logging.getLogger("library").warning("unheard")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("format", ["json", "console"])
def test_what_cannot_be_written_is_lost_and_nothing_else(
    format: LogFormat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a pipe whose reader has died."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w", buffering=1) as pipe:
        patch.setattr(sys, "stderr", pipe)
        logs.set_up("info", format)
        structlog.get_logger().info("lost")
        structlog.get_logger().error("lost", exc_info=ValueError("with a traceback"))
        logging.getLogger("library").warning("lost too")
        with suppress(BrokenPipeError):
            pipe.close()
    assert capsys.readouterr().err == "", "logging does not complain of it either"
