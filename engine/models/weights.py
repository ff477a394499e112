"""Weights: a checkpoint's tensors by name, from safetensors files or, failing those, from pickles that are safe."""

from __future__ import annotations

import re
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn

_ALL = re.compile("")
# What is put into names by DataParallel, torch.compile, FSDP and checkpointing; none of them computes anything.
_WRAPPER = re.compile(
    r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Where the model lies within what was saved: a SentenceTransformer, or a class that was put around it.
_HOLDER = re.compile(r"^(?:0\.)?(?:auto_model\.|model\.)*")


def stored(folder: Path, wanted: re.Pattern[str] = _ALL) -> dict[str, Tensor]:
    """The tensors in `folder` whose names match from the start, mapped from the files, not copied, where they can be.

    The names are those of the model's own modules, without what a wrapper put around them while it was trained.
    """
    tensors: dict[str, Tensor] = {}
    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        with safe_open(path, framework="pt") as file:
            names = {key: _WRAPPER.sub("", key) for key in file.keys()}  # noqa: SIM118
            tensors |= {name: file.get_tensor(key) for key, name in names.items() if wanted.match(name)}
    if not safe:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            # Before torch 1.6 pickles were no archives, and can only be read as a whole.
            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            named = {_WRAPPER.sub("", key): tensor for key, tensor in pickled.items()}
            tensors |= {name: tensor for name, tensor in named.items() if wanted.match(name)}
    return tensors


def unwrapped(folder: Path) -> dict[str, Tensor]:
    """All tensors by the names that they have within the model itself, where they were saved from around it.

    Empty where that cannot be told: no name would change, or two would become one.
    """
    weights = stored(folder)
    bare = {_HOLDER.sub("", name): weight for name, weight in weights.items()}
    return {} if len(bare) < len(weights) else bare


def unmap(*models: nn.Module | None) -> None:
    """Copy what weights are still mapped from the checkpoint's files: the last one to go takes the mapping with it.

    For models whose large weights were copied into another layout: a mapping is kept whole, and counts as resident.
    """
    for model in models:
        for weight in () if model is None else model.parameters():
            if weight.layout == torch.strided:
                weight.data = weight.data.clone()
