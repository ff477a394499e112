"""Checkpoint: what a model folder says about itself, read once into plain values. No tensors here.

Sources, in rising precedence: the class of the model, the sentence-transformers files beside it, the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from carpool.engine.params import Matryoshka

PoolingMode = Literal["cls", "last", "mean", "max", "mean_sqrt_len", "weighted_mean"]

# sentence-transformers' names in the order in which it concatenates several modes.
_ST_MODES: dict[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_USER_MODES: dict[str, PoolingMode] = {"CLS": "cls", "LAST": "last", "MEAN": "mean"}
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# RoPE types whose factor is already part of max_position_embeddings.
_ROPE_WITHOUT_FACTOR = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default"}
_UNKNOWN_LENGTH = 2048
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")  # of sentence-transformers' modules


@dataclass(frozen=True, slots=True)
class Dense:
    """One sentence-transformers Dense layer: a folder with its weights, and its activation's dotted name."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model folder, understood. `pooling` is empty when no file names one: the model's class decides."""

    path: Path
    config: Mapping[str, Any]  # config.json with the user's overrides merged in, in transformers' words
    dialect: str | None = None  # what config.json was written in, if in other words than transformers'
    architectures: tuple[str, ...]
    pooling: tuple[PoolingMode, ...]
    normalize: bool
    dense: tuple[Dense, ...] = ()
    lowercase: bool = False
    max_model_len: int  # what it was meant for
    longest: int  # what its positions allow
    prompts: Mapping[str, str] = field(default_factory=dict)
    matryoshka: Matryoshka

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the text tower."""
        return _text_config(self.config)

    @property
    def vocab_size(self) -> int:
        return int(self.text_config["vocab_size"])

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that config.json records, e.g. "bfloat16"."""
        for config in (self.config, self.text_config):
            name = config.get("dtype") or config.get("torch_dtype")
            if isinstance(name, str):
                return name.removeprefix("torch.")
        return None

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any], pooler: PoolerConfig) -> Checkpoint:
        """Read the folder `path`. Raises ConfigError with one sentence on what is missing or cannot be."""
        try:
            return cls._read(path, overrides, pooler)
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value of another kind
            raise ConfigError(
                f"The JSON files in {path} cannot be understood: {type(error).__name__}: {error}."
            ) from error

    @classmethod
    def _read(cls, path: Path, overrides: Mapping[str, Any], pooler: PoolerConfig) -> Checkpoint:
        st = _SentenceTransformers.read(path, has_scorer=bool(overrides.get("classifier_from_token")))
        config, dialect = translate(
            _merge(_merge(_read_json(path / "config.json"), st.cross_encoder), overrides)
        )
        pooling = (_USER_MODES[pooler.pooling],) if pooler.pooling else st.pooling
        width = _final_width(_hidden_size(config) * max(1, len(pooling)), st.dense)
        longest = _longest(path, config)
        allowed = tuple(sorted(int(d) for d in config.get("matryoshka_dimensions") or ()))
        normalize = st.normalize if pooler.activates is None else pooler.activates
        checkpoint = cls(
            path=path,
            config=config,
            dialect=dialect,
            architectures=tuple(config.get("architectures") or ()),
            pooling=pooling,
            normalize=normalize,
            dense=st.dense,
            lowercase=st.lowercase,
            max_model_len=st.max_seq_length or longest,
            longest=max(longest, st.max_seq_length or 0),
            prompts=st.prompts,
            matryoshka=Matryoshka(width, bool(config.get("is_matryoshka")) and not allowed, allowed),
        )
        _ = checkpoint.vocab_size
        return checkpoint


@dataclass(frozen=True, slots=True)
class _SentenceTransformers:
    """The side files of sentence-transformers, old dialect (before 6) and new."""

    pooling: tuple[PoolingMode, ...] = ()
    normalize: bool = True  # without modules.json, embeddings are normalised
    dense: tuple[Dense, ...] = ()
    max_seq_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    cross_encoder: Mapping[str, Any] = field(
        default_factory=dict
    )  # as older releases wrote it into config.json

    @classmethod
    def read(cls, path: Path, *, has_scorer: bool = False) -> _SentenceTransformers:
        side = _read_json(path / "config_sentence_transformers.json", optional=True)
        modules = _read_json(path / "modules.json", optional=True, kind=list)
        transformer = path
        pooling: tuple[PoolingMode, ...] = ()
        dense: list[Dense] = []
        kinds = []
        for module in modules:
            # Only the class's own name is stable between the dialects.
            kind = str(module.get("type", "")).rpartition(".")[2]
            kinds.append(kind)
            folder = path / str(module.get("path", ""))
            if kind == "Transformer":
                transformer = folder
            elif kind == "Pooling":
                pooling = _pooling_modes(_read_json(folder / "config.json"), folder)
            elif kind == "Dense":
                dense.append(_dense(folder))
            elif kind == "LogitScore":
                if not has_scorer:
                    raise ConfigError(
                        "modules.json scores by words of a language model (LogitScore): name them with --hf-overrides "
                        """'{"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}' """
                        "and the prompt that asks for them with --chat-template."
                    )
            elif kind not in ("Normalize", "Dropout"):
                raise ConfigError(
                    f"modules.json names a {kind} module, which carpool cannot serve; "
                    "it serves Transformer, Pooling, Dense and Normalize."
                )
        steps = [kind for kind in kinds if kind in _ORDER]
        if steps != sorted(steps, key=_ORDER.index) or steps.count("Pooling") > 1:
            raise ConfigError(
                f"modules.json runs {', '.join(steps)} in this order; carpool serves {', '.join(_ORDER)}."
            )
        bert = _sentence_bert_config(transformer)
        return cls(
            pooling=pooling,
            normalize=not modules or "Normalize" in kinds,
            dense=tuple(dense),
            max_seq_length=int(bert["max_seq_length"]) if bert.get("max_seq_length") else None,
            lowercase=bool(bert.get("do_lower_case", False)),
            cross_encoder={"sentence_transformers": {"activation_fn": side["activation_fn"]}}
            if side.get("activation_fn")
            else {},
            prompts={str(k): str(v) for k, v in (side.get("prompts") or {}).items()},
        )


def _pooling_modes(config: Mapping[str, Any], folder: Path) -> tuple[PoolingMode, ...]:
    """Old: one boolean a mode; new: `pooling_mode`, a name or a list of names."""
    named = config.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else list(named)
    else:
        names = [
            key.removeprefix("pooling_mode_")
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on
        ]
    names = [name.removesuffix("_token").removesuffix("_tokens") for name in names]
    unknown = [name for name in names if name not in _ST_MODES]
    if unknown or not names:
        raise ConfigError(
            f"{folder.name}/config.json names no pooling mode that carpool knows: {unknown or 'none is set'}."
        )
    if named is None:  # booleans have no order of their own
        names.sort(key=list(_ST_MODES).index)
    return tuple(_ST_MODES[name] for name in names)


def _dense(folder: Path) -> Dense:
    config = _read_json(folder / "config.json")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ConfigError(
                f"{folder.name} works on {config[key]!r}; carpool serves Dense layers on sentence embeddings."
            )
    return Dense(
        folder=folder,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=str(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
    )


def _final_width(width: int, layers: tuple[Dense, ...]) -> int:
    """What comes out of the layers behind a pooling of `width`."""
    for dense in layers:
        if dense.in_features != width:
            raise ConfigError(
                f"{dense.folder.name} takes vectors of {dense.in_features} components and would get {width}."
            )
        width = dense.out_features
    return width


def _sentence_bert_config(folder: Path) -> Mapping[str, Any]:
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"):
        config: Mapping[str, Any] = _read_json(folder / f"sentence_{name}_config.json", optional=True)
        if config:
            return config
    return {}


def _longest(path: Path, config: Mapping[str, Any]) -> int:
    """Tokens that config.json and the tokenizer allow."""
    text = _text_config(config)
    lengths = [int(text[key]) for key in _LENGTH_KEYS if text.get(key)]
    derived = int(text["model_max_length"]) if text.get("model_max_length") else min(lengths, default=0)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    gemma3 = str(text.get("model_type", "")).startswith("gemma3")  # its length has the factor in it as well
    if derived and kind not in _ROPE_WITHOUT_FACTOR and "factor" in rope and not gemma3:
        derived = int(derived * float(rope["factor"]))
    if kind == "longrope" and text.get("original_max_position_embeddings"):
        derived = int(text["original_max_position_embeddings"])
    if not derived:
        return _UNKNOWN_LENGTH
    if "rope_theta" not in text and not rope:
        # Learned positions: the table may be longer than what is usable (RoBERTa's 514 for 512).
        limit = _read_json(path / "tokenizer_config.json", optional=True).get("model_max_length")
        if isinstance(limit, int | float) and 0 < limit < derived:
            return int(limit)
    return derived


def _hidden_size(config: Mapping[str, Any]) -> int:
    text = _text_config(config)
    for key in ("hidden_size", "d_model", "n_embd", "dim"):
        if text.get(key):
            return int(text[key])
    raise ConfigError("config.json names no hidden size, so this does not look like a text model.")


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; nested objects are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_json(path: Path, *, optional: bool = False, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return kind()
        raise ConfigError(
            f"{path.parent} has no {path.name}, so it is not a model folder carpool can read."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise ConfigError(f"{path} should hold a JSON {'list' if kind is list else 'object'}.")
    return value
