"""Loader: a checkpoint becomes a Backbone, or a sentence that says why not.

Three guards stand here and in `attention.py`, because each of these faults gives plausible wrong numbers:
missing weights are fatal, a model whose packed sequences see each other is refused (`probe.py`), and attention
arguments that we do not compute raise.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from carpool.engine.checkpoint import Checkpoint
from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone

# Weights that a published checkpoint may lack: BERT's own pooler is not used, and position ids are computed.
_MAY_MISS = re.compile(r"(^|\.)(pooler\.|position_ids$)")


def load_backbone(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    trust_remote_code: bool,
) -> Backbone:
    """Load the checkpoint's backbone, every weight accounted for, with packed attention in place."""
    # Our own checks speak, in one sentence.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = _config(checkpoint, trust_remote_code)
    try:
        model, info = AutoModel.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **_without_pooler(config),
        )
    except Exception as error:  # transformers raises whatever went wrong inside
        raise ConfigError(f"The model in {checkpoint.path} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not _MAY_MISS.search(name))
    if missing:
        raise ConfigError(
            f"The checkpoint lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): it is damaged, or made for another class."
        )
    _refuse_batch_dependent_rope(config, max_model_len)
    backbone = Backbone(_frozen(model.to(device)))
    if backbone.max_positions is not None and max_model_len > backbone.max_positions:
        raise ConfigError(
            f"The model has positions for {backbone.max_positions} tokens, and {max_model_len} are asked for: "
            f"serve it with --max-model-len {backbone.max_positions}."
        )
    return backbone


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's configuration with the user's overrides; never asks on standard input."""
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=trust_remote_code)
        merged: PreTrainedConfig = type(config).from_dict(dict(checkpoint.config))
        return merged
    except Exception as error:
        raise ConfigError(
            f"The config.json in {checkpoint.path} is not one carpool can serve: {_first_line(error)}"
        ) from error


def _without_pooler(config: PreTrainedConfig) -> dict[str, Any]:
    """BERT-likes compute a pooler that nobody reads; most can be told not to."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if model_class is None or isinstance(model_class, tuple):
        return {}
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _refuse_batch_dependent_rope(config: PreTrainedConfig, max_model_len: int) -> None:
    """Some rotary embeddings stretch with the longest sequence of the batch: neighbours would change results."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    original = (
        rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", 0) or 0
    )
    if kind in ("dynamic", "longrope") and max_model_len > original:
        raise ConfigError(
            f"This model's {kind} rotary embedding depends on the longest prompt of a batch beyond {original} tokens; "
            f"serve it with --max-model-len {original}."
        )


def _frozen(model: nn.Module) -> nn.Module:
    model.eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
