"""Architecture: what a checkpoint is for, read off its class name and configuration. Pure.

    *For*Classification, *ClassificationModel                    classify
    *ForTokenClassification                                      one result a token
    *ForRewardModel, *ForRewardModeling, *RewardModel            one reward a token
    *ForProcessRewardModel                                       one a step tag
    HF_ColBERT, ColBERT*                                         a vector a token, for late interaction
    *SpladeSparseEmbeddingModel                                  a weight for each entry of the vocabulary
    JinaForRanking                                               a vector a document of a list
    BgeM3EmbeddingModel                                          a vector, a vector a token, and a weight a token
    *ForTextEncoding, *EmbeddingModel, *Model, *ForCausalLM, …   embed

The most specific name wins. The files beside config.json can say more than it (sentence-transformers' modules, BGE-M3's
heads), and `--convert` overrules both. A *ForCausalLM that is asked for certain words at step
tags (STEP with returned_token_ids) is a judge: its language model's own logits of those words are the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from carpool.engine.config import Convert
from carpool.engine.errors import ConfigError
from carpool.engine.params import Task

Kind = Literal[
    "embed",
    "multi_vector",
    "sparse",
    "bge_m3",
    "listwise",
    "classify",
    "token_classify",
    "reward",
    "process_reward",
    "judge",
]
Activation = Literal["identity", "sigmoid", "softmax"]

_SUFFIXES: tuple[tuple[str, Kind], ...] = (  # the first that fits
    (r"ForTokenClassification", "token_classify"),
    (r"For\w+Classification", "classify"),
    (r"ClassificationModel", "classify"),
    (r"ForProcessRewardModel", "process_reward"),
    (r"ForRewardModel(?:ing)?", "reward"),
    (r"RewardModel", "reward"),
    (r"HF_ColBERT", "multi_vector"),
    (r"^ColBERT\w*", "multi_vector"),
    (r"SpladeSparseEmbeddingModel", "sparse"),
    (r"BgeM3EmbeddingModel", "bge_m3"),
    (r"^JinaForRanking", "listwise"),
    (r"ForTextEncoding", "embed"),
    (r"Model", "embed"),  # EmbeddingModel, LMHeadModel, ChatModel …
    (r"ForCausalLM", "embed"),
    (r"ForMaskedLM", "embed"),
    (r"ForPreTraining", "embed"),
    (r"ForConditionalGeneration", "embed"),
)
# What a conversion has nothing to do for: the model's class computes it already.
_FITS: Mapping[Kind, tuple[Kind, ...]] = {
    "embed": ("embed", "multi_vector", "sparse", "bge_m3", "listwise"),
    "classify": ("classify", "token_classify"),
    "reward": ("reward", "process_reward"),
}
_TASKS: Mapping[Kind, tuple[Task, ...]] = {
    "embed": ("embed", "token_embed"),
    "multi_vector": ("token_embed",),
    "sparse": ("embed", "sparse_embed"),
    "bge_m3": ("embed", "token_embed", "sparse_embed", "token_classify"),
    "listwise": ("token_embed",),
    "classify": ("classify", "token_classify"),
    "token_classify": ("token_classify",),
    "reward": ("token_classify",),
    "process_reward": ("token_classify",),
    "judge": ("token_classify",),
}

_RAW = {"JambaForSequenceClassification"}  # by its name a classifier, and a reward model in the reference
_OF_TORCH = re.compile(r"torch\.nn\.(modules\.|[A-Z]\w*$)")  # by its full name, or as people write it


@dataclass(frozen=True, slots=True)
class Architecture:
    """`tasks` are all that the model can do; the first is what it does when it is not told.

    `activates`: whether classes are probabilities, and no rewards as they are, for those who do not say.
    """

    kind: Kind
    tasks: tuple[Task, ...]
    activates: bool = True

    @property
    def embeds(self) -> bool:
        """Whether its results are vectors, and not classes or rewards."""
        return self.kind in _FITS["embed"]

    @classmethod
    def of(
        cls,
        architectures: tuple[str, ...],
        convert: Convert,
        step_words: bool = False,
        files: Kind | None = None,
    ) -> Architecture:
        """By class name, unless `convert` says what to make of the model.

        `files` is what the files beside config.json make of an embedding model.
        `step_words`: the pooler configuration asks for STEP and names returned_token_ids.
        """
        kind = _kind(architectures, convert, step_words, files)
        return cls(kind, _TASKS[kind], kind != "reward" and _RAW.isdisjoint(architectures))


def _kind(architectures: tuple[str, ...], convert: Convert, step_words: bool, files: Kind | None) -> Kind:
    if (
        step_words
        and convert in ("auto", "reward")
        and any(name.endswith("ForCausalLM") for name in architectures)
    ):
        return "judge"
    own = next(
        (kind for name in architectures for suffix, kind in _SUFFIXES if re.search(suffix + "$", name)), None
    )
    if files is not None and own in (None, *_FITS["embed"]):
        own = files
    if convert != "auto" and convert != "none":
        return own if own in _FITS[convert] else convert
    if own is not None or not architectures:
        return own or "embed"
    raise ConfigError(
        f"{', '.join(architectures)} does not say what the model is for: "
        "name it with --convert embed, classify or reward."
    )


@dataclass(frozen=True, slots=True)
class Scorer:
    """A head made of the language model's: the rows of `words`, or of `token_ids`, put together by `method`."""

    words: tuple[str, ...]
    method: Literal["from_2_way_softmax", "no_post_processing"]
    token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scorer | None:
        """As `classifier_from_token` and `method` have it, if they are there. Raises ConfigError if they do not fit."""
        words = tuple(map(str, config.get("classifier_from_token") or ()))
        method: Any = (
            "from_2_way_softmax" if config.get("is_original_qwen3_reranker") else config.get("method")
        )
        if method not in ("from_2_way_softmax", "no_post_processing"):
            if not words:
                return None
            raise ConfigError(
                'classifier_from_token needs "method": "from_2_way_softmax" or "no_post_processing" beside it '
                f"(or is_original_qwen3_reranker), got {method!r}."
            )
        if not words or (method == "from_2_way_softmax" and len(words) != 2):
            raise ConfigError(
                f"method {method!r} needs {'two words' if method == 'from_2_way_softmax' else 'a word'} in "
                f"classifier_from_token, got {list(words)}."
            )
        return cls(words, method)

    @classmethod
    def of_ids(cls, token_ids: tuple[int, ...]) -> Scorer:
        """Of (false, true), or of (true,) alone."""
        return cls((), "from_2_way_softmax" if len(token_ids) == 2 else "no_post_processing", token_ids)


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
    if not _OF_TORCH.match(str(dotted)):
        raise ConfigError(
            f"Activation {dotted!r} is refused: only torch.nn's own classes are loaded. Name one of them with "
            """--hf-overrides '{"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}'."""
        )
    name = str(dotted).rpartition(".")[2]
    if name == "Identity":
        return "identity"
    return by_count if name in ("Sigmoid", "Softmax") else str(dotted)


def labels_of(config: Mapping[str, Any], num_labels: int) -> tuple[str | None, ...]:
    """The label of each class: LABEL_0, LABEL_1, … where config.json names none, None where it names only others.

    Some name classes by numbers, which are texts to whoever reads them.
    """
    named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(num_labels)}
    found = (named.get(str(i), named.get(i)) for i in range(num_labels))
    return tuple(None if label is None else str(label) for label in found)
