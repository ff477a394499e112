"""What tests of layers in one native call share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tiny
from carpool.kernels import native_encoder


@pytest.fixture
def broad(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint with half as many heads of 16, which are attended natively."""

    def made(family: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(checkpoint(family), folder)
        tiny.edit_json(folder / "config.json", num_attention_heads=2)
        return folder

    return made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many layers each native call was."""
    calls: list[int] = []
    run = native_encoder.Encoder.__call__

    def counted(self: native_encoder.Encoder, *given: Any, **named: Any) -> Tensor:
        calls.append(len(self))
        return run(self, *given, **named)

    monkeypatch.setattr(native_encoder.Encoder, "__call__", counted)
    return calls
