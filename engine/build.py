"""Build: an EngineConfig becomes the parts of an engine, every "auto" resolved. Runs once, before anything serves."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from carpool.engine.checkpoint import Checkpoint
from carpool.engine.config import EngineConfig
from carpool.engine.device import resolve_device, resolve_dtype
from carpool.engine.errors import ConfigError, InvalidParameter
from carpool.engine.hub import BUNDLED_NAME, locate
from carpool.engine.model_info import ModelInfo
from carpool.engine.models.backbone import Backbone
from carpool.engine.models.loader import load_backbone
from carpool.engine.models.probe import check_isolation
from carpool.engine.models.surgery import operate
from carpool.engine.poolers.dense import load_dense
from carpool.engine.poolers.pooler import Pooler
from carpool.engine.runner import ModelRunner
from carpool.engine.tokenizer import Tokenizer
from carpool.kernels.ops import attention_in_use

_DEFAULT_BATCH_TOKENS = 2048  # the best micro-batch on the CPUs measured: docs/log.md


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine is made of. `runners` share one set of weights; each is for one worker."""

    model: ModelInfo
    tokenizer: Tokenizer
    runners: list[ModelRunner]


def build(config: EngineConfig) -> Parts:
    """Load and check the model. Raises ConfigError with one sentence if it cannot be served as asked."""
    folder = locate(config.model, config.revision)
    checkpoint = Checkpoint.read(folder, config.hf_overrides, config.pooler_config)
    device = resolve_device(config.device)
    dtype, notice = resolve_dtype(config.dtype, checkpoint.stored_dtype, device)
    max_model_len = _max_model_len(config, checkpoint)
    tokenizer = Tokenizer.load(
        locate(config.tokenizer) if config.tokenizer else folder,
        trust_remote_code=config.trust_remote_code,
        max_model_len=max_model_len,
        vocab_size=checkpoint.vocab_size,
        lowercase=checkpoint.lowercase,
    )
    backbone = load_backbone(
        checkpoint,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        trust_remote_code=config.trust_remote_code,
    )
    swapped = operate(backbone.module) if config.surgery else {}
    check_isolation(
        backbone,
        vocab_size=checkpoint.vocab_size,
        max_model_len=max_model_len,
        window=checkpoint.text_config.get("sliding_window") or checkpoint.text_config.get("local_attention"),
    )
    try:
        checkpoint.matryoshka.check(config.pooler_config.dimensions, config.model or BUNDLED_NAME)
    except InvalidParameter as error:
        raise ConfigError(f"The pooler config's dimensions cannot be served: {error}") from error
    modes = checkpoint.pooling or (("last",) if backbone.is_causal else ("cls",))
    dense = [load_dense(spec, device) for spec in checkpoint.dense]
    pooler = Pooler(modes, dense, checkpoint.normalize, config.pooler_config.dimensions)
    runner = ModelRunner(backbone, pooler, device)
    workers = _workers(config, device)
    return Parts(
        ModelInfo(
            root=config.model or str(folder),
            architectures=checkpoint.architectures,
            tasks=frozenset({"embed", "token_embed"}),
            max_model_len=max_model_len,
            vocab_size=checkpoint.vocab_size,
            embedding_size=checkpoint.matryoshka.size,
            matryoshka=checkpoint.matryoshka,
            pooling="+".join(modes),
            normalize=checkpoint.normalize,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            workers=workers,
            parameters=_parameters(backbone),
            max_num_batched_tokens=_max_num_batched_tokens(config, max_model_len),
            max_num_seqs=config.max_num_seqs,
            attention=attention_in_use() if device.type == "cpu" else "torch",
            surgery=swapped,
            notices=tuple(sentence for sentence in (notice, _native_notice(device)) if sentence),
        ),
        tokenizer,
        [runner, *(runner.replica() for _ in range(workers - 1))],
    )


def _max_model_len(config: EngineConfig, checkpoint: Checkpoint) -> int:
    asked = config.max_model_len
    if asked is not None and asked > checkpoint.longest:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {checkpoint.longest} tokens that this model has positions for."
        )
    return asked or checkpoint.max_model_len


def _max_num_batched_tokens(config: EngineConfig, max_model_len: int) -> int:
    asked = config.max_num_batched_tokens
    if asked is not None and asked < max_model_len:
        raise ConfigError(
            f"--max-num-batched-tokens {asked} is less than one prompt may have ({max_model_len}): "
            "raise it, or lower --max-model-len."
        )
    return asked or max(_DEFAULT_BATCH_TOKENS, max_model_len)


def _workers(config: EngineConfig, device: torch.device) -> int:
    """One a device; on a CPU one a core this process may use, unless told otherwise."""
    if device.type != "cpu":
        return 1
    return config.cpu_workers or len(os.sched_getaffinity(0))


def _parameters(backbone: Backbone) -> int:
    return sum(weight.numel() for weight in backbone.module.parameters())


def _native_notice(device: torch.device) -> str | None:
    """Fallbacks are loud: without its native kernels a CPU server is right, and slower than it need be."""
    if device.type != "cpu" or attention_in_use() != "torch":
        return None
    return "The native CPU kernels were not built (no C++ compiler at install, or another CPU): torch serves, slower."
