"""EngineConfig: everything the engine can be told, before "auto" is resolved. One frozen value, made once.

Each field carries its help text; the command line, the environment, the YAML file and `docs/configuration.md`
are all made from these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from carpool.engine.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "float", "bfloat16", "float16", "half"]
PoolingType = Literal["CLS", "LAST", "MEAN"]
Runner = Literal["auto", "pooling"]
Convert = Literal["auto", "embed", "none"]

# Options of the reference that decide nothing here: taken from scripts and command lines, with one notice.
IGNORED_OPTIONS = frozenset(
    {
        "enforce_eager",
        "gpu_memory_utilization",
        "swap_space",
        "seed",
        "load_format",
        "disable_log_stats",
        "disable_log_requests",
        "enable_log_requests",
        "max_log_len",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_logprobs",
        "block_size",
        "kv_cache_dtype",
        "cpu_offload_gb",
        "model_impl",
        "config_format",
        "tokenizer_mode",
        "async_scheduling",
        "scheduling_policy",
    }
)


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text, shown by `--help` and in the docs."""
    metadata["help"] = help
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerConfig:
    """Overrides of how hidden states become results; None leaves the choice to the model's own files."""

    pooling_type: PoolingType | None = option(None, "Which rows make a text's vector: CLS, LAST or MEAN.")
    seq_pooling_type: PoolingType | None = option(None, "Newer name of pooling_type.")
    use_activation: bool | None = option(
        None, "Default of the request field: whether embeddings are normalised."
    )
    normalize: bool | None = option(None, "Older name of use_activation.")
    dimensions: int | None = option(None, "Default of the request field: cut every embedding to this width.")

    def __post_init__(self) -> None:
        if self.pooling_type and self.seq_pooling_type:
            raise ConfigError("Set pooling_type or seq_pooling_type in the pooler config, not both.")
        if self.pooling is not None:
            _check_choice("pooling_type in the pooler config", self.pooling, get_args(PoolingType))

    @property
    def pooling(self) -> PoolingType | None:
        return self.pooling_type or self.seq_pooling_type

    @property
    def activation(self) -> bool | None:
        return self.use_activation if self.use_activation is not None else self.normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to load and how to run it. "auto" and None are resolved against the checkpoint and the machine."""

    model: str = option(
        "", "A checkpoint folder or a Hugging Face name; without it the bundled all-MiniLM-L6-v2."
    )
    tokenizer: str | None = option(None, "Folder or name of the tokenizer, where it is not the model's.")
    revision: str | None = option(None, "Branch, tag or commit of a model taken from the Hugging Face hub.")
    runner: Runner = option("auto", "Kept for the reference's scripts: all models are pooled here.")
    convert: Convert = option("auto", "How to adapt a model that is not a pooling model.")
    pooler_config: PoolerConfig = option(PoolerConfig(), "Pooler overrides, as JSON or dotted flags.")
    hf_overrides: Mapping[str, Any] = option({}, "Keys merged over the checkpoint's config.json, as JSON.")
    trust_remote_code: bool = option(False, "Run Python code that a checkpoint brings along.")
    dtype: DType = option(
        "auto", "Type of weights and activations; auto is the checkpoint's if the device has it."
    )
    max_model_len: int | None = option(
        None, "Most tokens a prompt may have; by default what the model was made for."
    )
    max_num_seqs: int = option(256, "Most prompts in one batch.")
    max_num_batched_tokens: int | None = option(
        None, "Most tokens in one batch; by default 2048, or one prompt's worth."
    )
    device: Device = option("auto", "Where the model runs.")
    cpu_workers: int | None = option(None, "Threads that each run batches on a CPU; by default one a core.")
    max_queued_tokens: int | None = option(
        None, "Waiting tokens above which requests get 503; by default 60 s of work."
    )
    surgery: bool = option(True, "Swap modules of the model for fused ones that compute the same.")
    token_id_input: bool = option(True, "Accept token ids as input; --no-token-id-input refuses them.")

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "cpu_workers",
            "max_queued_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        _check_choice("--runner", self.runner, get_args(Runner))
        _check_choice("--convert", self.convert, get_args(Convert))
        _check_choice("--dtype", self.dtype, get_args(DType))
        _check_choice("--device", self.device, get_args(Device))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
