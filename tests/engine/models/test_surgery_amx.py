"""Models whose layers are laid out in tiles, and run on tiles in software, are as exact as without them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from carpool.engine.build import build
from carpool.engine.config import EngineConfig
from carpool.engine.models.surgery.native_linear import NativeLinear
from carpool.engine.packing import pack_ids
from carpool.kernels import native
from emu import soft

pytestmark = pytest.mark.skipif(soft.MISSING is not None, reason=str(soft.MISSING))
BATCH = pack_ids([[5, 6, 7], list(range(8, 28)), list(range(10, 50))], torch.device("cpu"))


class Beside:
    """The kernels on software tiles, and those that are no different, which are not compiled again."""

    def __init__(self, tiles: ctypes.CDLL, others: ctypes.CDLL | None) -> None:
        self.libraries = tiles, others

    def __getattr__(self, name: str) -> Any:
        return next(getattr(library, name) for library in self.libraries if hasattr(library, name))


@pytest.fixture(scope="module")
def tiles() -> ctypes.CDLL:
    return soft.library()


def hidden(path: Path, dtype: Literal["float32", "bfloat16"]) -> tuple[Tensor, set[bool]]:
    """What the last layer gives, and whether weights of native layers lie in tiles."""
    parts = build(EngineConfig(model=str(path), dtype=dtype, cpu_workers=1, max_num_batched_tokens=512))
    backbone = parts.runners[0]._backbone
    layers = [layer for layer in backbone.module.modules() if isinstance(layer, NativeLinear)]
    with torch.inference_mode():
        return backbone.forward(BATCH).float(), {layer.panels().tiled for layer in layers}


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_a_model_on_tiles_is_as_exact_as_on_avx_512(
    family: str, checkpoint: Callable[[str], Path], tiles: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = hidden(checkpoint(family), "float32")
    other, tiled = hidden(checkpoint(family), "bfloat16")
    assert tiled == {native.level >= native.AMX}
    monkeypatch.setattr(native, "library", Beside(tiles, native.library))
    monkeypatch.setattr(native, "level", native.AMX)
    mine, tiled = hidden(checkpoint(family), "bfloat16")
    assert tiled == {True}
    assert tiles.carpool_tile_fault() is None
    assert (mine - exact).norm() <= 1.3 * (other - exact).norm()


def test_a_level_that_is_not_used_is_told_of(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "setback", "AMX BF16 computes something else.")
    parts = build(EngineConfig(model=str(checkpoint("bert")), cpu_workers=1, max_num_batched_tokens=512))
    assert "AMX BF16 computes something else." in parts.model.notices
