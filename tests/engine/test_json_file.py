"""JSON files of a model folder."""

from __future__ import annotations

import math
from pathlib import Path

from carpool.engine.json_file import read_json


def test_numbers_without_end_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    """Mamba 2's time_step_limit has one."""
    (tmp_path / "config.json").write_text(
        '{"limit": [0.0, {"__float__": "Infinity"}], "other": {"a": -Infinity}}'
    )
    assert read_json(tmp_path / "config.json") == {"limit": [0.0, math.inf], "other": {"a": -math.inf}}
