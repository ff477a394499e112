"""SideFiles: what sentence-transformers and PyLate write beside a model, in the dialects before version 6 and since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from carpool.engine.architecture import Kind
from carpool.engine.errors import ConfigError
from carpool.engine.json_file import read_json
from carpool.engine.late_interaction import is_pylate

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
_TANH_INT8 = "FlexibleQuantizer"  # a module of pplx-embed's own, which makes whole numbers of an embedding
# Settings beside a chat template's own that say how sentence-transformers tokenises what it renders.
_NOT_FOR_TEMPLATES = ("padding", "truncation", "max_length", "return_tensors", "restore_suffix")
# sentence-transformers' modules by the place that they have in a stack: those of one place come in any order.
_PLACES = {
    "Transformer": 0,
    "Pooling": 1,
    "SpladePooling": 1,
    "Dense": 2,
    "LayerNorm": 2,
    "Normalize": 2,
    _TANH_INT8: 3,
}


@dataclass(frozen=True, slots=True)
class Dense:
    """One sentence-transformers Dense layer: a folder with its weights, and its activation's dotted name."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str
    prefix: str = ""  # of its weights' names, where the folder holds other weights as well
    residual: bool = False  # what goes in is added to what comes out


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer that keeps an embedding's width: a LayerNorm with its weights in `folder`, or unit length without any."""

    folder: Path | None = None
    width: int | None = None  # of a LayerNorm


Layer = Dense | Norm


@dataclass(frozen=True, slots=True)
class Splade:
    """How logits of the vocabulary [tokens, V] become weights [V]: log(1 + ReLU), pooled over the tokens.

    `twice`: log(1 + …) is taken once more. Of a text's weights only the `most` largest are kept, if that is set.
    """

    strategy: Literal["max", "sum"] = "max"
    twice: bool = False
    most: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFiles:
    """How sentence-transformers' CrossEncoder (since 5.4) asks a language model about a pair, and reads its answer.

    `token_ids`: whose logits are the answer, (false, true) or (true,); empty where the model has a head of its own.
    `chat`: query and document are messages of these roles, rendered by the tokenizer's chat template with `options`;
    `parts`: their content is a list of parts. `prompt` is a system message before them, `prompts` others by name.
    """

    token_ids: tuple[int, ...] = ()
    chat: bool = False
    parts: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The side files of sentence-transformers, old dialect (before 6) and new.

    `folder` holds the model itself, with its config.json, weights and tokenizer: the first releases put it into one of
    its own, 0_Transformer, which modules.json names.
    """

    folder: Path
    pooling: tuple[PoolingMode, ...] = ()
    normalize: bool = True  # without modules.json, embeddings are normalised
    dense: tuple[Layer, ...] = ()
    max_seq_length: int | None = None
    lowercase: bool = False
    tanh_int8: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    pairs: PairFiles | None = None
    files: Kind | None = None
    leaves_out_prompts: bool = False
    default_prompt: str | None = None  # by name; sentence-transformers puts it where none is asked for
    truncate_dim: int | None = None  # the width that it cuts embeddings to where none is asked for
    splade: Splade = Splade()
    side: Mapping[str, Any] = field(default_factory=dict)  # config_sentence_transformers.json
    transformer: Mapping[str, Any] = field(default_factory=dict)  # the configuration of Transformer
    mask: Mapping[str, Any] = field(default_factory=dict)  # of MultiVectorMask
    cross_encoder: Mapping[str, Any] = field(
        default_factory=dict
    )  # as older releases wrote it into config.json

    @classmethod
    def read(cls, path: Path) -> SideFiles:
        side = read_json(path / "config_sentence_transformers.json", optional=True)
        modules = read_json(path / "modules.json", optional=True, kind=list)
        transformer = path
        pooling: tuple[PoolingMode, ...] = ()
        dense: list[Layer] = []
        token_ids: tuple[int, ...] = ()
        leaves_out_prompts = False
        splade = Splade()
        mask: Mapping[str, Any] = {}
        kinds = []
        files = _kind_of_files(side, [str(module.get("type", "")) for module in modules])
        own = "token_embeddings" if files == "multi_vector" else "sentence_embedding"
        # Only the class's own name is stable between the dialects.
        names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        for module, kind in zip(modules, names, strict=True):
            kinds.append(kind)
            folder = path / str(module.get("path", ""))
            if kind in ("Transformer", "MLMTransformer"):
                transformer = folder
            elif kind == "Pooling":
                config = read_json(folder / "config.json")
                pooling = _pooling_modes(config, folder)
                leaves_out_prompts = config.get("include_prompt") is False
                if leaves_out_prompts and "weighted_mean" in pooling:
                    raise ConfigError(
                        "weightedmean pooling without the prompt (include_prompt: false) is not served."
                    )
            elif kind == "Dense":
                dense.append(_dense(folder, own, scores=files == "classify"))
            elif kind == "LayerNorm" and files is None:
                dense.append(Norm(folder, int(read_json(folder / "config.json")["dimension"])))
            elif kind == "Normalize":
                _check_normalize(folder, own)
                if not {"Dense", "LayerNorm", _TANH_INT8}.isdisjoint(names[len(kinds) :]):
                    dense.append(Norm())
            elif kind == "SpladePooling":
                splade = _splade(read_json(folder / "config.json"), side)
            elif kind == "MultiVectorMask":
                mask = read_json(folder / "config.json")
            elif kind == "LogitScore":
                token_ids = _logit_ids(read_json(folder / "config.json"))
            elif kind not in ("Dropout", _TANH_INT8):
                raise ConfigError(
                    f"modules.json names a {kind} module, which carpool cannot serve{_there(files)}; "
                    "it serves Transformer, Pooling, Dense, LayerNorm, Normalize, SpladePooling and MultiVectorMask."
                )
        steps = [kind for kind in kinds if kind in _PLACES]
        last = len(steps)
        while last and steps[last - 1] == "Normalize":
            last -= 1
        if steps[:last] != sorted(steps[:last], key=_PLACES.__getitem__) or steps.count("Pooling") > 1:
            raise ConfigError(
                f"modules.json runs {', '.join(steps)} in this order; carpool serves a Transformer, one Pooling, and "
                "behind it Dense, LayerNorm and Normalize in any order."
            )
        if files == "classify" and (len(pooling) > 1 or not dense or "Normalize" in kinds):
            raise ConfigError(
                f"modules.json makes a cross-encoder of {', '.join(steps)}; carpool serves Transformer, Pooling by one "
                "mode and Dense layers, the last of which makes the scores."
            )
        bert = _sentence_bert_config(transformer)
        if ("MLMTransformer" in kinds or bert.get("transformer_task") == "fill-mask") != (files == "sparse"):
            raise ConfigError(
                "modules.json has one of a masked language model and SpladePooling without the other."
            )
        longest = bert.get("max_seq_length")
        if files == "multi_vector" and is_pylate(side):
            longest = None  # PyLate leaves there what it cut at last, a query's length as a rule
        return cls(
            folder=transformer,
            pooling=pooling,
            normalize=not modules or last < len(steps) or (files == "multi_vector" and is_pylate(side)),
            dense=tuple(dense),
            max_seq_length=int(longest) if longest else None,
            lowercase=bool(bert.get("do_lower_case", False)),
            tanh_int8=_TANH_INT8 in kinds,
            cross_encoder={"sentence_transformers": {"activation_fn": side["activation_fn"]}}
            if side.get("activation_fn")
            else {},
            prompts=named_prompts(side.get("prompts") or {}),
            pairs=_pair_files(side, bert, token_ids),
            files=files,
            leaves_out_prompts=leaves_out_prompts,
            default_prompt=str(side.get("default_prompt_name") or "") or None,
            truncate_dim=int(side.get("truncate_dim") or 0) or None,
            splade=splade,
            side=side,
            transformer=bert,
            mask=mask,
        )


def named_prompts(listed: Mapping[str, Any]) -> dict[str, str]:
    """The prompts among them: what is no text, a null above all, is none."""
    return {str(name): prompt for name, prompt in listed.items() if isinstance(prompt, str)}


def _kind_of_files(side: Mapping[str, Any], types: list[str]) -> Kind | None:
    """What modules.json and config_sentence_transformers.json make of a model that by its class embeds, if not one
    vector a text."""
    names = {name.rpartition(".")[2] for name in types}
    if "SpladePooling" in names:
        return "sparse"
    if side.get("model_type") == "CrossEncoder" and "Pooling" in names:
        return "classify"
    several = side.get("model_type") == "MultiVectorEncoder" or "MultiVectorMask" in names or is_pylate(side)
    return "multi_vector" if several or any(name.startswith("pylate.") for name in types) else None


def _splade(config: Mapping[str, Any], side: Mapping[str, Any]) -> Splade:
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise ConfigError(
            f"SpladePooling by {strategy} of {activation} is not known to carpool; it knows max and sum, of relu and "
            "log1p_relu."
        )
    most = side.get("max_active_dims")
    return Splade(strategy, activation == "log1p_relu", int(most) if most else None)


def _logit_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(false, true), or (true,) where nothing is set against it."""
    false, true = config.get("false_token_id"), config["true_token_id"]
    return (int(true),) if false is None else (int(false), int(true))


def _pair_files(
    side: Mapping[str, Any], transformer: Mapping[str, Any], token_ids: tuple[int, ...]
) -> PairFiles | None:
    """None for what is no cross-encoder, or one whose pairs are two texts to the tokenizer."""
    modalities = transformer.get("modality_config")
    message = (modalities or {}).get("message")
    if not token_ids and (side.get("model_type") != "CrossEncoder" or message is None):
        return None
    prompts = named_prompts(side.get("prompts") or {})
    return PairFiles(
        token_ids=token_ids,
        chat=message is not None or modalities is None,
        parts=(message or {}).get("format") == "structured",
        options={
            key: value
            for key, value in (
                (transformer.get("processing_kwargs") or {}).get("chat_template") or {}
            ).items()
            if key not in _NOT_FOR_TEMPLATES
        },
        prompt=prompts.get(side.get("default_prompt_name") or "") or None,
        prompts=prompts,
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


def _there(files: Kind | None) -> str:
    """Where a module that is served elsewhere is not."""
    kinds: Mapping[Kind | None, str] = {
        "multi_vector": " in a model of several vectors",
        "sparse": " in a sparse model",
        "classify": " in a cross-encoder",
    }
    return kinds.get(files, "")


def _check_normalize(folder: Path, own: str) -> None:
    named = read_json(folder / "config.json", optional=True).get("module_input_name")
    if named not in (None, own):
        raise ConfigError(f"{folder.name} works on {named!r}; carpool serves Normalize on {own} here.")


def _dense(folder: Path, own: str, *, scores: bool) -> Dense:
    """`own` is what it works on; `scores`: or, as the last of a cross-encoder's, what it makes."""
    config = read_json(folder / "config.json")
    for key in ("module_input_name", "module_output_name"):
        named = config.get(key)
        if named not in (None, own) and not (scores and (key, named) == ("module_output_name", "scores")):
            raise ConfigError(f"{folder.name} works on {named!r}; carpool serves Dense layers on {own} here.")
    return Dense(
        folder=folder,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=str(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(config.get("use_residual", False)),
    )


def _sentence_bert_config(folder: Path) -> Mapping[str, Any]:
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"):
        config: Mapping[str, Any] = read_json(folder / f"sentence_{name}_config.json", optional=True)
        if config:
            return config
    return {}
