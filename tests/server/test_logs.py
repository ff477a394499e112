"""Log lines: one form for ours and for the libraries'."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from carpool.server import logs


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


def test_a_traceback_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    try:
        raise ValueError("why")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
        logging.getLogger("library").exception("failed too")
    for line in capsys.readouterr().err.splitlines():
        assert "ValueError: why" in json.loads(line)["exception"]


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
