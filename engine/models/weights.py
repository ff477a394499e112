"""Weights: a checkpoint's tensors by name, from safetensors files or, failing those, from pickles that are safe."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

_ALL = re.compile("")


def stored(folder: Path, wanted: re.Pattern[str] = _ALL) -> dict[str, Tensor]:
    """The tensors in `folder` whose names match from the start, mapped from the files, not copied."""
    tensors: dict[str, Tensor] = {}
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if wanted.match(key)}  # noqa: SIM118
    if not safe:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors |= {key: tensor for key, tensor in pickled.items() if wanted.match(key)}
    return tensors


def unmap(*models: nn.Module | None) -> None:
    """Copy what weights are still mapped from the checkpoint's files: the last one to go takes the mapping with it.

    For models whose large weights were copied into another layout: a mapping is kept whole, and counts as resident.
    """
    for model in models:
        for weight in () if model is None else model.parameters():
            if weight.layout == torch.strided:
                weight.data = weight.data.clone()
