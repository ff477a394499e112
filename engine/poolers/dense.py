"""Layers of sentence-transformers behind its pooling, Dense above all: float32 [B, in] to [B, out]."""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from carpool.engine.errors import ConfigError
from carpool.engine.models.weights import stored
from carpool.engine.side_files import Dense, Layer

_PREFIXES = ("linear.", "dense.", "")  # of a folder's weights that holds nothing else


def load_layer(spec: Layer, device: torch.device) -> nn.Module:
    """In float32: a linear layer and its activation, or what keeps the width."""
    if isinstance(spec, Dense):
        return _load_dense(spec, device)
    if spec.folder is None:
        return _UnitLength()
    return _load_norm(spec.folder, int(spec.width or 0), device)


class _UnitLength(nn.Module):
    """Each row [D] over its length."""

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.normalize(rows, dim=-1)


def _load_norm(folder: Path, width: int, device: torch.device) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, dtype=torch.float32, device=device)
    tensors = _read(folder, re.compile(r"norm\.(weight|bias)$"))
    for name, parameter in norm.named_parameters():
        found = tensors.get(f"norm.{name}")
        if found is None or found.shape != parameter.shape:
            raise ConfigError(f"{folder.name} has no norm.{name} of shape ({width},) for its LayerNorm.")
        parameter.data.copy_(found)
    return norm.requires_grad_(False).eval()


def _load_dense(spec: Dense, device: torch.device) -> nn.Sequential:
    linear = nn.Linear(
        spec.in_features, spec.out_features, bias=spec.bias, dtype=torch.float32, device=device
    )
    names = "|".join(re.escape(prefix) for prefix in _prefixes(spec))
    tensors = _read(spec.folder, re.compile(f"({names})(weight|bias)$|residual\\.weight$"))
    for name in ("weight", "bias") if spec.bias else ("weight",):
        found = next((tensors[p + name] for p in _prefixes(spec) if p + name in tensors), None)
        parameter = getattr(linear, name)
        if found is None or found.shape != parameter.shape:
            raise ConfigError(
                f"{spec.folder.name} has no {name} of shape {tuple(parameter.shape)} for its Dense layer."
            )
        parameter.data.copy_(found)
    layer = nn.Sequential(linear, activation(spec.activation))
    if spec.residual:
        layer = nn.Sequential(_Residual(layer, _bypass(spec, tensors, device)))
    return layer.requires_grad_(False).eval()


class _Residual(nn.Module):
    """What goes in is added to what comes out, through `bypass`."""

    def __init__(self, layer: nn.Module, bypass: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._bypass = bypass

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self._layer(rows) + self._bypass(rows)
        return out


def _bypass(spec: Dense, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A linear layer where the widths differ."""
    if spec.in_features == spec.out_features:
        return nn.Identity()
    weight = tensors.get("residual.weight")
    if weight is None or weight.shape != (spec.out_features, spec.in_features):
        raise ConfigError(
            f"{spec.folder.name} has no residual.weight of shape {(spec.out_features, spec.in_features)}."
        )
    linear = nn.Linear(spec.in_features, spec.out_features, bias=False, device=device)
    linear.weight.data.copy_(weight)
    return linear


def activation(dotted: str) -> nn.Module:
    """An activation by the dotted name in a config; only torch's own classes are let in."""
    module, _, name = dotted.rpartition(".")
    if module != "torch.nn" and not f"{module}.".startswith("torch.nn.modules."):
        raise ConfigError(f"Activation {dotted!r} is refused: only torch.nn's own classes are loaded.")
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"Activation {dotted!r} cannot be made: {error}.") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"Activation {dotted!r} is none: {type(made).__name__} is no module of torch's.")
    return made


def _read(folder: Path, names: re.Pattern[str]) -> dict[str, Tensor]:
    """The weights of these names in `folder`."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(f"{folder} has neither model.safetensors nor pytorch_model.bin.")
    try:
        return stored(folder, names)
    except ConfigError:
        raise
    except Exception as error:  # damaged, or a pickle that is not safe to load: each format has its own words
        raise ConfigError(f"The weights in {folder} cannot be read: {type(error).__name__}.") from error


def _prefixes(spec: Dense) -> tuple[str, ...]:
    return (spec.prefix,) if spec.prefix else _PREFIXES
