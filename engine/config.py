"""EngineConfig: everything the engine can be told, before "auto" is resolved. One frozen value, made once.

Each field carries its help text; the command line, the environment, the YAML file and `docs/configuration.md`
are all made from these fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from carpool.engine.errors import ConfigError
from carpool.engine.params import Task

DType = Literal["auto", "float32", "float", "bfloat16", "float16", "half"]
SeqPoolingType = Literal["CLS", "LAST", "MEAN"]
TokPoolingType = Literal["ALL", "STEP"]
PoolingType = Literal["CLS", "LAST", "MEAN", "ALL", "STEP"]
Runner = Literal["auto", "pooling"]
Convert = Literal["auto", "none", "embed", "classify", "reward"]
ContentFormat = Literal["auto", "string", "openai"]

# What the reference's older `task` asks for. A model that is to score is taken for what its class says it is.
CONVERT_OF_TASK: Mapping[str, Convert] = {
    "auto": "auto",
    "embed": "embed",
    "embedding": "embed",
    "classify": "classify",
    "score": "auto",
    "reward": "reward",
}


# What a field of a type must be, in words, and what passes for it: numpy's own numbers, say.
_KINDS: Mapping[Any, tuple[str, type]] = {
    bool: ("true or false", bool),
    int: ("an integer", Integral),
    float: ("a number", Real),
}


def check_kinds(config: type, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value of `given`, by the configuration's fields, that is no such number or truth."""
    for name, hint in get_type_hints(config).items():
        kind = next((kind for kind in _KINDS if kind in (hint, *get_args(hint))), None)
        value = given.get(name)
        if kind is None or value is None:
            continue
        described, takes = _KINDS[kind]
        # A bool is an integer to Python.
        fits = isinstance(value, takes) and isinstance(value, bool) == (kind is bool)
        if not fits:
            raise ConfigError(f"{name} must be {described}, got {value!r}.")
        if kind is float and not isinstance(value, Integral) and not isfinite(value):
            raise ConfigError(f"{name} must be finite, got {value!r}.")


def _token_ids(given: object) -> tuple[int, ...]:
    ids = tuple(given) if isinstance(given, Iterable) else None
    if ids is None or not all(isinstance(own, Integral) and not isinstance(own, bool) for own in ids):
        raise ConfigError(f"returned_token_ids must be a list of integers, got {given!r}.")
    return ids


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text, shown by `--help` and in the docs."""
    metadata["help"] = help
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerConfig:
    """Overrides of how hidden states become results; None leaves the choice to the model's own files."""

    task: Task | None = option(
        None, "What /pooling does when it is not told; token_embed makes /score late interaction."
    )
    pooling_type: PoolingType | None = option(
        None, "CLS, LAST, MEAN: which rows make a text's result. ALL, STEP: a token's."
    )
    seq_pooling_type: SeqPoolingType | None = option(None, "Newer name of pooling_type for whole texts.")
    tok_pooling_type: TokPoolingType | None = option(None, "Newer name of pooling_type for tokens.")
    use_activation: bool | None = option(None, "Default of the request field: normalise, softmax or sigmoid.")
    normalize: bool | None = option(None, "Older name of use_activation.")
    softmax: bool | None = option(None, "Older name of use_activation.")
    activation: bool | None = option(None, "Older name of use_activation.")
    dimensions: int | None = option(None, "Default of the request field: cut every embedding to this width.")
    enable_chunked_processing: bool = option(
        False, "Embed texts longer than the model takes in slices, and average."
    )
    max_embed_len: int | None = option(
        None, "Longest text to embed; by default what the model takes, or with chunked processing any."
    )
    logit_mean: float | None = option(None, "Subtracted from every logit.")
    logit_bias: float | None = option(None, "Older name of logit_mean.")
    logit_sigma: float | None = option(None, "Every logit is divided by this, after logit_mean.")
    logit_scale: float | None = option(None, "Older name of 1 / logit_sigma.")
    step_tag_id: int | None = option(None, "STEP: the token whose rows are returned.")
    returned_token_ids: tuple[int, ...] | None = option(
        None, "STEP: the columns of the logits that are kept."
    )
    enable_flash_late_interaction: bool | None = option(
        None, "Taken for the sake of vLLM's scripts, and without effect."
    )

    def __post_init__(self) -> None:
        check_kinds(type(self), {field.name: getattr(self, field.name) for field in fields(self)})
        for narrow in ("seq_pooling_type", "tok_pooling_type"):
            if self.pooling_type and getattr(self, narrow):
                raise ConfigError(f"Cannot set both pooling_type and {narrow} in the pooler config.")
        for name, choices in (
            ("task", Task),
            ("pooling_type", PoolingType),
            ("seq_pooling_type", SeqPoolingType),
            ("tok_pooling_type", TokPoolingType),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_choice(f"{name} in the pooler config", value, get_args(choices))
        if self.max_embed_len is not None and self.max_embed_len < 1:
            raise ConfigError(f"max_embed_len must be at least 1, got {self.max_embed_len}.")
        for older, newer in (("logit_bias", "logit_mean"), ("logit_scale", "logit_sigma")):
            if getattr(self, older) is not None and getattr(self, newer) is not None:
                raise ConfigError(f"Cannot set both {older} and {newer} in the pooler config.")
        for name in ("logit_sigma", "logit_scale"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} cannot be 0 (division by zero).")
        if self.logit_scale is not None:
            object.__setattr__(self, "logit_sigma", 1.0 / self.logit_scale)
            object.__setattr__(self, "logit_scale", None)
        if self.returned_token_ids is not None:
            object.__setattr__(self, "returned_token_ids", _token_ids(self.returned_token_ids))

    @property
    def pooling(self) -> SeqPoolingType | None:
        """Which rows make a text's result, under either name."""
        named = None if self.pooling_type == "ALL" or self.pooling_type == "STEP" else self.pooling_type
        return self.seq_pooling_type or named

    @property
    def steps(self) -> bool | None:
        """Whether token results are those of step tags only; None leaves it to the model."""
        named = self.tok_pooling_type or (self.pooling_type if self.pooling_type in ("ALL", "STEP") else None)
        return None if named is None else named == "STEP"

    @property
    def activates(self) -> bool | None:
        """use_activation, under any of its names."""
        names = (self.use_activation, self.normalize, self.softmax, self.activation)
        return next((value for value in names if value is not None), None)

    @property
    def mean(self) -> float:
        return self.logit_mean if self.logit_mean is not None else self.logit_bias or 0.0


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An adapter to load beside the model: requests choose it by `name`; `path` is a folder or a hub's name."""

    name: str
    path: str

    @classmethod
    def parse(cls, raw: Any) -> LoraModule:
        """From `name=path`, an object {"name": …, "path": …}, or such an object as JSON text."""
        if isinstance(raw, LoraModule):
            return raw
        given = raw
        if isinstance(raw, str) and raw.startswith("{"):
            given = _json_or_none(raw)
        elif isinstance(raw, str):
            name, _, path = raw.partition("=")
            given = {"name": name, "path": path}
        if not isinstance(given, Mapping) or not given.get("name") or not given.get("path"):
            raise ConfigError(f'--lora-modules takes name=path or {{"name": …, "path": …}}, got {raw!r}.')
        if unknown := sorted(given.keys() - {"name", "path", "base_model_name", "is_3d_lora_weight"}):
            raise ConfigError(
                f"--lora-modules has no key {unknown[0]}: it takes name, path and base_model_name."
            )
        if given.get("is_3d_lora_weight"):
            raise ConfigError("--lora-modules does not take weights of experts in three dimensions.")
        return cls(str(given["name"]), str(given["path"]))

    @classmethod
    def parse_all(cls, raw: Any) -> tuple[LoraModule, ...]:
        """From a list of what `parse` takes, or an object of a path a name."""
        each = [cls(str(name), str(path)) for name, path in raw.items()] if isinstance(raw, Mapping) else raw
        modules = tuple(cls.parse(item) for item in each if item != "")  # as a script writes for none
        names = [module.name for module in modules]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--lora-modules names {name!r} twice.")
        return modules


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to load and how to run it. "auto" and None are resolved against the checkpoint and the machine."""

    model: str = option(
        "", "A checkpoint folder or a Hugging Face name; without it the bundled all-MiniLM-L6-v2."
    )
    tokenizer: str | None = option(None, "Folder or name of the tokenizer, where it is not the model's.")
    revision: str | None = option(None, "Branch, tag or commit of a model taken from the Hugging Face hub.")
    tokenizer_revision: str | None = option(
        None, "The same of the tokenizer, be it the model's own or another --tokenizer."
    )
    download_dir: str | None = option(
        None, "Folder for what is taken from the hub; by default the one that HF_HOME or HF_HUB_CACHE says."
    )
    runner: Runner = option("auto", "Taken for the sake of vLLM's scripts: all models are pooled here.")
    convert: Convert = option("auto", "What to make of a model whose class is for something else.")
    pooler_config: PoolerConfig = option(PoolerConfig(), "Pooler overrides, as JSON or dotted flags.")
    hf_overrides: Mapping[str, Any] = option({}, "Keys merged over the checkpoint's config.json, as JSON.")
    chat_template: str | None = option(
        None, "Jinja template, or a file of one, for chat messages and for score prompts."
    )
    chat_template_content_format: ContentFormat = option(
        "auto",
        "What the template gets for a message's content: string, or openai's list of parts; auto sees from it which.",
    )
    default_chat_template_kwargs: Mapping[str, Any] = option(
        {}, "Variables of the template, as JSON; a request's chat_template_kwargs win."
    )
    trust_remote_code: bool = option(False, "Run Python code that a checkpoint brings along.")
    dtype: DType = option(
        "auto",
        "Type of weights and activations; auto is bfloat16 on CPUs with AVX-512 BF16 or AMX, elsewhere the "
        "checkpoint's if the device has it.",
    )
    max_model_len: int | None = option(
        None, "Most tokens a prompt may have; by default, or auto, what the model was made for.", auto=-1
    )
    max_num_seqs: int = option(256, "Most prompts in one batch.")
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens in one batch; by default what a CPU is found to run best, up to 2048, or one prompt's worth; on a "
        "GPU 16384, less where memory is short.",
    )
    device: str = option("auto", "Where the model runs: cpu, cuda, cuda:N; auto is the first GPU, if any.")
    data_parallel_size: int = option(
        1, "GPUs that each run a copy of the model, numbered on from the --device."
    )
    cpu_workers: int | None = option(
        None,
        "Threads that each run batches on a CPU; by default one a core, as far as a container's quota goes.",
    )
    pin_workers: bool | None = option(
        None,
        "Bind each of them to a core of its own, or none ever; by default only while all of them have work, and if "
        "they are as many as cores.",
    )
    gpu_memory_utilization: float | None = option(
        None, "Most of a GPU's memory to take, as a part of 1; nothing is taken ahead of need."
    )
    cuda_graphs: bool = option(
        False, "Record small batches of common shapes on the GPU and play them back with one launch."
    )
    enable_prefix_caching: bool | None = option(
        None,
        "Keep keys and values of prompts' beginnings for those that begin alike; by default where a causal model's "
        "results are of last tokens.",
    )
    enable_chunked_prefill: bool | None = option(
        None, "Run long prompts in chunks, beside others; by default where the model is causal."
    )
    long_prefill_token_threshold: int | None = option(
        None,
        "Longest chunk, and longest prompt that is run whole; by default a batch's worth, 2048 at the most.",
    )
    block_size: int = option(16, "Tokens in a block of the cache of keys and values.")
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for keys and values; by default 1 GiB or a quarter of what is free, on a GPU a tenth of it.",
    )
    cache_size: int = option(
        0, "Memory for results, given again for prompts that come again; 0 keeps none.", unit="bytes"
    )
    max_queued_tokens: int | None = option(
        None,
        "Waiting tokens above which requests get 503; by default those that would wait 5 s are refused, and while "
        "fewer than 128 are there those that would wait 60 s.",
    )
    quantization: str | None = option(
        None, "int8: linear layers in 8-bit integers, on a CPU; by default as --dtype says."
    )
    surgery: bool = option(True, "Swap modules of the model for fused ones that compute the same.")
    lora_modules: tuple[LoraModule, ...] = option(
        (),
        "Adapters (PEFT LoRA) beside the model, each NAME=PATH; requests name one as their model.",
        several=True,
    )
    allow_runtime_lora_updating: bool = option(
        False,
        "Let clients load and unload adapters while the server runs, from any folder that it can read or the hub. "
        "Layers are kept apart for them, which costs some speed.",
    )
    token_id_input: bool = option(True, "Accept token ids as input; --no-token-id-input refuses them.")

    def __post_init__(self) -> None:
        if self.max_model_len == -1:  # the reference's auto
            object.__setattr__(self, "max_model_len", None)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "data_parallel_size",
            "cpu_workers",
            "long_prefill_token_threshold",
            "block_size",
            "kv_cache_memory_bytes",
            "max_queued_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.cache_size < 0:
            raise ConfigError(f"--cache-size must be at least 0, got {self.cache_size}.")
        object.__setattr__(self, "lora_modules", LoraModule.parse_all(self.lora_modules))
        if self.quantization not in (None, "int8"):
            raise ConfigError(
                f"--quantization must be int8, got {self.quantization!r}: other formats (fp8, awq, gptq, "
                "bitsandbytes, …) are not served."
            )
        _check_choice("--runner", self.runner, get_args(Runner))
        _check_choice("--convert", self.convert, get_args(Convert))
        _check_choice("--dtype", self.dtype, get_args(DType))
        _check_choice(
            "--chat-template-content-format", self.chat_template_content_format, get_args(ContentFormat)
        )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device, re.ASCII):
            raise ConfigError(f"--device must be one of auto, cpu, cuda, cuda:N, got {self.device!r}.")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization must be more than 0 and at most 1, got {self.gpu_memory_utilization}."
            )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
