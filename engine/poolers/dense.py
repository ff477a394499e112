"""Dense heads of sentence-transformers: float32 [B, in] to [B, out], after pooling."""

from importlib import import_module

import torch
from safetensors import safe_open
from torch import Tensor, nn

from carpool.engine.checkpoint import Dense
from carpool.engine.errors import ConfigError


def load_dense(spec: Dense, device: torch.device) -> nn.Sequential:
    """The layer and its activation, in float32."""
    linear = nn.Linear(
        spec.in_features, spec.out_features, bias=spec.bias, dtype=torch.float32, device=device
    )
    try:
        tensors = _tensors(spec)
    except ConfigError:
        raise
    except Exception as error:  # damaged, or a pickle that is not safe to load: each format has its own words
        raise ConfigError(f"The weights in {spec.folder} cannot be read: {type(error).__name__}.") from error
    for name in ("weight", "bias") if spec.bias else ("weight",):
        found = next(
            (tensors[key] for key in (f"linear.{name}", f"dense.{name}", name) if key in tensors), None
        )
        parameter = getattr(linear, name)
        if found is None or found.shape != parameter.shape:
            raise ConfigError(
                f"{spec.folder.name} has no {name} of shape {tuple(parameter.shape)} for its Dense layer."
            )
        parameter.data.copy_(found)
    return nn.Sequential(linear, activation(spec.activation)).requires_grad_(False).eval()


def activation(dotted: str) -> nn.Module:
    """An activation by the dotted name in a config; only torch's own classes are let in."""
    module, _, name = dotted.rpartition(".")
    if not module.startswith("torch.nn.modules"):
        raise ConfigError(f"Activation {dotted!r} is refused: only classes of torch.nn.modules are loaded.")
    try:
        made = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"Activation {dotted!r} cannot be made: {error}.") from error
    assert isinstance(made, nn.Module)
    return made


def _tensors(spec: Dense) -> dict[str, Tensor]:
    safe, pickled = spec.folder / "model.safetensors", spec.folder / "pytorch_model.bin"
    if safe.is_file():
        with safe_open(safe, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if pickled.is_file():
        tensors: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        return tensors
    raise ConfigError(f"{spec.folder} has neither model.safetensors nor pytorch_model.bin.")
