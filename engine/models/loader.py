"""Loader: a checkpoint becomes a backbone and, for classifiers, a head; or a sentence that says why not.

Three guards stand in `account.py`, `attention.py` and `probe.py`, because each of these faults gives plausible wrong
numbers: weights that are missing, or left over inside a layer, are fatal; attention arguments that we do not compute
raise; and a model whose packed sequences see each other is not packed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

import carpool.engine.models.native  # noqa: F401  (registers our own classes)
from carpool.engine.architecture import Architecture, Scorer
from carpool.engine.checkpoint import Checkpoint
from carpool.engine.errors import ConfigError, first_line
from carpool.engine.models.account import Account
from carpool.engine.models.attention import NAME
from carpool.engine.models.backbone import Backbone, hidden_size
from carpool.engine.models.patches import patch
from carpool.engine.models.renames import RENAMES
from carpool.engine.models.tower import text_tower
from carpool.engine.models.weights import stored, unwrapped
from carpool.engine.poolers.classifier import (
    ReplayedHead,
    WordScore,
    head_from_tokens,
    head_from_weights,
    keep_words,
)
from carpool.engine.poolers.dense import load_layer
from carpool.engine.side_files import PoolingMode

# Keys of a configuration that change how a model is run and not what it computes.
_PLAIN: dict[str, Any] = {"return_dict": True, "chunk_size_feed_forward": 0}
_REWARD_HEAD = re.compile(r"^(score|v_head)\.")
_PROJECTION = re.compile(r"^(colbert_)?linear\.(weight|bias)$")
_PROJECTOR = re.compile(r"^projector\.\d+\.(weight|bias)$")
_SCORE_BIAS = re.compile(r"^score\.bias$")


@dataclass(frozen=True, slots=True)
class Loaded:
    """`head` takes float32 rows [R, H] to logits (a masked language model's to its vocabulary's) or, a ColBERT's or a
    listwise reranker's, to vectors; None for a model that has none.

    `pooling` is what a classifier's class pools for its head, where that is not left to the kind of its backbone;
    `late`: it pools the logits of all rows instead.
    """

    backbone: Backbone
    head: nn.Module | None = None
    pooling: PoolingMode | None = None
    late: bool = False


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers is silent but for errors: our own checks speak, in one sentence. A script's own settings return."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How to load: everything but what."""

    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    trust_remote_code: bool

    @_quietly()
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
        config = self._config(checkpoint)
        self._refuse_unread_code(checkpoint)
        match architecture.kind:
            case "embed" | "bge_m3" | "multi_vector":
                model = self._model(_embedder(config), checkpoint, config, **_without_pooler(config))
                head = self._projection(checkpoint) if architecture.kind == "multi_vector" else None
                return Loaded(self._backbone(model), head)
            case "listwise":
                model = self._model(_embedder(config), checkpoint, config)
                return Loaded(self._backbone(model), self._projector(checkpoint))
            case "sparse":
                full = self._model(AutoModelForMaskedLM, checkpoint, config)
                return Loaded(self._backbone(full.base_model), _replayed(full, per_token=True))
            case "classify" if scorer is not None:
                full = self._language_model(checkpoint, config)
                if scorer.words:
                    # As the reference reads them: bare weights, whatever the class does behind them.
                    rows = full.get_output_embeddings().weight[list(token_ids)].float()
                    return Loaded(
                        self._backbone(full.base_model), head_from_tokens(rows, scorer.method), "last"
                    )
                keep_words(full, token_ids)
                backbone = self._backbone(full.base_model)
                return Loaded(backbone, WordScore(_replayed(full, per_token=True)), "last")
            case "classify" if checkpoint.files == "classify":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                layers = [load_layer(spec, self.device) for spec in checkpoint.dense]
                return Loaded(self._backbone(model), nn.Sequential(*layers))
            case "classify":
                full = self._model(AutoModelForSequenceClassification, checkpoint, config)
                _honour_bias(full, checkpoint)
                pooling, late = _class_pooling(full)
                backbone = self._backbone(full.base_model)
                return Loaded(backbone, _classifier(full), pooling, late)
            case "token_classify":
                full = self._model(AutoModelForTokenClassification, checkpoint, config)
                return Loaded(self._backbone(full.base_model), _replayed(full, per_token=True))
            case "judge":
                full = self._language_model(checkpoint, config)
                keep_words(full, token_ids)
                return Loaded(self._backbone(full.base_model), _replayed(full, per_token=True))
            case "reward" | "process_reward":
                model = self._model(AutoModel, checkpoint, config, **_without_pooler(config))
                return Loaded(self._backbone(model), self._reward_head(checkpoint))

    def _language_model(self, checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedModel:
        # One that takes images as well is none to the first.
        sees = (
            type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
            and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        )
        full = self._model(AutoModelForImageTextToText if sees else AutoModelForCausalLM, checkpoint, config)
        if not isinstance(full.get_output_embeddings(), nn.Linear):
            raise ConfigError(f"{type(full).__name__} has no language model head to read words from.")
        return full

    def _reward_head(self, checkpoint: Checkpoint) -> nn.Module | None:
        """None for a plain model that was told to be one (`--convert reward`): its hidden states are the result."""
        head = stored(checkpoint.path, _REWARD_HEAD)
        if not head and not any(re.search(r"RewardModel(ing)?$", name) for name in checkpoint.architectures):
            return None
        return head_from_weights(head).to(self.device)

    def _projection(self, checkpoint: Checkpoint) -> nn.Module | None:
        """A ColBERT's, beside its backbone's weights; None where it is a module of sentence-transformers."""
        if checkpoint.dense:
            return None
        tensors = stored(checkpoint.path, _PROJECTION)
        if not tensors:
            raise ConfigError(
                "The checkpoint says it is a ColBERT and has neither a linear.weight nor a Dense module to make its "
                "vectors with."
            )
        return head_from_weights(tensors, ("linear", "colbert_linear")).to(self.device)

    def _projector(self, checkpoint: Checkpoint) -> nn.Module:
        """A listwise reranker's: `projector.0`, ReLU, `projector.2`, beside its backbone's weights."""
        tensors = stored(checkpoint.path, _PROJECTOR)
        if not {"projector.0.weight", "projector.2.weight"} <= tensors.keys():
            raise ConfigError(
                "The checkpoint says it is a listwise reranker and lacks projector.0.weight or projector.2.weight, "
                "which make the vectors that it compares."
            )
        return head_from_weights(tensors, ("projector",)).to(self.device)

    def _model(
        self, auto: Any, checkpoint: Checkpoint, config: PreTrainedConfig, **options: Any
    ) -> PreTrainedModel:
        rename = RENAMES.get(checkpoint.dialect or "")
        weights = rename(stored(checkpoint.path), config) if rename else None
        model, account = self._pretrained(auto, checkpoint, config, weights, options)
        if account.missing and (bare := unwrapped(checkpoint.path)):
            weights = rename(bare, config) if rename else bare
            again, its_account = self._pretrained(auto, checkpoint, config, weights, options)
            if not its_account.missing:
                model, account = again, its_account
        account.check(_quantized(checkpoint) or self._without(checkpoint))
        model.eval()
        for weight in model.parameters():
            weight.requires_grad_(False)
        loaded: PreTrainedModel = model.to(self.device)
        return loaded

    def _pretrained(
        self,
        auto: Any,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        weights: Mapping[str, Tensor] | None,
        options: Mapping[str, Any],
    ) -> tuple[PreTrainedModel, Account]:
        """The model with `weights`, or with those in the folder, and what became of them."""
        own: dict[str, Any]
        try:
            if weights is None:
                source, own = auto, {"trust_remote_code": self.trust_remote_code}
            else:
                source, own = auto._model_mapping[type(config)], {"state_dict": weights}
            load = partial(
                source.from_pretrained,
                str(checkpoint.path) if weights is None else None,
                config=config,
                dtype=self.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the account names them
                **own,
                **options,
            )
            try:
                model, info = load(attn_implementation=NAME)
            except KeyError as unknown:
                if unknown.args != (NAME,):
                    raise
                # One of the oldest classes, which has a table of layers by it. The probe will say that it is one.
                model, info = load(attn_implementation="eager")
        except Exception as error:  # transformers raises whatever went wrong inside
            why = first_line(error)
            remedy = (_quantized(checkpoint) if "quantiz" in why else "") or self._without(checkpoint)
            raise ConfigError(f"The model in {checkpoint.path} cannot be loaded: {why}{remedy}") from error
        # A head that is replayed does use BERT's pooler.
        heedless = auto in (AutoModel, AutoModelForTextEncoding, AutoModelForTokenClassification)
        return model, Account.of(model, info, reads_pooler=not heedless)

    def _backbone(self, module: PreTrainedModel) -> Backbone:
        module = text_tower(module)
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
            kind = checkpoint.config.get("model_type")
            if kind in known and (checkpoint.dialect or not self.trust_remote_code):
                config_class: Any = CONFIG_MAPPING[kind]
            elif checkpoint.own_code and not self.trust_remote_code:
                raise ValueError(
                    f"transformers has no class for model_type {kind!r}{self._without(checkpoint)}"
                )
            else:
                config_class = type(
                    AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=self.trust_remote_code)
                )
            values = dict(checkpoint.config)
            # Of a loss, to transformers, which refuses combinations that were published; activations are our own.
            values.pop("problem_type", None)
            if values.get("auto_map") is None:  # as an override has it; transformers looks into it
                values.pop("auto_map", None)
            values |= {key: plain for key, plain in _PLAIN.items() if key in values}
            merged: PreTrainedConfig = config_class.from_dict(values)
            return merged
        except Exception as error:
            raise ConfigError(
                f"The config.json in {checkpoint.path} is not one carpool can serve: {first_line(error)}"
            ) from error

    def _refuse_unread_code(self, checkpoint: Checkpoint) -> None:
        """Weights may fit the class that `model_type` names and be meant for another computation.

        Code whose class transformers has too is most often what that was made of, and `Model` notices it.
        """
        own = checkpoint.own_model
        if self.trust_remote_code or checkpoint.dialect or own is None:
            return
        if own.rpartition(".")[2] not in dir(transformers):
            raise ConfigError(
                f"The checkpoint was published with code of its own ({own}), which is not run, and transformers has no "
                "class of that name: what it computes is not known. If it is what transformers' class for model_type "
                f"{checkpoint.config.get('model_type')!r} computes, say so with --hf-overrides "
                """'{"auto_map": null}'."""
            )

    def _without(self, checkpoint: Checkpoint) -> str:
        """How the sentence on what went wrong ends where the checkpoint's own code would be needed; else empty."""
        if self.trust_remote_code or not checkpoint.own_code:
            return ""
        return f". It was published with code of its own ({checkpoint.own_code}), and cannot be served without it."


def _quantized(checkpoint: Checkpoint) -> str:
    """How it ends where whole weights would be needed; else empty."""
    packed = checkpoint.config.get("quantization_config")
    if not isinstance(packed, dict):
        return ""
    how = packed.get("quant_method", "a method of its own")
    return f". Its weights are quantized ({how}): take the original ones, and --quantization int8 on a CPU."


def _class_pooling(full: PreTrainedModel) -> tuple[PoolingMode | None, bool]:
    """Which rows a classifier's class feeds to its head, and whether it does so behind the head."""
    match getattr(full.config, "classifier_pooling", None):
        case "cls" | "bos":
            return "cls", False
        case "mean":
            return "mean", False
        case "late":
            return "mean", True
    # Classes made of a causal model score its last token, also where it was told to look both ways; BART's score that
    # of its decoder.
    last = isinstance(getattr(full, "score", None), nn.Linear) or hasattr(full, "classification_head")
    return ("last", False) if last else (None, False)


def _classifier(full: PreTrainedModel) -> nn.Module:
    """The head of a sequence classifier, which must be one of single rows."""
    if isinstance(own := getattr(full, "classification_head", None), nn.Module):
        return own.float()
    return _replayed(full, per_token=False)


def _replayed(full: PreTrainedModel, *, per_token: bool) -> ReplayedHead:
    """The head of `full`, which has been tried on one row."""
    name, width = type(full).__name__, hidden_size(full.config)
    head = ReplayedHead(full, per_token=per_token)
    try:
        with torch.inference_mode():
            head(torch.zeros(1, width, device=next(head.parameters()).device))
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be served: its head wants more than the hidden state of one token ({first_line(error)})."
        ) from error
    return head


def _honour_bias(full: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """A causal model's `score` layer has no bias in transformers; some checkpoints bring one."""
    score = getattr(full, "score", None)
    bias = stored(checkpoint.path, _SCORE_BIAS)
    if isinstance(score, nn.Linear) and score._parameters.get("bias") is None and bias:
        score.bias = nn.Parameter(bias["score.bias"].to(score.weight), requires_grad=False)


def _embedder(config: PreTrainedConfig) -> Any:
    """The auto class that embeds: of an encoder and a decoder (T5), the encoder alone."""
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    alone = encoder is not None and encoder.__name__.endswith("EncoderModel")
    return AutoModelForTextEncoding if alone else AutoModel


def _without_pooler(config: PreTrainedConfig) -> dict[str, Any]:
    """BERT-likes compute a pooler that nobody reads; most can be told not to."""
    model_class = MODEL_MAPPING.get(type(config), None)
    if model_class is None or isinstance(model_class, tuple):
        return {}
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
