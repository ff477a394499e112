"""Adapter: a PEFT folder, read and understood; or a sentence that says why it cannot be served.

What PEFT can do beyond plain LoRA changes numbers, so a key of `adapter_config.json` that we do not know to be
harmless is refused where it is set, and so is a tensor that no rule here explains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from carpool.engine.errors import ConfigError, first_line
from carpool.engine.json_file import parsed
from carpool.engine.models.lora import Delta

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
_READ |= {"init_lora_weights", "bias"}
# What these say shows in the tensors or mattered in training only.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Other ways to begin training take their beginning out of the base's own weights.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

_PREFIX = re.compile(r"^base_model\.model\.")
_MATRIX = re.compile(r"^(.+)\.(lora_A|lora_B)(?:\.default)?\.weight$")
_TABLE = re.compile(r"^(.+)\.(lora_embedding_A|lora_embedding_B)(?:\.default)?$")
# A pattern with many ways to fit is tried in all of them, for longer than anyone waits, and nobody else runs meanwhile.
_WAYS = re.compile(r"\(\?:|[*+?{(]")
_MOST_WAYS = 4
_ENDLESS = re.compile(r"[*+{]")  # each multiplies the time by the name's length
_MOST_ENDLESS = 2
_NESTED = re.compile(r"\)[*+{]")
_LONGEST_PATTERN = 1000
_LONGEST_NAME = 256
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """`deltas` by the layer's name and `saved`, whole weights, by theirs, as the class it was trained on has them."""

    name: str
    deltas: Mapping[str, Delta]
    saved: Mapping[str, Tensor] = field(default_factory=dict)


def refusal(name: str, why: str) -> ConfigError:
    """`why` completes the sentence about the adapter `name`."""
    return ConfigError(f"The adapter {name!r} cannot be served: {why}.")


def read_peft(name: str, folder: Path) -> Adapter:
    """Read the PEFT folder of the adapter `name`. Raises ConfigError with one sentence if it holds more than LoRA."""
    config = _read_config(name, folder)
    tensors = _read_tensors(name, folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        bare = _PREFIX.sub("", key)
        if (match := _MATRIX.match(bare)) or (match := _TABLE.match(bare)):
            pairs.setdefault(match[1], {})[match[2][-1]] = tensor.float()
        elif "lora_" in bare:
            raise refusal(name, f"it holds {key}, which plain LoRA does not have")
        else:
            saved[_SAVED.sub("", bare)] = tensor
    if not pairs:
        raise refusal(name, f"{folder} holds no LoRA weights")
    if config.get("modules_to_save") and not saved:
        raise refusal(name, f"it was trained with {config['modules_to_save']} and does not bring them")
    deltas = {path: _delta(name, path, pair, config) for path, pair in pairs.items()}
    return Adapter(name, deltas, saved)


def _read_config(name: str, folder: Path) -> Mapping[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = parsed(path)
    except FileNotFoundError:
        raise refusal(name, f"{folder} has no adapter_config.json, so it is not a PEFT folder") from None
    except (OSError, ValueError) as error:
        raise refusal(name, f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise refusal(name, f"its peft_type is {kind}, and only LORA is served")
    if config.get("use_dora"):
        raise refusal(name, "it is DoRA (use_dora), which rescales whole weights; train it as plain LoRA")
    if config.get("bias", "none") != "none":
        raise refusal(name, f"it changes the base's biases (bias: {config['bias']})")
    if config.get("init_lora_weights", True) not in _BEGINNINGS:
        raise refusal(
            name,
            f"its init_lora_weights {config['init_lora_weights']!r} changed the base's own weights; "
            "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    for key, value in config.items():
        if value and key not in _READ and key not in _HARMLESS:
            raise refusal(name, f"adapter_config.json sets {key}, which is more than plain LoRA")
    return config


def _read_tensors(name: str, folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    try:
        if safe.is_file():
            with safe_open(safe, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if pickled.is_file():
            tensors: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                raise ValueError(f"{pickled.name} holds more than tensors")
            return tensors
    except Exception as error:  # safetensors, pickle and zip each have their own
        raise refusal(name, f"its weights cannot be read ({first_line(error)})") from error
    raise refusal(name, f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")


def _delta(name: str, path: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> Delta:
    down, up = pair.get("A"), pair.get("B")
    if down is None or up is None:
        raise refusal(name, f"{path} has only one of lora_A and lora_B")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        raise refusal(
            name, f"{path} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, which do not multiply"
        )
    try:
        rank = int(_by_pattern(config.get("rank_pattern"), path, config.get("r", 8)))
        alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))
    except (AttributeError, OverflowError, TypeError, ValueError, re.error) as error:
        raise refusal(
            name, f"adapter_config.json does not say of which rank and lora_alpha {path} is ({error})"
        ) from error
    if len(down) != rank:
        raise refusal(name, f"{path} is of rank {len(down)}, and adapter_config.json says {rank}")
    return Delta(down, up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that fits the layer's whole name, or its end behind a dot."""
    if patterns and len(path) > _LONGEST_NAME:
        raise re.error(f"a name of {len(path)} characters is too long for patterns")
    for pattern in patterns or {}:
        endless = len(_ENDLESS.findall(pattern)) > _MOST_ENDLESS or _NESTED.search(pattern)
        if endless or len(_WAYS.findall(pattern)) > _MOST_WAYS or len(pattern) > _LONGEST_PATTERN:
            raise re.error(f"the pattern {pattern[:60]!r} can fit in too many ways")
    fitting: Iterable[Any] = (
        value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)
    )
    return next(iter(fitting), default)
