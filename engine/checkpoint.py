"""Checkpoint: what a model folder says about itself, read once into plain values. No tensors here.

Sources, in rising precedence: the class of the model, the sentence-transformers files beside it, the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carpool.engine.architecture import Kind
from carpool.engine.config import PoolerConfig
from carpool.engine.dialects import translate
from carpool.engine.errors import ConfigError
from carpool.engine.json_file import read_json
from carpool.engine.late_interaction import PYLATE_KEYS, LateInteraction
from carpool.engine.params import Matryoshka
from carpool.engine.side_files import Dense, Layer, Norm, PairFiles, PoolingMode, SideFiles, Splade

_USER_MODES: dict[str, PoolingMode] = {"CLS": "cls", "LAST": "last", "MEAN": "mean"}
_CONFIG_MODES: dict[str, PoolingMode] = {"avg": "mean", "mean": "mean", "cls": "cls", "last": "last"}
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
# RoPE types whose factor is already part of max_position_embeddings; YaRN's may be, or not.
_ROPE_WITHOUT_FACTOR = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default"}
# These count positions from behind their pad id: a table of 514 rows serves 512 tokens.
_BEHIND_PAD = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
# Beyond such a table there are no positions, whatever other files say.
_TABLES = _BEHIND_PAD | {"albert", "bert", "distilbert", "electra", "ernie", "gpt2", "mobilebert", "rembert"}
_UNKNOWN_LENGTH = 2048
_LARGE_FILES = ("*.safetensors", "pytorch_model*.bin", "tokenizer.json", "*.model")
_POINTER = b"version https://git-lfs.github.com/spec/"
BGE_M3_HEADS = ("sparse_linear.pt", "colbert_linear.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model folder, understood. `pooling` is empty when no file names one: the model's class decides."""

    path: Path  # of config.json, the weights and the tokenizer
    config: Mapping[str, Any]  # config.json with the user's overrides merged in, in transformers' words
    dialect: str | None = None  # what config.json was written in, if in other words than transformers'
    architectures: tuple[str, ...]
    pooling: tuple[PoolingMode, ...]
    normalize: bool
    dense: tuple[Layer, ...] = ()
    lowercase: bool = False
    tanh_int8: bool = False
    max_model_len: int  # what it was meant for
    longest: int  # what its positions allow
    prompts: Mapping[str, str] = field(default_factory=dict)
    pairs: PairFiles | None = None
    files: Kind | None = None  # what the files beside config.json make of an embedding model
    default_prompt: str | None = None  # by name; sentence-transformers puts it where none is asked for
    leaves_out_prompts: bool = False  # of pooling
    truncate_dim: int | None = None  # the width that embeddings are cut to where nobody asks for another
    splade: Splade = field(default_factory=Splade)
    late: LateInteraction | None = None
    similarity: str | None = None  # as sentence-transformers names it
    matryoshka: Matryoshka

    @property
    def windows(self) -> list[int]:
        """Tokens that layers with a window look at, by every name that config.json has for it."""
        named = (self.text_config.get(key) for key in ("sliding_window", "local_attention"))
        return [window for window in named if isinstance(window, int) and window > 0]

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

    @property
    def own_code(self) -> str | None:
        """The class that config.json names in a Python file of the checkpoint's own; None if it names none."""
        named = self.config.get("auto_map") or {}
        return self.own_model or (str(next(iter(named.values()))) if named else None)

    @property
    def own_model(self) -> str | None:
        """The same of models alone: None where only the configuration or the tokenizer has code of its own."""
        named = self.config.get("auto_map") or {}
        models = [str(value) for key, value in named.items() if str(key).startswith("AutoModel")]
        return str(named.get("AutoModel") or models[0]) if models else None

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
        st = SideFiles.read(path)
        path = st.folder
        _refuse_what_is_no_model(path)
        config, dialect = translate(
            _merge(_merge(read_json(path / "config.json"), st.cross_encoder), overrides)
        )
        pooling = (_USER_MODES[pooler.pooling],) if pooler.pooling else st.pooling or _config_pooling(config)
        dense = (*_output_projection(path, config, pooling), *st.dense)
        width = _final_width(_hidden_size(config) * max(1, len(pooling)), dense)
        meant, longest = _lengths(path, config, st.max_seq_length)
        if config.get("max_trained_positions"):  # nothing may be longer, whatever the side files say
            longest = min(longest, int(config["max_trained_positions"]))
        flexible = bool(config.get("is_matryoshka"))
        widths = {int(d) for d in config.get("matryoshka_dimensions") or ()}
        truncated = st.truncate_dim if st.truncate_dim and st.truncate_dim < width else None
        if truncated and (widths or not flexible):
            widths.add(truncated)
        allowed = tuple(sorted(widths))
        normalize = st.normalize if pooler.activates is None else pooler.activates
        checkpoint = cls(
            path=path,
            config=config,
            dialect=dialect,
            architectures=tuple(config.get("architectures") or ()),
            pooling=pooling,
            normalize=normalize,
            dense=dense,
            lowercase=st.lowercase,
            tanh_int8=st.tanh_int8,
            max_model_len=min(meant, longest),
            longest=longest,
            prompts=st.prompts,
            pairs=st.pairs,
            files="bge_m3" if all((path / name).is_file() for name in BGE_M3_HEADS) else st.files,
            default_prompt=st.default_prompt if st.prompts.get(st.default_prompt or "") else None,
            leaves_out_prompts=st.leaves_out_prompts,
            truncate_dim=truncated,
            splade=st.splade,
            late=_late_interaction(path, config, st),
            similarity=st.side.get("similarity_fn_name"),
            matryoshka=Matryoshka(width, flexible and not allowed, allowed),
        )
        _ = checkpoint.vocab_size
        return checkpoint


def _refuse_what_is_no_model(folder: Path) -> None:
    """Say what lies there instead, where that is known."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ConfigError(
            f"{folder} holds an adapter and no model: serve the model that it was made for ({base}) with "
            f"--lora-modules NAME={folder}."
        )
    for pattern in _LARGE_FILES:
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise ConfigError(
                        f"{path} is a pointer of Git LFS and not the file itself: run `git lfs pull` in that folder."
                    )


def _late_interaction(path: Path, config: Mapping[str, Any], st: SideFiles) -> LateInteraction | None:
    """How queries and documents are written, where the files say so. `config` may hold PyLate's keys, by overrides."""
    if st.files == "multi_vector":
        if st.mask or st.side.get("model_type") == "MultiVectorEncoder":
            return LateInteraction.sentence_transformers(st.side, st.transformer, st.mask)
        return LateInteraction.pylate(
            {**st.side, **{key: config[key] for key in PYLATE_KEYS if key in config}}
        )
    if any("ColBERT" in name for name in config.get("architectures") or ()):
        return LateInteraction.stanford(read_json(path / "artifact.metadata", optional=True), config)
    return None


def _config_pooling(config: Mapping[str, Any]) -> tuple[PoolingMode, ...]:
    """What config.json itself says, as some bidirectional decoders' does."""
    mode = _CONFIG_MODES.get(str(config.get("pooling")))
    return (mode,) if mode else ()


def _output_projection(
    path: Path, config: Mapping[str, Any], pooling: tuple[PoolingMode, ...]
) -> tuple[Dense, ...]:
    """A linear layer beside the model's own weights: every token goes through it, and then they are pooled.

    `output_projection` in config.json is put there by the dialect: {"width", "prefix" of its weights' names, "bias"}.
    Pooling first gives the same, for less, wherever pooling is a sum of tokens.
    """
    projection = config.get("output_projection")
    if not projection:
        return ()
    if "max" in pooling or len(pooling) > 1:
        raise ConfigError(f"This model's output projection does not go with {'+'.join(pooling)} pooling.")
    return (
        Dense(
            folder=path,
            in_features=_hidden_size(config),
            out_features=int(projection["width"]),
            bias=bool(projection["bias"]),
            activation="torch.nn.modules.linear.Identity",
            prefix=str(projection["prefix"]),
        ),
    )


def _final_width(width: int, layers: tuple[Layer, ...]) -> int:
    """What comes out of the layers behind a pooling of `width`."""
    for layer in layers:
        taken = layer.width if isinstance(layer, Norm) else layer.in_features
        if layer.folder is not None and taken != width:
            raise ConfigError(
                f"{layer.folder.name} takes vectors of {taken} components and would get {width}."
            )
        width = width if isinstance(layer, Norm) else layer.out_features
    return width


def _lengths(path: Path, config: Mapping[str, Any], asked: int | None) -> tuple[int, int]:
    """Tokens that the files mean a prompt to have at most, and that there are positions for.

    `asked`: sentence-transformers' max_seq_length, which no table of positions grows by.
    """
    text = _text_config(config)
    lengths = [int(text[key]) for key in _LENGTH_KEYS if text.get(key)]
    derived = int(text["model_max_length"]) if text.get("model_max_length") else min(lengths, default=0)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor, original = float(rope.get("factor") or 1), int(rope.get("original_max_position_embeddings") or 0)
    gemma3 = str(text.get("model_type", "")).startswith("gemma3")  # its length has the factor in it as well
    if derived and kind == "yarn" and not gemma3:
        derived = max(derived, int(original * factor))
    elif derived and kind not in _ROPE_WITHOUT_FACTOR and not original and not gemma3:
        derived = int(derived * factor)
    if not derived:
        return asked or _UNKNOWN_LENGTH, max(asked or 0, _UNKNOWN_LENGTH)
    family, meant, table = text.get("model_type"), derived, False
    if kind == "longrope" and text.get("original_max_position_embeddings"):
        meant = int(text["original_max_position_embeddings"])
    if family in _BEHIND_PAD or ("rope_theta" not in text and not rope):
        # Learned positions: the table may be longer than what is usable (RoBERTa's 514 for 512).
        table = family in _TABLES
        if family in _BEHIND_PAD:
            pad = 1 if family == "mpnet" else text.get("pad_token_id")  # whose class has it written down
            derived -= (1 if pad is None else int(pad)) + 1
        limit = read_json(path / "tokenizer_config.json", optional=True).get("model_max_length")
        meant = min(derived, int(limit)) if isinstance(limit, int | float) and limit > 0 else derived
    return asked or meant, derived if table else max(derived, asked or 0)


def _hidden_size(config: Mapping[str, Any]) -> int:
    text = _text_config(config)
    projected = ("word_embed_proj_dim",) if text.get("model_type") == "opt" else ()
    for key in (*projected, "hidden_size", "d_model", "n_embd", "emb_dim", "dim"):
        if text.get(key):
            return int(text[key])
    raise ConfigError("config.json names no hidden size, so this does not look like a text model.")


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; nested objects are merged key by key."""
    merged = dict(base)
    for key, value in _respelled(base, over).items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _respelled(base: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """`over` with rotary positions in the words of `base`. transformers 5 writes `rope_theta` and `rope_scaling` as
    one, `rope_parameters`, and where it finds both ways it forgets the base of the one or all of the other.
    """
    own, scaling = base.get("rope_parameters"), over.get("rope_scaling")
    if isinstance(own, Mapping) and "rope_theta" in own and (scaling or over.get("rope_theta")):
        rope = dict(scaling or {})
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
        if over.get("rope_theta"):
            rope["rope_theta"] = over["rope_theta"]
        others = {key: value for key, value in over.items() if key not in ("rope_scaling", "rope_theta")}
        return {**others, "rope_parameters": {**rope, **(over.get("rope_parameters") or {})}}
    if over.get("rope_parameters") and base.get("rope_scaling"):
        return {"rope_scaling": None, **over}
    return over
