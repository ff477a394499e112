"""Loader: a checkpoint becomes a backbone and, for classifiers, a head; or a sentence that says why not.

Three guards stand here and in `attention.py` and `probe.py`, because each of these faults gives plausible wrong
numbers: missing weights are fatal, attention arguments that we do not compute raise, and a model whose packed
sequences see each other is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
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

from carpool.engine.architecture import Architecture, Scorer
from carpool.engine.checkpoint import Checkpoint, PoolingMode
from carpool.engine.errors import ConfigError
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.patches import patch
from carpool.engine.models.renames import RENAMES
from carpool.engine.models.weights import stored
from carpool.engine.poolers.classifier import (
    ReplayedHead,
    head_from_tokens,
    head_from_weights,
    keep_words,
)

# Weights that a published checkpoint may lack: BERT's own pooler is not used, and position ids are computed.
_MAY_MISS = re.compile(r"(^|\.)(pooler\.|position_ids$)")
_REWARD_HEAD = re.compile(r"^(score|v_head)\.")
_SCORE_BIAS = re.compile(r"^score\.bias$")


@dataclass(frozen=True, slots=True)
class Loaded:
    """`head` takes float32 rows [R, H] to logits; None for a model that has none.

    `pooling` is what a classifier's class pools for its head, where that is not left to the kind of its backbone;
    `late`: it pools the logits of all rows instead.
    """

    backbone: Backbone
    head: nn.Module | None = None
    pooling: PoolingMode | None = None
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How to load: everything but what."""

    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    trust_remote_code: bool

    def load(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        scorer: Scorer | None = None,
        token_ids: Seq[int] = (),
    ) -> Loaded:
        """Load the checkpoint, every weight accounted for, with packed attention in place.

        `token_ids`: whose rows of the language model's head make the `scorer`, or a judge's logits.
        """
        # Our own checks speak, in one sentence.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        config = self._config(checkpoint)
        _refuse_batch_dependent_rope(config, self.max_model_len)
        match architecture.kind:
            case "embed":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                return Loaded(self._backbone(model))
            case "classify" if scorer is not None:
                full = self._language_model(checkpoint, config)
                rows = full.get_output_embeddings().weight[list(token_ids)].float()
                return Loaded(self._backbone(full.base_model), head_from_tokens(rows, scorer.method), "last")
            case "classify":
                full = self._model(AutoModelForSequenceClassification, checkpoint, config)
                _honour_bias(full, checkpoint)
                pooling, late = _class_pooling(full)
                backbone = self._backbone(full.base_model)
                return Loaded(backbone, ReplayedHead(full, per_token=False), pooling, late)
            case "token_classify":
                full = self._model(AutoModelForTokenClassification, checkpoint, config)
                return Loaded(self._backbone(full.base_model), ReplayedHead(full, per_token=True))
            case "judge":
                full = self._language_model(checkpoint, config)
                keep_words(full, token_ids)
                return Loaded(self._backbone(full.base_model), ReplayedHead(full, per_token=True))
            case "reward" | "process_reward":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                return Loaded(self._backbone(model), self._reward_head(checkpoint))

    def _language_model(self, checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedModel:
        full = self._model(AutoModelForCausalLM, checkpoint, config)
        if not isinstance(full.get_output_embeddings(), nn.Linear):
            raise ConfigError(f"{type(full).__name__} has no language model head to read words from.")
        return full

    def _reward_head(self, checkpoint: Checkpoint) -> nn.Module | None:
        """None for a plain model that was told to be one (`--convert reward`): its hidden states are the result."""
        head = stored(checkpoint.path, _REWARD_HEAD)
        if not head and not any(re.search(r"RewardModel(ing)?$", name) for name in checkpoint.architectures):
            return None
        return head_from_weights(head).to(self.device)

    def _model(
        self, auto: Any, checkpoint: Checkpoint, config: PreTrainedConfig, **options: Any
    ) -> PreTrainedModel:
        rename = RENAMES.get(checkpoint.dialect or "")
        try:
            own: dict[str, Any]
            if rename is None:
                source, own = auto, {"trust_remote_code": self.trust_remote_code}
            else:
                source = auto._model_mapping[type(config)]
                own = {"state_dict": rename(stored(checkpoint.path), config)}
            model, info = source.from_pretrained(
                str(checkpoint.path) if rename is None else None,
                config=config,
                dtype=self.dtype,
                attn_implementation=NAME,
                output_loading_info=True,
                **own,
                **options,
            )
        except Exception as error:  # transformers raises whatever went wrong inside
            raise ConfigError(
                f"The model in {checkpoint.path} cannot be loaded: {_first_line(error)}"
            ) from error
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
        patch(module)
        backbone = Backbone(module)
        if backbone.max_positions is not None and self.max_model_len > backbone.max_positions:
            raise ConfigError(
                f"The model has positions for {backbone.max_positions} tokens, and {self.max_model_len} are asked "
                f"for: serve it with --max-model-len {backbone.max_positions}."
            )
        return backbone

    def _config(self, checkpoint: Checkpoint) -> PreTrainedConfig:
        """The model's configuration with the user's overrides; never asks on standard input."""
        known = CONFIG_MAPPING.keys()
        try:
            if (kind := checkpoint.config.get("model_type")) in known and not self.trust_remote_code:
                config_class: Any = CONFIG_MAPPING[kind]
            else:
                config_class = type(
                    AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=self.trust_remote_code)
                )
            merged: PreTrainedConfig = config_class.from_dict(dict(checkpoint.config))
            return merged
        except Exception as error:
            raise ConfigError(
                f"The config.json in {checkpoint.path} is not one carpool can serve: {_first_line(error)}"
            ) from error


def _class_pooling(full: PreTrainedModel) -> tuple[PoolingMode | None, bool]:
    """Which rows a classifier's class feeds to its head, and whether it does so behind the head."""
    match getattr(full.config, "classifier_pooling", None):
        case "cls" | "bos":
            return "cls", False
        case "mean":
            return "mean", False
        case "late":
            return "mean", True
    # Classes made of a causal model score its last token, also where it was told to look both ways.
    return ("last", False) if isinstance(getattr(full, "score", None), nn.Linear) else (None, False)


def _honour_bias(full: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """A causal model's `score` layer has no bias in transformers; some checkpoints bring one."""
    score = getattr(full, "score", None)
    bias = stored(checkpoint.path, _SCORE_BIAS)
    if isinstance(score, nn.Linear) and score._parameters.get("bias") is None and bias:
        score.bias = nn.Parameter(bias["score.bias"].to(score.weight), requires_grad=False)


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
            f"This model's {kind} rotary embedding depends on the longest prompt of a batch beyond {original} "
            f"tokens; serve it with --max-model-len {original}."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
