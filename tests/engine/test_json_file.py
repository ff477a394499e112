"""JSON files of a model folder."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from carpool.engine import json_file
from carpool.engine.errors import ConfigError
from carpool.engine.json_file import read_json


def test_numbers_without_end_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    """Mamba 2's time_step_limit has one."""
    (tmp_path / "config.json").write_text(
        '{"limit": [0.0, {"__float__": "Infinity"}], "other": {"a": -Infinity}}'
    )
    assert read_json(tmp_path / "config.json") == {"limit": [0.0, math.inf], "other": {"a": -math.inf}}


def test_what_would_be_read_or_waited_for_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "deep").write_text("[" * 200_000)
    (tmp_path / "large").write_text('{"a": "' + "a" * 1000 + '"}')
    for name, why in (("pipe", "no file"), ("device", "no file"), ("deep", "nested too deeply")):
        with pytest.raises(ConfigError, match=why):
            read_json(tmp_path / name)
    assert read_json(tmp_path / "large")
    monkeypatch.setattr(json_file, "_MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="it has 1009 bytes"):
        read_json(tmp_path / "large")
