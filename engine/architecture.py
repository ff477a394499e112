"""Architecture: what a checkpoint is for, read off its class name and configuration. Pure.

    *For*Classification, *ClassificationModel                    classify
    *ForTokenClassification                                      one result a token
    *ForRewardModel, *ForRewardModeling, *RewardModel            one reward a token
    *ForProcessRewardModel                                       one a step tag
    *ForTextEncoding, *EmbeddingModel, *Model, *ForCausalLM, …   embed

The longest suffix that fits wins, and `--convert` overrules it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from carpool.engine.config import Convert
from carpool.engine.errors import ConfigError
from carpool.engine.params import Task

Kind = Literal["embed", "classify", "token_classify", "reward", "process_reward"]
Activation = Literal["identity", "sigmoid", "softmax"]

_SUFFIXES: tuple[tuple[str, Kind], ...] = (
    (r"For\w+Classification", "classify"),
    (r"ClassificationModel", "classify"),
    (r"ForTokenClassification", "token_classify"),
    (r"ForRewardModel(?:ing)?", "reward"),
    (r"RewardModel", "reward"),
    (r"ForProcessRewardModel", "process_reward"),
    (r"ForTextEncoding", "embed"),
    (r"EmbeddingModel", "embed"),
    (r"Model", "embed"),
    (r"ForCausalLM", "embed"),
    (r"ForMaskedLM", "embed"),
    (r"ForPreTraining", "embed"),
    (r"LMHeadModel", "embed"),
    (r"ForConditionalGeneration", "embed"),
)
_TASKS: Mapping[Kind, tuple[Task, ...]] = {
    "embed": ("embed", "token_embed"),
    "classify": ("classify", "token_classify"),
    "token_classify": ("token_classify",),
    "reward": ("token_classify",),
    "process_reward": ("token_classify",),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """`tasks` are all that the model can do; the first is what it does when it is not told."""

    kind: Kind
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, architectures: tuple[str, ...], convert: Convert) -> Architecture:
        """By class name, unless `convert` says what to make of the model."""
        kind = _kind(architectures, convert)
        return cls(kind, _TASKS[kind])


def _kind(architectures: tuple[str, ...], convert: Convert) -> Kind:
    if convert not in ("auto", "none"):
        return convert
    for name in architectures:
        fitting = [(len(found.group()), kind) for suffix, kind in _SUFFIXES if (found := re.search(suffix + "$", name))]
        # `For\w+Classification` may swallow more than its own words: the narrower pattern of equal reach comes later.
        if fitting:
            longest = max(length for length, _ in fitting)
            return [kind for length, kind in fitting if length == longest][-1]
    if not architectures:
        return "embed"
    raise ConfigError(
        f"{', '.join(architectures)} does not say what the model is for: name it with --convert embed, classify or reward."
    )


def activation_of(config: Mapping[str, Any], num_labels: int) -> Activation | str:
    """What turns logits into probabilities: one of Activation, or the dotted name of a torch module.

    `problem_type` decides; then the cross-encoder files of sentence-transformers; then the number of labels.
    """
    by_count: Activation = "sigmoid" if num_labels < 2 else "softmax"
    problem = config.get("problem_type")
    if problem == "regression":
        return "identity"
    if problem == "single_label_classification":
        return by_count
    if problem == "multi_label_classification":
        return "sigmoid"
    cross_encoder = config.get("sentence_transformers") or {}
    dotted = cross_encoder.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if not dotted:
        return by_count
    if not str(dotted).startswith("torch.nn.modules."):
        raise ConfigError(f"Activation {dotted!r} is refused: only classes of torch.nn.modules are loaded.")
    name = str(dotted).rpartition(".")[2]
    if name == "Identity":
        return "identity"
    return by_count if name in ("Sigmoid", "Softmax") else str(dotted)


def labels_of(config: Mapping[str, Any], num_labels: int) -> tuple[str | None, ...]:
    """The label of each class, None where config.json names none."""
    named = config.get("id2label") or {}
    return tuple(named.get(str(i), named.get(i)) for i in range(num_labels))
