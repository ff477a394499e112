"""Loader: a checkpoint becomes a backbone and, for classifiers, a head; or a sentence that says why not.

Three guards stand here and in `attention.py` and `probe.py`, because each of these faults gives plausible wrong
numbers: missing weights are fatal, attention arguments that we do not compute raise, and a model whose packed
sequences see each other is refused.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from carpool.engine.architecture import Architecture
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.poolers.classifier import ReplayedHead, head_from_tokens, head_from_weights

# Weights that a published checkpoint may lack: BERT's own pooler is not used, and position ids are computed.
_MAY_MISS = re.compile(r"(^|\.)(pooler\.|position_ids$)")
_REWARD_HEAD = re.compile(r"^(score|v_head)\.")


@dataclass(frozen=True, slots=True)
class Loaded:
    """`head` takes float32 rows [R, H] to logits; None for a model that has none."""

    backbone: Backbone
    head: nn.Module | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How to load: everything but what."""

    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    trust_remote_code: bool

    def load(self, checkpoint: Checkpoint, architecture: Architecture, token_ids: list[int] | None = None) -> Loaded:
        """Load the checkpoint, every weight accounted for, with packed attention in place.

        `token_ids`: those of the words whose language model rows are made a scorer (`classifier_from_token`).
        """
        # Our own checks speak, in one sentence.
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        config = self._config(checkpoint)
        _refuse_batch_dependent_rope(config, self.max_model_len)
        match architecture.kind:
            case "embed":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                return Loaded(self._backbone(model))
            case "classify" if token_ids is not None:
                full = self._model(AutoModelForCausalLM, checkpoint, config)
                rows = full.get_output_embeddings().weight[token_ids].float()
                method = "from_2_way_softmax" if config.to_dict().get("is_original_qwen3_reranker") else None
                method = config.to_dict().get("method") or method or "no_post_processing"
                return Loaded(self._backbone(full.base_model), head_from_tokens(rows, method))
            case "classify":
                full = self._model(AutoModelForSequenceClassification, checkpoint, config)
                return Loaded(self._backbone(full.base_model), ReplayedHead(full, per_token=False))
            case "token_classify":
                full = self._model(AutoModelForTokenClassification, checkpoint, config)
                return Loaded(self._backbone(full.base_model), ReplayedHead(full, per_token=True))
            case "reward" | "process_reward":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                head = head_from_weights(_stored(checkpoint, _REWARD_HEAD)).to(self.device)
                return Loaded(self._backbone(model), head)

    def _model(
        self, auto: Any, checkpoint: Checkpoint, config: PreTrainedConfig, **options: Any
    ) -> PreTrainedModel:
        try:
            model, info = auto.from_pretrained(
                str(checkpoint.path),
                config=config,
                dtype=self.dtype,
                attn_implementation=NAME,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # transformers raises whatever went wrong inside
            raise ConfigError(f"The model in {checkpoint.path} cannot be loaded: {_first_line(error)}") from error
        # A head that is replayed does use BERT's pooler.
        heedless = auto is AutoModel or auto is AutoModelForTokenClassification
        missing = sorted(name for name in info["missing_keys"] if not (_MAY_MISS.search(name) and heedless))
        missing = [name for name in missing if not name.endswith("position_ids")]
        if missing:
            raise ConfigError(
                f"The checkpoint lacks {len(missing)} of the weights that {type(model).__name__} needs "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): it is damaged, or made for another "
                "class."
            )
        model.eval()
        for weight in model.parameters():
            weight.requires_grad_(False)
        loaded: PreTrainedModel = model.to(self.device)
        return loaded

    def _backbone(self, module: PreTrainedModel) -> Backbone:
        backbone = Backbone(module)
        if backbone.max_positions is not None and self.max_model_len > backbone.max_positions:
            raise ConfigError(
                f"The model has positions for {backbone.max_positions} tokens, and {self.max_model_len} are asked "
                f"for: serve it with --max-model-len {backbone.max_positions}."
            )
        return backbone

    def _config(self, checkpoint: Checkpoint) -> PreTrainedConfig:
        """The model's configuration with the user's overrides; never asks on standard input."""
        try:
            config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=self.trust_remote_code)
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
    original = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", 0) or 0
    if kind in ("dynamic", "longrope") and max_model_len > original:
        raise ConfigError(
            f"This model's {kind} rotary embedding depends on the longest prompt of a batch beyond {original} "
            f"tokens; serve it with --max-model-len {original}."
        )


def _stored(checkpoint: Checkpoint, wanted: re.Pattern[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors whose names match, from its safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if wanted.match(key)}  # noqa: SIM118
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
